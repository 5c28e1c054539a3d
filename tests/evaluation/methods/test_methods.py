"""Each method against its paper's definition: by hand, and in plain loops over what stock transformers tells."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import picture, tiny_family_pair
from tiny_models import state
from tiny_processors import PROCESSORS
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLGenerateOutput, VisualTokenPruner, VisualTokens
from transformers_sgl.architectures import decoder_layers, visual_tokens_of
from transformers_sgl.evaluation import Scenes
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import (
    METHODS,
    SGL,
    SGP,
    Answer,
    Batch,
    DivPrune,
    Downsample,
    FastV,
    Guide,
    Method,
    Oracle,
    Pair,
    Random,
    Setting,
    base,
    find_method,
    guides,
)
from transformers_sgl.evaluation.methods.downsample import _fitting_size, _Size
from transformers_sgl.evaluation.methods.guides import max_min_diversity
from transformers_sgl.generation_config_sgl import PAPER_PRESETS

VISION_METHODS = ("sgp-vision", "sgl-vision", "confirmed", "sgl-confirmed")
THIRD = Setting(0.35, 2, 10)
THRESHOLDS = {None: 0.5, 0.64: 0.5, 0.35: 0.5, 0.09: 0.5}
GUIDES = ["random", "fastv", "oracle", "divprune", "divprune-late", "cdpruner", "visionzip"]


@pytest.fixture(scope="module")
def pair(embedded_pair_path: Path) -> Pair:
    model = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    pair = Pair(model, AutoProcessor.from_pretrained(embedded_pair_path), max_new_tokens=8)
    SGP().answer(pair, scenes(128), THIRD)  # caches that a first call fills are there from here on
    return pair


@pytest.fixture(scope="module")
def eager(embedded_pair_path: Path) -> Any:
    """The large model in the mode that gives all attention away."""
    return AutoModelForImageTextToText.from_pretrained(embedded_pair_path / "large", attn_implementation="eager")


def scenes(*sizes: int) -> Batch:
    """A scene of each size, with a question: 320 visual tokens where the side is 128 pixels, 64 where it is 64."""
    samples = []
    for index, size in enumerate(sizes):
        scene = Scenes("test", seed=3, size=size, questions_per_scene=9)[index]
        question = scene.questions[0]
        samples.append(Sample(scene.image, question.question, (question.answer,)))
    return Batch(samples, [7 * index for index in range(len(sizes))], [sample.open_image() for sample in samples])


MIXED = scenes(128, 64, 128)


def with_thresholds(method: Method) -> Method:
    return replace(method, thresholds=THRESHOLDS) if isinstance(method, SGL) else method


def alone(batch: Batch, place: int) -> Batch:
    return Batch([batch.samples[place]], [batch.indices[place]], [batch.images[place]])


def large_inputs(pair: Pair, batch: Batch) -> Any:
    return pair.inputs(pair.processor.large_processor, batch.samples, batch.images)


def visual_columns(pair: Pair, inputs: Any) -> list[list[int]]:
    image = pair.model.large.config.image_token_id
    return [[column for column, token in enumerate(row) if token == image] for row in inputs["input_ids"].tolist()]


def last_layer_of(answers: list[Answer], setting: Setting) -> list[float]:
    """The fraction of visual tokens in the last layer, worked back from the average."""
    layers, below = setting.num_layers, setting.prune_layer
    return [(answer.retention * layers - below) / (layers - below) for answer in answers]


def prompt_mask(inputs: Any, columns: list[list[int]], kept: list[set[int]]) -> Tensor:
    """All of each prompt but the visual tokens whose number is not among the kept ones."""
    mask = inputs["attention_mask"].bool().clone()
    for row, (places, numbers) in enumerate(zip(columns, kept, strict=True)):
        for number, column in enumerate(places):
            mask[row, column] = number in numbers
    return mask


def best(importance: list[float], ratio: float) -> set[int]:
    """The numbers of the most important tokens, `floor(ratio * tokens)` of them, the earlier of equal ones."""
    order = sorted(range(len(importance)), key=lambda token: -importance[token])
    return set(order[: max(1, math.floor(ratio * len(importance)))])


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int]]:
    """What the guides told the pruner: the prompt's tokens to keep, and from which layer on."""
    seen: list[tuple[Tensor, int]] = []

    class Watched(VisualTokenPruner):
        def __init__(self, model: Any, keep_mask: Any, prune_layer: int) -> None:
            def choose() -> Tensor:
                seen.append((keep_mask(), prune_layer))
                return seen[-1][0]

            super().__init__(model, choose, prune_layer)

    monkeypatch.setattr(guides, "VisualTokenPruner", Watched)
    return seen


class TestSetting:
    @pytest.mark.parametrize("num_layers", [1, 2, 4, 10, 28, 48])
    def test_the_average_is_met_exactly(self, num_layers: int) -> None:
        for average in np.linspace(0.001, 0.999, 200):
            setting = Setting.of(float(average), num_layers)
            assert 0 <= setting.prune_layer < num_layers
            assert 0 < setting.retention_ratio <= 1
            per_layer = [1.0] * setting.prune_layer
            per_layer += [setting.retention_ratio] * (num_layers - setting.prune_layer)
            assert sum(per_layer) / num_layers == pytest.approx(average, abs=1e-12)

    @pytest.mark.parametrize("name", PAPER_PRESETS)
    def test_the_paper_s_own_points_lie_on_the_line(self, name: str) -> None:
        ratio, depth = PAPER_PRESETS[name]["retention_ratio"], PAPER_PRESETS[name]["prune_layer"]
        layer = round(48 * depth)
        setting = Setting.of((layer + (48 - layer) * ratio) / 48, 48)
        assert setting.prune_layer == layer
        assert setting.retention_ratio == pytest.approx(ratio)

    @pytest.mark.parametrize("average", [0.0, 1.0, -0.2, 1.5, math.nan])
    def test_what_is_no_fraction_is_refused(self, average: float) -> None:
        with pytest.raises(ValueError, match="The average retention is .*: pass a fraction above 0 and below 1"):
            Setting.of(average, 48)

    def test_what_was_reached(self) -> None:
        # Two of ten layers see all 320 tokens, eight see 60 of them: (2 + 8 * 60 / 320) / 10.
        kept = torch.arange(320)[None] < torch.tensor([[60], [0], [320]])
        output = SGLGenerateOutput(
            sequences=torch.zeros(3, 1), keep_mask=kept, num_visual_tokens=torch.tensor([320] * 3), prune_layer=2
        )
        assert output.average_retention(10).tolist() == pytest.approx([0.35, 0.2, 1.0])
        output.exited_early = torch.tensor([False, True, False])
        assert output.average_retention(10).tolist() == pytest.approx([0.35, 0.0, 1.0])
        output.keep_mask = None
        assert output.average_retention(10).tolist() == [1.0, 0.0, 1.0]
        assert THIRD.from_layer(0).retention_ratio == pytest.approx(0.35)


class TestModelsAlone:
    @pytest.mark.parametrize("name", ["large", "small"])
    def test_they_write_what_stock_generate_writes(self, pair: Pair, name: str) -> None:
        model, processor = getattr(pair.model, name), getattr(pair.processor, f"{name}_processor")
        found = METHODS[name].answer(pair, MIXED, THIRD)
        for sample, image, answer in zip(MIXED.samples, MIXED.images, found, strict=True):
            content = [{"type": "image", "image": image}, {"type": "text", "text": sample.question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            written = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            assert answer.text == processor.decode(written, skip_special_tokens=True)
            assert answer.num_tokens == len(written)
            assert answer.retention == (1.0 if name == "large" else None)
        assert len({answer.num_tokens for answer in found}) > 1  # so that the batch was padded

    def test_an_answer_that_is_cut_off_has_all_its_tokens(self, pair: Pair) -> None:
        short = replace(pair, max_new_tokens=1)
        assert [answer.num_tokens for answer in METHODS["large"].answer(short, MIXED, THIRD)] == [1, 1, 1]


class TestSettingWithVision:
    @given(
        average=st.floats(0.01, 0.99),
        points=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 0.9)), min_size=2, max_size=4),
        num_layers=st.integers(1, 64),
    )
    def test_the_average_is_reached_with_no_more_than_the_tower_encodes(
        self, average: float, points: list[tuple[float, float]], num_layers: int
    ) -> None:
        places = np.linspace(0, 1, len(points))
        rule = tuple(
            (place, place + (1 - place) * share, depth) for place, (share, depth) in zip(places, points, strict=True)
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "VISION_POINTS", rule)
            setting = Setting.of(average, num_layers).with_vision()
        encoded, kept, layer = setting.vision_retention_ratio, setting.retention_ratio, setting.prune_layer
        assert 0 <= layer < num_layers
        assert 0 < kept <= encoded + 1e-9 <= 1 + 1e-9
        assert (layer * encoded + (num_layers - layer) * kept) / num_layers == pytest.approx(average)

    def test_points_are_kept_to(self) -> None:
        averages = [average for average, _, _ in base.VISION_POINTS]
        assert averages == sorted(averages)
        assert (averages[0], averages[-1]) == (0, 1)
        assert all(average <= ratio <= 1 for average, ratio, _ in base.VISION_POINTS)
        for average, ratio, _ in base.VISION_POINTS[1:-1]:
            assert Setting.of(average, 48).with_vision().vision_retention_ratio == pytest.approx(ratio)

    def test_without_it_nothing_is_left_out_of_the_tower(self) -> None:
        setting = Setting.of(0.35, 48)
        assert (setting.vision_retention_ratio, setting.vision_prune_layer) == (1.0, None)


class TestPair:
    @pytest.mark.parametrize(
        ("name", "queries", "layers"),
        [
            ("sgp", "both", 1.0),
            ("sgp-last", "last", 1.0),
            ("sgp-generated", "generated", 1.0),
            ("sgp-30%", "both", 0.3),
        ],
    )
    def test_sgp_is_the_pair_s_own_generate(
        self, pair: Pair, name: str, queries: str, layers: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pair.model.generation_config, "num_draft_tokens", 2)  # not what happens to pay just then
        found = METHODS[name].answer(pair, MIXED, THIRD)
        inputs = pair.inputs(pair.processor, MIXED.samples, MIXED.images)
        output = pair.model.generate(
            **inputs,
            max_new_tokens=8,
            retention_ratio=0.1875,  # (0.35 * 10 - 2) / 8
            prune_layer=2,
            selection="top_k",
            guidance_queries=queries,
            guidance_layers=layers,
            return_dict_in_generate=True,
        )
        written = output.sequences[:, inputs["input_ids"].shape[1] :]
        expected = pair.processor.batch_decode(written, skip_special_tokens=True)
        assert [answer.text for answer in found] == expected
        drafts = pair.processor.small_processor.batch_decode(output.draft_sequences, skip_special_tokens=True)
        assert [answer.draft for answer in found] == drafts
        assert [answer.num_draft_tokens_accepted for answer in found] == output.num_draft_tokens_accepted.tolist()
        assert [answer.retention for answer in found] == pytest.approx([0.35] * 3)  # 60 of 320 tokens, 12 of 64
        assert not any(answer.exited_early for answer in found)
        assert [answer.decision_score for answer in found] == [None] * 3

    def test_settings_of_the_variants_arrive(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = {}
        generate = type(pair.model).generate

        def watched(model: Any, **kwargs: Any) -> Any:
            names = ("guidance_queries", "guidance_layers", "early_exit_threshold", "score_draft")
            seen[name] = tuple(kwargs[each] for each in names)
            assert (kwargs["vision_retention_ratio"] < 1) == (name in ("sgp-vision", "confirmed"))
            assert (kwargs["confirmation_threshold"] is None) == (name != "confirmed")
            return generate(model, **kwargs)

        monkeypatch.setattr(type(pair.model), "generate", watched)
        for name in METHODS:
            if name.startswith("sgp") or name == "confirmed":
                METHODS[name].answer(pair, alone(MIXED, 1), THIRD)
        assert seen == {
            "sgp": ("both", 1.0, 2.0, False),
            "sgp-first": ("both", 1.0, 2.0, False),
            "sgp-facility": ("both", 1.0, 2.0, False),
            "sgp-facility-late": ("both", 1.0, 2.0, False),
            "sgp-facility-prompt": ("prompt", 1.0, None, False),
            "sgp-dpp": ("both", 1.0, 2.0, False),
            "sgp-vision": ("both", 1.0, 2.0, False),
            "confirmed": ("both", 1.0, 2.0, False),
            "sgp-last": ("last", 1.0, 2.0, False),
            "sgp-prompt": ("prompt", 1.0, 2.0, False),
            "sgp-generated": ("generated", 1.0, 2.0, False),
            "sgp-10%": ("both", 0.1, 2.0, False),
            "sgp-30%": ("both", 0.3, 2.0, False),
            "sgp-50%": ("both", 0.5, 2.0, False),
            "sgp-70%": ("both", 0.7, 2.0, False),
        }

    @pytest.mark.parametrize("prune_layer", [None, 0.4])
    def test_with_vision_it_is_the_pair_s_own_generate_too(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch, prune_layer: float | None
    ) -> None:
        monkeypatch.setattr(base, "VISION_POINTS", ((0.0, 0.4, 0.3), (1.0, 1.0, 0.3)))
        monkeypatch.setattr(base, "VISION_PRUNE_LAYER", prune_layer)
        batch = scenes(128, 128)
        found = METHODS["sgp-vision"].answer(pair, batch, Setting.of(0.4, 10))
        inputs = pair.inputs(pair.processor, batch.samples, batch.images)
        output = pair.model.generate(
            **inputs,
            max_new_tokens=8,
            vision_retention_ratio=0.64,  # two fifths of the way from 0.4 to 1
            vision_prune_layer=prune_layer,
            prune_layer=3,
            retention_ratio=(0.4 * 10 - 3 * 0.64) / 7,
            selection="top_k",
            return_dict_in_generate=True,
        )
        written = output.sequences[:, inputs["input_ids"].shape[1] :]
        assert [answer.text for answer in found] == pair.processor.batch_decode(written, skip_special_tokens=True)
        # Of five tiles of 64 tokens three are kept whole, or 40 tokens of each.
        encoded = 3 / 5 if prune_layer is None else 40 / 64
        assert output.vision_keep_mask.sum(dim=1).tolist() == [320 * encoded] * 2
        kept = output.keep_mask.sum(dim=1) / 320
        expected = ((3 * encoded + 7 * kept) / 10).tolist()
        assert [answer.retention for answer in found] == pytest.approx(expected)
        assert [answer.retention for answer in found] == pytest.approx([0.4] * 2, abs=0.02)

    def test_no_draft_is_returned_although_the_pair_would(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pair.model.generation_config, "early_exit_threshold", 0.0)
        assert not any(answer.exited_early for answer in SGP().answer(pair, MIXED, THIRD))

    def test_from_threshold_0_on_the_large_model_is_not_called(self, pair: Pair) -> None:
        calls: list[int] = []
        hook = pair.model.large.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            found = SGL(thresholds={0.35: 0.0}).answer(pair, MIXED, THIRD)
        finally:
            hook.remove()
        assert calls == []
        small = METHODS["small"].answer(pair, MIXED, THIRD)
        assert [answer.text for answer in found] == [answer.text for answer in small]
        assert [answer.num_tokens for answer in found] == [answer.num_tokens for answer in small]
        assert all(answer.exited_early and answer.draft == answer.text for answer in found)
        assert [answer.retention for answer in found] == [None] * 3

    def test_a_threshold_parts_the_batch(self, pair: Pair) -> None:
        pruned = SGP(scores_draft=True).answer(pair, MIXED, THIRD)
        scores = sorted(answer.decision_score for answer in pruned)
        found = SGL(thresholds={0.64: 0.0, 0.35: (scores[0] + scores[1]) / 2}).answer(pair, MIXED, THIRD)
        assert [answer.exited_early for answer in found] == [answer.decision_score > scores[0] for answer in pruned]
        for answer, other in zip(found, pruned, strict=True):
            assert answer.decision_score == pytest.approx(other.decision_score)
            assert answer.text == (other.draft if answer.exited_early else other.text)
            assert answer.retention == (None if answer.exited_early else pytest.approx(0.35))


class TestFastV:
    @torch.no_grad()
    @pytest.mark.parametrize("prune_layer", [1, 2, 6])
    def test_it_ranks_by_the_last_token_s_attention_before_the_prune_layer(
        self, pair: Pair, eager: Any, masks: list[Any], prune_layer: int
    ) -> None:
        setting = Setting((prune_layer + (10 - prune_layer) * 0.25) / 10, prune_layer, 10)
        found = FastV().answer(pair, MIXED, setting)

        inputs = large_inputs(pair, MIXED)
        assert not inputs["attention_mask"].all()  # something is padded
        assert inputs["attention_mask"][:, -1].all()  # on the left
        attention = eager(**inputs, output_attentions=True).attentions[prune_layer - 1]
        columns = visual_columns(pair, inputs)
        kept = []
        for row, places in enumerate(columns):
            received = [sum(float(head[-1, column]) for head in attention[row]) / 4 for column in places]
            kept.append(best(received, 0.25))
        mask = prompt_mask(inputs, columns, kept)
        ((seen, layer),) = masks
        assert layer == prune_layer
        assert torch.equal(seen, mask)
        with VisualTokenPruner(eager, mask, prune_layer):
            written = eager.generate(**inputs, do_sample=False, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        expected = pair.processor.batch_decode(written, skip_special_tokens=True)
        assert [answer.text for answer in found] == expected
        assert last_layer_of(found, setting) == pytest.approx([80 / 320, 16 / 64, 80 / 320])

    @torch.no_grad()
    def test_by_hand(self, pair: Pair, embedded_pair_path: Path) -> None:
        # Queries of zero weigh all that they see alike. The last token sees its whole prompt of n tokens, padding
        # left out, so that each of the 4 heads gives each token 1/n.
        model = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
        blind = Pair(model, pair.processor, max_new_tokens=1)
        queries = decoder_layers(model.large)[1].self_attn.q_proj
        torch.nn.init.zeros_(queries.weight)
        torch.nn.init.zeros_(queries.bias)
        inputs = large_inputs(blind, MIXED)
        tokens = visual_tokens_of(model.large.config, inputs)
        with FastV().rank(blind, MIXED, inputs, tokens, THIRD) as importance:
            model.large(**inputs)
            found = importance()
        for row, mask in enumerate(inputs["attention_mask"]):
            number = int(tokens.counts[row])
            torch.testing.assert_close(found[row, :number], torch.full((number,), 4 / int(mask.sum())))

    def test_there_is_no_layer_before_the_first(self, pair: Pair, masks: list[Any]) -> None:
        found = FastV().answer(pair, MIXED, Setting(0.1, 0, 10))
        ((mask, layer),) = masks
        assert layer == 1
        # A tenth of the tokens from the second of ten layers on: (1 + 9 * 32 / 320) / 10, and 6 of 64.
        assert [answer.retention for answer in found] == pytest.approx([0.19, (1 + 9 * 6 / 64) / 10, 0.19])
        dropped = large_inputs(pair, MIXED)["attention_mask"].sum(dim=1) - mask.sum(dim=1)
        assert dropped.tolist() == [288, 58, 288]


class TestOracle:
    def test_it_sums_all_attention_of_its_own_whole_answer(self, pair: Pair, eager: Any) -> None:
        inputs = large_inputs(pair, MIXED)
        tokens = visual_tokens_of(pair.model.large.config, inputs)
        found = Oracle().importance(pair, MIXED, inputs, tokens)

        output = eager.generate(
            **inputs, do_sample=False, max_new_tokens=8, output_attentions=True, return_dict_in_generate=True
        )
        length = inputs["input_ids"].shape[1]
        for row, places in enumerate(visual_columns(pair, inputs)):
            received = torch.zeros(len(places))
            for step, layers in enumerate(output.attentions):
                if step and output.sequences[row, length + step - 1] == eager.config.text_config.eos_token_id:
                    break
                for attention in layers:  # (batch, heads, queries, keys)
                    # the prompt's tokens after the image, and then each token that was written
                    for query in range(0 if step else places[-1] + 1, attention.shape[2]):
                        received += attention[row, :, query, places].sum(dim=0)
            torch.testing.assert_close(found[row, : len(places)], received, rtol=1e-4, atol=1e-5)
            assert not found[row, len(places) :].any()

    def test_it_prunes_by_that(self, pair: Pair, masks: list[Any]) -> None:
        inputs = large_inputs(pair, MIXED)
        tokens = visual_tokens_of(pair.model.large.config, inputs)
        importance = Oracle().importance(pair, MIXED, inputs, tokens)
        Oracle().answer(pair, MIXED, THIRD)
        counts = tokens.counts.tolist()
        kept = [best(row[:number].tolist(), 0.1875) for row, number in zip(importance, counts, strict=True)]
        assert torch.equal(masks[0][0], prompt_mask(inputs, visual_columns(pair, inputs), kept))


def on_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def greedy(features: Tensor, number: int) -> list[int]:
    """Max-min diversity in plain loops: the tokens in the order in which they are chosen."""
    unit = [row / row.norm() for row in features.double()]
    tokens = range(len(unit))
    distance = [(1 - torch.stack(unit) @ one).tolist() for one in unit]
    chosen: list[int] = []
    while len(chosen) < number:
        left = [token for token in tokens if token not in chosen]
        among = chosen or tokens
        chosen.append(max(left, key=lambda i: min((distance[i][j] for j in among if j != i), default=0.0)))
    return chosen


class TestDivPrune:
    def test_by_hand(self) -> None:
        # Directions of 0, 10, 90 and 180 degrees, and one minus the cosine of the angle between each two:
        #            10     90     180      nearest
        #     0    0.015  1.000  2.000       0.015
        #    10           0.826  1.985       0.015
        #    90                  1.000       0.826
        #   180                              1.000   <- farthest from its nearest: first
        # From 180 the farthest is 0; then 90, which is 1.000 from both (10 is 0.015 from 0); 10 comes last.
        rank = max_min_diversity(on_circle(0, 10, 90, 180)[None], torch.ones(1, 4, dtype=torch.bool))
        assert rank.tolist() == [[3, 1, 2, 4]]

    def test_length_says_nothing_but_direction_does(self) -> None:
        features = on_circle(0, 10, 90, 180)[None] * torch.tensor([1.0, 50.0, 0.1, 3.0])[:, None]
        assert max_min_diversity(features, torch.ones(1, 4, dtype=torch.bool)).tolist() == [[3, 1, 2, 4]]

    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_the_greedy_choice(self, seed: int) -> None:
        features = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(seed))
        counts = [12, 1, 7]
        valid = torch.arange(12) < torch.tensor(counts)[:, None]
        features[~valid] = 1e3  # must not matter
        rank = max_min_diversity(features, valid)
        for row, number in enumerate(counts):
            order = rank[row].argsort(descending=True, stable=True)[:number].tolist()
            assert order == greedy(features[row, :number], number)
            assert not rank[row, number:].any()

    @pytest.mark.parametrize("seed", range(5))
    def test_no_choice_is_more_than_twice_as_diverse(self, seed: int) -> None:
        # One minus the cosine is half the squared Euclidean distance of unit vectors, so the greedy choice is the same
        # for both; for the latter, which is a metric, it reaches half the optimum at the least.
        features = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(seed))
        unit = torch.nn.functional.normalize(features[0], dim=-1)

        def diversity(tokens: Any) -> float:
            return min(float((unit[i] - unit[j]).norm()) for i, j in itertools.combinations(tokens, 2))

        rank = max_min_diversity(features, torch.ones(1, 9, dtype=torch.bool), retention_ratio=4 / 9)
        chosen = rank[0].nonzero()[:, 0].tolist()
        assert len(chosen) == 4
        optimum = max(map(diversity, itertools.combinations(range(9), 4)))
        assert optimum >= diversity(chosen) >= optimum / 2

    def test_equal_tokens_are_ranked_all_the_same(self) -> None:
        rank = max_min_diversity(torch.ones(1, 5, 3), torch.ones(1, 5, dtype=torch.bool))
        assert sorted(rank[0].tolist()) == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize(("name", "prune_layer", "ratio"), [("divprune", 0, 0.35), ("divprune-late", 2, 0.1875)])
    @torch.no_grad()
    def test_it_compares_what_the_decoder_is_handed(
        self, pair: Pair, masks: list[Any], name: str, prune_layer: int, ratio: float
    ) -> None:
        found = METHODS[name].answer(pair, MIXED, THIRD)
        inputs = large_inputs(pair, MIXED)
        features = pair.model.large.get_image_features(inputs["pixel_values"]).pooler_output
        columns = visual_columns(pair, inputs)
        of_image = torch.cat(list(features)).reshape(-1, 128).split(list(map(len, columns)))
        kept = [set(greedy(rows, math.floor(ratio * len(rows)))) for rows in of_image]
        ((mask, layer),) = masks
        assert layer == prune_layer
        assert torch.equal(mask, prompt_mask(inputs, columns, kept))
        assert [answer.retention for answer in found] == pytest.approx([0.35, found[1].retention, 0.35])
        # 22 of 64 tokens in all layers, or 12 of 64 in eight of ten
        assert found[1].retention == pytest.approx(22 / 64 if prune_layer == 0 else 0.35)


class TestRandom:
    def importance(self, number: int, indices: list[int], seed: int = 0) -> Tensor:
        tokens = VisualTokens.from_input_ids(torch.full((len(indices), number), 9), 9)
        guide: Any = Random()
        return guide.importance(Pair(None, None, seed=seed), Batch([], indices, []), None, tokens)

    def test_every_pair_of_six_tokens_is_as_likely(self) -> None:
        draws = torch.cat([self.importance(6, list(range(1000)), seed) for seed in range(3)])
        chosen = Counter(tuple(sorted(row)) for row in draws.topk(2).indices.tolist())
        assert set(chosen) == set(itertools.combinations(range(6), 2))
        chi_square = sum((count - 200) ** 2 / 200 for count in chosen.values())
        assert chi_square < 36.1  # 99.9 % of the distribution with 14 degrees of freedom

    def test_what_shares_the_batch_makes_no_difference(self) -> None:
        together = self.importance(20, [3, 8, 5])
        assert torch.equal(self.importance(20, [5]), together[2:])
        # Nor how long the longest prompt is: the first tokens' draws stay.
        assert torch.equal(self.importance(12, [8]), together[1:2, :12])

    def test_seeds_and_samples_differ(self) -> None:
        draws = [self.importance(20, [index], seed) for index in (0, 1) for seed in (0, 1)]
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(draws, 2))

    def test_samples_keep_the_same_tokens_alone(self, pair: Pair, masks: list[Any]) -> None:
        Random().answer(pair, MIXED, THIRD)
        for place in range(3):
            Random().answer(pair, alone(MIXED, place), THIRD)
        together, *apart = (mask for mask, _ in masks)
        prompts = large_inputs(pair, MIXED)["attention_mask"].bool()
        for row in range(3):
            assert torch.equal(together[row][prompts[row]], apart[row][0])
        assert (prompts.sum(dim=1) - together.sum(dim=1)).tolist() == [260, 52, 260]  # 60 of 320 stay, and 12 of 64


class TestDownsample:
    # The embedded pair's scenes of 128 x 128 pixels are four tiles and a thumbnail, 8 x 8 tokens each: 320. A budget
    # of 0.64 * 320 = 204.8 leaves 5 * 6 * 6 = 180; 0.35 * 320 = 112 either 5 * 4 * 4 = 80 or one tile of 8 * 8, which
    # shows as many pixels and is cheaper; 0.09 * 320 = 28.8 one tile of 5 * 5. Pictures of 64 x 64 pixels are one
    # tile: 0.64 * 64 = 40.96 leaves 6 * 6, 22.4 leaves 4 * 4, and 5.76 leaves 2 * 2.
    @pytest.mark.parametrize(
        ("average", "of_320", "of_64"), [(0.64, 180, 36), (0.35, 64, 16), (0.09, 25, 4), (0.001, 1, 1)]
    )
    def test_by_hand(
        self, pair: Pair, monkeypatch: pytest.MonkeyPatch, average: float, of_320: int, of_64: int
    ) -> None:
        seen = []
        write = Pair.write

        def watched(pair: Pair, model: Any, processor: Any, inputs: Any) -> list[tuple[str, int]]:
            seen.append([len(columns) for columns in visual_columns(pair, inputs)])
            return write(pair, model, processor, inputs)

        monkeypatch.setattr(Pair, "write", watched)
        found = Downsample().answer(pair, MIXED, Setting(average, 0, 10))
        assert seen == [[of_320, of_320], [of_64]]
        assert [answer.retention for answer in found] == [of_320 / 320, of_64 / 64, of_320 / 320]

    def test_mixed_sizes_keep_their_order(self, pair: Pair) -> None:
        mixed = scenes(128, 64, 128, 64)
        found = Downsample().answer(pair, mixed, THIRD)
        assert found == [Downsample().answer(pair, alone(mixed, place), THIRD)[0] for place in range(4)]
        assert len({answer.text for answer in found}) > 2

    def test_at_the_full_size_it_would_be_the_large_model(self, pair: Pair) -> None:
        # The nearest that it can come: a picture of one tile keeps it where the budget holds all its tokens.
        size = _Size(1.0, 320, tile_px=64, max_tiles=4)
        processor, options = size.apply(pair.processor.large_processor)
        whole, same = large_inputs(pair, MIXED), pair.inputs(processor, MIXED.samples, MIXED.images, **options)
        assert {name: value.tolist() for name, value in same.items()} == {
            name: value.tolist() for name, value in whole.items()
        }

    @pytest.mark.parametrize("average", [0.64, 0.35, 0.09])
    @pytest.mark.parametrize("size", [(64, 64), (100, 37), (33, 80), (57, 57)])
    def test_a_picture_of_any_proportions(self, size: tuple[int, int], average: float) -> None:
        processor, image = PROCESSORS["qwen2_5_vl"](), picture(*size)

        def num_tokens(scale: float) -> int:
            width, height = (max(1, round(side * scale)) for side in size)
            grid = processor.image_processor(image.resize((width, height)), return_tensors="pt")["image_grid_thw"]
            return int(grid.prod()) // 4

        chosen = _fitting_size(processor, size, average)
        assert chosen.num_tokens_before == num_tokens(1.0)
        assert chosen.resize(image).size == tuple(max(1, round(side * chosen.scale)) for side in size)
        scales = [0.98**step for step in range(230)]
        fitting = [scale for scale in scales if num_tokens(scale) <= average * num_tokens(1.0)]
        if fitting:
            assert chosen.scale == fitting[0]
        else:  # this processor enlarges what is smaller than 16 x 16 pixels, to four tokens
            fewest = min(map(num_tokens, scales))
            assert fewest > average * num_tokens(1.0)
            assert chosen.scale == next(scale for scale in scales if num_tokens(scale) == fewest)

    @pytest.mark.parametrize("name", sorted(PROCESSORS))
    def test_sizes_are_found_for_every_processor_that_counts(self, name: str) -> None:
        processor = PROCESSORS[name]()
        for size in ((96, 64), (32, 32)):
            if hasattr(processor, "_get_num_multimodal_tokens"):
                chosen = _fitting_size(processor, size, 0.35)
                assert chosen.num_tokens_before > 0
                assert 0 < chosen.scale <= 1
            else:
                with pytest.raises(
                    ValueError, match="Processor does not tell how many tokens .*: leave downsample out"
                ):
                    _fitting_size(processor, size, 0.35)

    @pytest.mark.parametrize("size", [(32, 32), (96, 32), (64, 64), (96, 96), (50, 70)])
    @pytest.mark.parametrize("average", [0.64, 0.35, 0.09])
    @pytest.mark.parametrize("min_patches", [1, 2])
    def test_of_all_tiles_that_fit_the_finest_are_taken(
        self, size: tuple[int, int], average: float, min_patches: int
    ) -> None:
        # Up to six tiles of 32 x 32 pixels with 4 x 4 tokens.
        processor = PROCESSORS["internvl"](min_patches=min_patches)

        def tiles(**options: Any) -> tuple[int, int]:
            """How many tiles there are, and how many pixels they show beside their thumbnail."""
            pixels = processor.image_processor(picture(*size), return_tensors="pt", **options)["pixel_values"]
            return len(pixels), max(1, len(pixels) - 1) * pixels.shape[-1] * pixels.shape[-2]

        budget = max(1, average * 16 * tiles()[0])
        fitting = []
        for tokens, max_patches in itertools.product(range(1, 5), range(1, 7)):
            side = {"height": 8 * tokens, "width": 8 * tokens}
            number, shown = tiles(size=side, min_patches=1, max_patches=max_patches)
            if number * tokens**2 <= budget:
                fitting.append((shown, -number * tokens**2))
        chosen = _fitting_size(processor, size, average)
        assert chosen.num_tokens_before == 16 * tiles()[0]
        smaller, options = chosen.apply(processor)
        number, shown = tiles(**options)
        finest = max(shown for shown, _ in fitting)
        assert (shown, number * smaller.image_seq_length <= budget) == (finest, True)


class TestAll:
    @pytest.mark.parametrize("name", METHODS)
    def test_models_stay_as_they_were(self, pair: Pair, name: str) -> None:
        method = with_thresholds(METHODS[name])
        found = method.answer(pair, MIXED, THIRD)  # and fills caches
        before = [state(pair.model.large), state(pair.model.small), pair.processor.to_dict()]
        assert method.answer(pair, MIXED, THIRD) == found
        assert [state(pair.model.large), state(pair.model.small), pair.processor.to_dict()] == before
        assert len(found) == 3
        assert all(answer.text and answer.num_tokens > 0 for answer in found)
        if not method.prunes:
            assert method.answer(pair, MIXED, Setting(0.09, 0, 10)) == found

    @pytest.mark.parametrize("name", GUIDES)
    def test_guides_keep_the_same_number_at_the_same_retention(self, pair: Pair, name: str) -> None:
        assert isinstance(METHODS[name], Guide)
        found = METHODS[name].answer(pair, MIXED, THIRD)
        assert [answer.retention for answer in found] == pytest.approx([0.35] * 3, abs=1 / 64)
        assert all(answer.retention <= 0.35 + 1e-9 for answer in found)

    @pytest.mark.parametrize("name", [name for name in METHODS if "%" not in name])
    def test_models_of_unlike_families(self, name: str) -> None:
        of_tiles = name in VISION_METHODS or name.startswith("visionzip")
        families = ("internvl", "qwen2_vl") if of_tiles else ("qwen2_vl", "internvl")
        pair = Pair(*tiny_family_pair(*families), max_new_tokens=4)
        images = [picture(40, 40), picture(56, 24, seed=1)]
        samples = [Sample(image, "what?", ("a",)) for image in images]
        method = with_thresholds(METHODS[name])
        found = method.answer(pair, Batch(samples, [0, 1], images), Setting.of(0.35, pair.num_layers))
        assert len(found) == 2
        for answer in found:
            most = 2 if name.endswith("confirmed") else 1  # which may read everything once more
            assert answer.retention is None or 0 < answer.retention <= most

    def test_there_is_none_of_that_name(self) -> None:
        assert find_method("divprune") == DivPrune()
        with pytest.raises(ValueError, match="There is no method 'best': take some of large, small, sgp, sgl"):
            find_method("best")
