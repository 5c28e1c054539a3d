"""VisionZip against its definition, in plain loops over what stock transformers tells."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TINY, tiny_batch, tiny_model, tiny_samples
from architectures.vision import PACKED
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import picture, tiny_family_pair
from tiny_models import state
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import VisualTokenPruner
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.evaluation import Scenes
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import METHODS, Batch, Pair, Setting, VisionZip
from transformers_sgl.evaluation.methods.visionzip import num_contextual, zip_tokens
from transformers_sgl.vision_towers import VISION_TOWERS


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def plain_zip(attention: Tensor, keys: Tensor, features: Tensor, num_kept: int) -> dict[int, Tensor]:
    """The tokens of one tile that stay, with their features."""
    number = len(attention)
    merged = (max(1, round(num_kept * 10 / 64)) if num_kept > 1 else 0) if num_kept < number else None
    if merged is None:  # nothing is left to be merged; which ones count as contextual makes no difference
        return {token: features[token] for token in range(number)}
    by_attention = sorted(range(number), key=lambda token: -float(attention[token]))
    dominant = by_attention[: num_kept - merged]
    rest = [token for token in range(number) if token not in dominant]
    stays = {token: features[token] for token in dominant}
    if merged:
        step = max(1, len(rest) // merged)
        targets = rest[::step][:merged]
        groups: dict[int, list[Tensor]] = {target: [] for target in targets}
        for token in rest:
            if token not in targets:
                groups[max(targets, key=lambda target: cosine(keys[token], keys[target]))].append(features[token])
        for target, group in groups.items():
            stays[target] = features[target] + (sum(group) / len(group) if group else 0)
    return stays


class TestZip:
    def test_by_hand(self) -> None:
        # Seven tokens, two stay: round(2 * 10 / 64) is none, but one is contextual. Token 3 gets most attention.
        # Of the others the first, 0, is the contextual one; it takes the mean of 1, 2, 4, 5 and 6: 10 + 16 / 5 ... as
        # features are 10, 1, 2, 3, 4, 5, 6: 10 + (1 + 2 + 4 + 5 + 6) / 5 = 13.6.
        attention = torch.tensor([[0.1, 0.2, 0.1, 0.9, 0.0, 0.3, 0.2]])
        features = torch.tensor([[10.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])[..., None]
        kept, merged = zip_tokens(attention, torch.ones(1, 7, 2), features, 2)
        assert kept.tolist() == [[True, False, False, True, False, False, False]]
        assert merged[0, 0].item() == pytest.approx(13.6)
        assert torch.equal(merged[:, 1:], features[:, 1:])

    def test_each_goes_to_the_most_similar_key(self) -> None:
        # Nine stay of 12: eight dominant (4 to 11), of 0, 1, 2, 3 the first is contextual. With 10 of 12 it would be
        # two. 1.5625 rounds to 2 for ten: 0 and 1 then, and no step lies between them.
        attention = torch.arange(12.0)[None]
        keys = torch.zeros(1, 12, 2)
        keys[0, :4] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 3.0], [2.0, 0.1]])
        features = torch.arange(12.0)[None, :, None] + 100
        kept, merged = zip_tokens(attention, keys, features, 10)
        assert kept[0].nonzero()[:, 0].tolist() == [0, 2, *range(4, 12)]
        # Token 1, straight up, is like 2; token 3 like 0.
        assert merged[0, :4, 0].tolist() == [100 + 103, 101, 102 + 101, 103]

    @pytest.mark.parametrize(("kept", "contextual"), [(1, 0), (2, 1), (5, 1), (22, 3), (64, 10), (128, 20), (192, 30)])
    def test_as_many_are_contextual_as_in_the_paper(self, kept: int, contextual: int) -> None:
        assert num_contextual(kept) == contextual

    @given(
        seed=st.integers(0, 10_000), number=st.integers(1, 20), num_kept=st.integers(1, 22), tiles=st.integers(1, 3)
    )
    def test_it_is_the_plain_one(self, seed: int, number: int, num_kept: int, tiles: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        attention = torch.rand(tiles, number, generator=generator)
        keys = torch.randn(tiles, number, 4, generator=generator)
        features = torch.randn(tiles, number, 2, 3, generator=generator)
        kept, merged = zip_tokens(attention, keys, features, num_kept)
        for tile in range(tiles):
            expected = plain_zip(attention[tile], keys[tile], features[tile], num_kept)
            assert kept[tile].nonzero()[:, 0].tolist() == sorted(expected)
            for token, values in expected.items():
                torch.testing.assert_close(merged[tile, token], values)

    def test_ties_and_keys_of_zeros(self) -> None:
        kept, merged = zip_tokens(torch.zeros(1, 6), torch.zeros(1, 6, 2), torch.ones(1, 6, 1), 3)
        assert kept[0].tolist() == [True, True, True, False, False, False]
        assert merged[0, :, 0].tolist() == [1, 1, 2, 1, 1, 1]


@pytest.fixture(scope="module")
def eager(embedded_pair_path: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(embedded_pair_path / "large", attn_implementation="eager")


@torch.no_grad()
@pytest.mark.parametrize("name", ["visionzip", "visionzip-mean"])
def test_the_tower_s_own_attention_chooses(embedded_pair_path: Path, eager: Any, name: str) -> None:
    pair = Pair(
        AutoModelForImageTextToText.from_pretrained(embedded_pair_path),
        AutoProcessor.from_pretrained(embedded_pair_path),
        max_new_tokens=8,
    )
    samples = []
    for index, size in enumerate((128, 64)):
        scene = Scenes("test", seed=3, size=size, questions_per_scene=9)[index]
        samples.append(Sample(scene.image, scene.questions[0].question, (scene.questions[0].answer,)))
    batch = Batch(samples, [0, 1], [sample.open_image() for sample in samples])
    found = METHODS[name].answer(pair, batch, Setting(0.35, 2, 10))

    # 112 of 320 tokens are 22, 22, 23, 22 and 23 of the five tiles; and 22 of the one tile.
    inputs = pair.inputs(pair.processor.large_processor, samples, batch.images)
    budgets = [math.floor((tile + 1) * 112 / 5) - math.floor(tile * 112 / 5) for tile in range(5)] + [22]
    assert sum(budgets) == 112 + 22
    last = eager.model.vision_tower.encoder.layer[-1]
    seen: list[Tensor] = []
    hook = last.attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    tower = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    hook.remove()
    keys = seen[0].view(6, 65, 4, 24).mean(dim=2)
    hidden, kept = tower.last_hidden_state[:, 1:].clone(), []
    for tile, budget in enumerate(budgets):
        attention = tower.attentions[-1][tile]  # (heads, queries, keys)
        received = (attention[:, 0] if name == "visionzip" else attention.sum(dim=1)).sum(dim=0)[1:]
        stays = plain_zip(received, keys[tile, 1:], hidden[tile], budget)
        for token, values in stays.items():
            hidden[tile, token] = values
        kept.append([token in stays for token in range(64)])

    # The merged features through the projector, and the decoder on the tokens that stay.
    features = eager.model.multi_modal_projector(hidden).reshape(-1, 128)
    embeddings = eager.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == eager.config.image_token_id
    embeddings[is_image] = features
    mask = inputs["attention_mask"].bool()
    mask[is_image] = torch.tensor(kept).flatten()
    positions = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with VisualTokenPruner(eager, mask, 0):
        written = eager.generate(
            inputs_embeds=embeddings,
            attention_mask=inputs["attention_mask"],
            position_ids=positions,
            do_sample=False,
            max_new_tokens=8,
        )
    assert [answer.text for answer in found] == pair.processor.batch_decode(written, skip_special_tokens=True)
    assert [answer.retention for answer in found] == [0.35, 22 / 64]


def tiny_pair() -> Pair:
    return Pair(*tiny_family_pair("internvl", "qwen2_vl"), max_new_tokens=4)


def tiny_questions() -> Batch:
    images = [picture(40, 40), picture(64, 32, seed=1)]
    return Batch([Sample(image, "what?", ("a",)) for image in images], [0, 1], images)


def sentence(name: str, reason: str) -> str:
    whole = f"VisionZip cannot merge in the vision tower of this {name!r} model, because {reason}: leave visionzip out"
    return re.escape(whole)


@pytest.mark.mechanics
class TestMechanics:
    def test_it_always_prunes_from_the_first_layer(self) -> None:
        assert VisionZip().setting(Setting(0.35, 2, 10)) == Setting(0.35, 0, 10)

    def test_the_batch_makes_no_difference_and_nothing_stays_behind(self) -> None:
        pair, batch = tiny_pair(), tiny_questions()
        together = METHODS["visionzip"].answer(pair, batch, Setting(0.35, 0, 3))
        before = state(pair.model.large)
        for place in range(2):
            alone = Batch([batch.samples[place]], [place], [batch.images[place]])
            assert METHODS["visionzip"].answer(pair, alone, Setting(0.35, 0, 3)) == [together[place]]
        assert state(pair.model.large) == before

    def test_an_error_leaves_nothing_behind(self) -> None:
        pair, batch = tiny_pair(), tiny_questions()
        METHODS["visionzip"].answer(pair, batch, Setting(0.35, 0, 3))
        before = state(pair.model.large)
        with pytest.raises(ValueError, match="max_new_tokens"):
            METHODS["visionzip"].answer(replace(pair, max_new_tokens=0), batch, Setting(0.35, 0, 3))
        assert state(pair.model.large) == before

    @pytest.mark.parametrize("name", sorted({*TINY} & {*VISION_TOWERS} - {*PACKED}))
    @torch.no_grad()
    def test_every_tower_of_tiles(self, name: str) -> None:
        model, inputs = tiny_model(name), tiny_batch(name, tiny_samples(name))
        if model.config.model_type in ("vipllava",):
            with pytest.raises(ValueError, match=sentence(name, "its projector reads several of its layers")):
                VisionZip().merger(model, inputs, visual_tokens_of(model.config, inputs), 0.5)
            return
        tokens = visual_tokens_of(model.config, inputs)
        with VisionZip().merger(model, inputs, tokens, 0.5) as merger:
            model(**inputs)
        kept, most = merger.kept.sum(dim=1), (tokens.counts * 0.5).floor()
        # Tokens that the tower does not make, like ends of rows, are not chosen.
        assert (kept <= most).all()
        assert (kept >= most / 2).all()
        assert not (merger.kept & ~tokens.valid).any()

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("qwen2_vl", "it reads patches of images of all sizes side by side"),
            ("idefics2", "nothing tells which of its patches stand behind a visual token"),
        ],
    )
    def test_other_towers_are_refused(self, name: str, reason: str) -> None:
        model, inputs = tiny_model(name), tiny_batch(name, tiny_samples(name))
        with pytest.raises(ValueError, match=sentence(name, reason)):
            VisionZip().merger(model, inputs, visual_tokens_of(model.config, inputs), 0.5)
