"""Guidance that reaches the vision tower, in one `generate` call of a pair."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tiny_models import EOS, TOKENS_PER_TILE, answers, near_copy, prompts, samples, state, tiny_internvl
from torch import Tensor

from transformers_sgl import ImportanceProcessor, SGLForConditionalGeneration, VisualTokens

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 2}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
# Tiles, patches before and in the middle of the tower; the decoder prunes further, or not.
SETTINGS = [
    {"vision_retention_ratio": 0.5, "retention_ratio": 1.0},
    {"vision_retention_ratio": 0.7, "retention_ratio": 0.2, "prune_layer": 2},
    {"vision_retention_ratio": 0.4, "vision_prune_layer": 0, "retention_ratio": 1.0},
    {"vision_retention_ratio": 0.5, "vision_prune_layer": 1, "retention_ratio": 0.25, "prune_layer": 1},
    {"vision_retention_ratio": 0.5, "vision_prune_layer": 0.7, "retention_ratio": 0.25, "prune_layer": 0},
]


def tiny_pair(attn_implementation: str = "sdpa", small_seed: int = 54) -> SGLForConditionalGeneration:
    large = tiny_internvl(num_vision_layers=3, attn_implementation=attn_implementation)
    small = tiny_internvl(num_layers=3, seed=small_seed, hidden_size=16)
    return SGLForConditionalGeneration(large=large, small=small).eval()


class NoTile(ImportanceProcessor):
    """Drops every token of the tile with this number."""

    def __init__(self, tile: int) -> None:
        self.tile = tile

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        assert visual_tokens.tile_index is not None
        return importance.masked_fill(visual_tokens.tile_index == self.tile, float("-inf"))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_tower_that_keeps_everything_changes_nothing(implementation: str, padding_side: str) -> None:
    pair, inputs = tiny_pair(implementation), prompts(padding_side=padding_side)
    wanted = pair.generate(**inputs, **GREEDY, **DETAILS, retention_ratio=0.5)

    class All(ImportanceProcessor):
        def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
            return importance

    for layer in (None, 0, 2):
        settings = {"retention_ratio": 0.5, "vision_prune_layer": layer, "vision_processor": All()}
        output = pair.generate(**inputs, **GREEDY, **DETAILS, **settings)
        assert torch.equal(output.sequences, wanted.sequences)
        assert all(map(torch.equal, output.logits, wanted.logits))
        assert output.vision_share.tolist() == [1.0] * 3
        assert torch.equal(output.average_retention(4), wanted.average_retention(4))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_gives_the_answers_of_its_samples(settings: dict[str, float]) -> None:
    pair, inputs = tiny_pair(), prompts()
    output = pair.generate(**inputs, **GREEDY, return_dict_in_generate=True, **settings)

    singles = [pair.generate(**one, **GREEDY, return_dict_in_generate=True, **settings) for one in samples(inputs)]

    lengths = [one["input_ids"].shape[1] for one in samples(inputs)]
    written = [answers(one.sequences, length)[0] for one, length in zip(singles, lengths, strict=True)]
    assert answers(output.sequences, inputs["input_ids"].shape[1]) == written
    for row, one in enumerate(singles):
        width = one.vision_keep_mask.shape[1]
        assert torch.equal(output.vision_keep_mask[row, :width], one.vision_keep_mask[0])
        assert torch.equal(output.keep_mask[row, :width], one.keep_mask[0])
        assert output.vision_share[row] == one.vision_share[0]
        assert output.average_retention(4)[row] == one.average_retention(4)[0]


def test_the_output_tells_what_was_done() -> None:
    pair, inputs = tiny_pair(), prompts(images=[[5]], text=[3])
    output = pair.generate(
        **inputs, **GREEDY, **DETAILS, vision_retention_ratio=0.6, retention_ratio=0.1, prune_layer=2
    )
    assert output.vision_keep_mask.view(5, TOKENS_PER_TILE).all(dim=1).sum() == 3  # whole tiles
    assert output.vision_keep_mask.view(5, TOKENS_PER_TILE)[-1].all()  # the thumbnail
    assert (output.keep_mask & ~output.vision_keep_mask).sum() == 0
    assert output.keep_mask.sum() == 8  # a tenth of 80
    assert (output.vision_prune_layer, output.vision_share.tolist()) == (None, [0.6])
    assert output.average_retention(4).item() == pytest.approx((2 * 0.6 + 2 * 0.1) / 4, abs=1e-12)

    output = pair.generate(
        **inputs, **GREEDY, **DETAILS, vision_retention_ratio=0.25, vision_prune_layer=1, retention_ratio=1.0
    )
    kept = output.vision_keep_mask.view(5, TOKENS_PER_TILE)
    assert kept.sum(dim=1).tolist() == [4] * 5
    assert torch.equal(output.keep_mask, output.vision_keep_mask)
    # One layer of 17 rows, a class token among them, and two of 5.
    assert output.vision_share.item() == pytest.approx((17 + 2 * 5) / (3 * 17))


def test_an_own_rule_leaves_out_a_tile_and_the_decoder_never_sees_it() -> None:
    pair, inputs = tiny_pair(), prompts(images=[[3]], text=[3])
    output = pair.generate(**inputs, **GREEDY, **DETAILS, retention_ratio=1.0, vision_processor=[NoTile(1)])
    assert output.vision_keep_mask.view(3, TOKENS_PER_TILE).all(dim=1).tolist() == [True, False, True]

    # The pixels of that tile make no difference, where the small model does not see them either.
    other = inputs["pixel_values"].clone()
    other[1] = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5))
    changed = pair.generate(
        **{**inputs, "pixel_values": other, "small_pixel_values": inputs["pixel_values"]},
        **GREEDY,
        **DETAILS,
        retention_ratio=1.0,
        vision_processor=NoTile(1),
    )
    assert torch.equal(changed.sequences, output.sequences)
    assert all(map(torch.equal, changed.logits, output.logits))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_draft_never_changes_the_answer(settings: dict[str, float]) -> None:
    large = tiny_internvl(num_vision_layers=3)
    pair = SGLForConditionalGeneration(large=large, small=near_copy(large, noise=0.01)).eval()
    inputs = prompts(images=[[1]] * 4 + [[2]] * 4, text=[2, 3, 4, 5] * 2)
    without = pair.generate(**inputs, **GREEDY, **settings, verify_draft=False)
    output = pair.generate(**inputs, **GREEDY, **settings, return_dict_in_generate=True)
    width = inputs["input_ids"].shape[1]
    assert answers(output.sequences, width) == answers(without, width)
    assert output.num_draft_tokens_accepted.sum() > 0


@pytest.mark.parametrize("settings", SETTINGS)
def test_samples_that_exit_early_are_not_encoded(settings: dict[str, float]) -> None:
    pair, inputs = tiny_pair(), prompts()
    pair.generation_config.eos_token_id = pair.small.generation_config.eos_token_id = EOS
    known = pair.generate(**inputs, **GREEDY, **settings, return_dict_in_generate=True)
    complete = known.decision_score.masked_fill(~known.draft_complete, -1)
    # As many exit as the random drafts allow, but not all.
    threshold = complete.sort().values[1].item()
    output = pair.generate(
        **inputs, **GREEDY, **settings, return_dict_in_generate=True, early_exit_threshold=max(threshold, 0.0)
    )
    width = inputs["input_ids"].shape[1]
    late = ~output.exited_early
    assert late.any()
    for row in late.nonzero()[:, 0].tolist():
        assert answers(output.sequences, width)[row] == answers(known.sequences, width)[row]
        assert torch.equal(output.vision_keep_mask[row], known.vision_keep_mask[row])
    assert output.vision_share[output.exited_early].tolist() == [0.0] * int(output.exited_early.sum())
    assert not output.vision_keep_mask[output.exited_early].any()


def test_text_beside_images_stays_as_it_is() -> None:
    pair, inputs = tiny_pair(), prompts(images=[[2], []], text=[3, 5])
    output = pair.generate(**inputs, **GREEDY, return_dict_in_generate=True, vision_retention_ratio=0.5)
    assert output.vision_share.tolist() == [0.5, 0.0]
    assert output.vision_keep_mask[1].sum() == 0


def test_hooks_are_gone_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, inputs = tiny_pair(), prompts()
    settings = {"vision_retention_ratio": 0.5, "vision_prune_layer": 1}
    pair.generate(**inputs, **GREEDY, **settings)  # transformers leaves hooks of its own at the first call
    before = state(pair.large)
    pair.generate(**inputs, **GREEDY, **settings)
    assert state(pair.large) == before
    last = pair.large.model.vision_tower.encoder.layer[2]
    monkeypatch.setattr(last.mlp, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        pair.generate(**inputs, **GREEDY, **settings)
    monkeypatch.undo()
    assert state(pair.large) == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"vision_retention_ratio": 0}, "`vision_retention_ratio` is 0, but it is the fraction"),
            ({"vision_retention_ratio": 1.5}, "`vision_retention_ratio` is 1.5, but it is the fraction"),
            (
                {"vision_retention_ratio": 0.5, "vision_prune_layer": 3},
                "`vision_prune_layer` is 3, but the large model has 3 vision layers: pass an index from 0 to 2",
            ),
            ({"vision_retention_ratio": 0.5, "vision_prune_layer": -1}, "`vision_prune_layer` is -1: pass a layer"),
            ({"vision_processor": 3}, "`vision_processor` is or holds 3"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, float], sentence: str) -> None:
        pair = tiny_pair()
        before = [state(pair.large), state(pair.small)]
        with pytest.raises(ValueError, match=sentence):
            pair.generate(**prompts(), **GREEDY, **settings)
        assert [state(pair.large), state(pair.small)] == before

    def test_a_rule_that_drops_every_tile(self) -> None:
        class Nothing(ImportanceProcessor):
            def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
                return torch.full_like(importance, float("-inf"))

        pair = tiny_pair()
        pair.generate(**prompts(), **GREEDY)
        before = [state(pair.large), state(pair.small)]
        with pytest.raises(ValueError, match="dropped every visual token of a sample: leave at least one above -inf"):
            pair.generate(**prompts(), **GREEDY, vision_processor=Nothing())
        assert [state(pair.large), state(pair.small)] == before

    def test_a_cache_that_lacks_what_was_not_encoded_cannot_be_continued(self) -> None:
        pair, inputs = tiny_pair(), prompts(images=[[2]], text=[3])
        output = pair.generate(**inputs, **GREEDY, return_dict_in_generate=True, vision_retention_ratio=0.5)
        longer = {
            name: torch.cat([inputs[name], inputs[name][:, -2:]], dim=1) for name in inputs if "pixel" not in name
        }
        with pytest.raises(ValueError, match="left out before the first one, as by the vision tower"):
            pair.generate(**{**inputs, **longer}, **GREEDY, cache=output.cache)


def test_settings_of_the_pair_can_be_overruled() -> None:
    pair, inputs = tiny_pair(), prompts(images=[[5]], text=[3])
    pair.generation_config.vision_retention_ratio, pair.generation_config.vision_prune_layer = 0.6, 1
    details = {**GREEDY, "return_dict_in_generate": True}
    assert pair.generate(**inputs, **details).vision_prune_layer == 1
    whole = pair.generate(**inputs, **details, vision_prune_layer=None)
    assert (whole.vision_prune_layer, whole.vision_share.tolist()) == (None, [0.6])
    assert pair.generate(**inputs, **details, vision_retention_ratio=1.0).vision_keep_mask is None


def test_several_images_and_every_ratio() -> None:
    pair, inputs = tiny_pair(), prompts(images=[[1, 1, 3], [2]], text=[2, 4])
    for ratio, layer in product((0.1, 0.5, 0.9), (None, 0, 2)):
        output = pair.generate(
            **inputs,
            **GREEDY,
            return_dict_in_generate=True,
            vision_retention_ratio=ratio,
            vision_prune_layer=layer,
            min_tokens_per_image=0,
        )
        kept = output.vision_keep_mask.sum(dim=1)
        assert (kept >= 1).all()
        at_most = ratio * output.num_visual_tokens
        overview = torch.tensor([TOKENS_PER_TILE, TOKENS_PER_TILE])  # stays whatever the ratio
        assert (kept <= torch.maximum(at_most, overview)).all()
