"""More visual tokens of the samples that the small model is unsure of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE, answers, near_copy, prompts, samples, tiny_internvl
from torch import Tensor

from transformers_sgl import SGLForConditionalGeneration, SGLGenerationConfig, VisualTokens
from transformers_sgl.token_choice import choosing_processors, unsure_samples
from transformers_sgl.transformers_interface import cache_name, cache_of

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 4}
DETAILS = {"return_dict_in_generate": True}
IMAGES, TEXT = [[2], [1], [3], [1, 1], [2]], [3, 5, 2, 4, 3]
USUAL, MORE = {"retention_ratio": 0.2, "prune_layer": 1}, 0.6
TILES = {"vision_retention_ratio": 0.4, "retention_ratio": 0.2, "prune_layer": 2}
PATCHES = {"vision_retention_ratio": 0.4, "vision_prune_layer": 1, "retention_ratio": 1.0}


@pytest.fixture(scope="module")
def pair() -> SGLForConditionalGeneration:
    large = tiny_internvl(num_vision_layers=3)
    return SGLForConditionalGeneration(large=large, small=near_copy(large, noise=0.3)).eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return prompts(IMAGES, TEXT)


def middle(scores: Tensor, number: int = 2) -> float:
    """A threshold below which so many scores lie."""
    ordered = scores.sort().values
    return float((ordered[number - 1] + ordered[number]) / 2)


def kept_by_loops(importance: list[float], image: list[int], ratio: float, min_tokens: int) -> list[bool]:
    """What a ratio keeps of one sample: first the best of every image, then the best of all."""
    order = sorted(range(len(importance)), key=lambda token: -importance[token])
    kept: list[int] = []
    for name in set(image):
        kept += [token for token in order if image[token] == name][:min_tokens]
    budget = max(1, math.floor(ratio * len(importance)), len(kept))
    kept += [token for token in order if token not in kept][: budget - len(kept)]
    return [token in kept for token in range(len(importance))]


# --- the choice ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    images=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    usual=st.floats(0.01, 0.99),
    more=st.floats(0.01, 1.0),
    min_tokens=st.integers(0, 2),
    data=st.data(),
)
def test_each_sample_keeps_what_its_own_ratio_says(
    images: list[list[int]], usual: float, more: float, min_tokens: int, data: st.DataObject
) -> None:
    rows = [[token for size in sizes for token in [*([IMAGE] * size), 1]] for sizes in images]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    tokens = VisualTokens.from_input_ids(ids, IMAGE, ids > 0)
    unsure = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    values = [[float(data.draw(st.integers(0, 6))) for _ in range(sum(sizes))] for sizes in images]
    importance = torch.zeros(tokens.valid.shape)
    for row, own in zip(importance, values, strict=True):
        row[: len(own)] = torch.tensor(own)

    config = SGLGenerationConfig(
        retention_ratio=usual, min_tokens_per_image=min_tokens, unsure_retention_ratio=more, selection="top_k"
    ).resolved()
    of_tower, of_decoder = choosing_processors(config, unsure=unsure)
    found = of_decoder.keep_mask(tokens, importance)

    assert of_tower == []
    for row, own, sizes, is_unsure in zip(found.tolist(), values, images, unsure.tolist(), strict=True):
        image = [number for number, size in enumerate(sizes) for _ in range(size)]
        ratio = max(usual, more) if is_unsure else usual
        assert row[: len(own)] == kept_by_loops(own, image, ratio, min_tokens)


def test_what_is_below_the_threshold_or_no_number_is_unsure() -> None:
    config = SGLGenerationConfig(unsure_threshold=0.5)
    assert unsure_samples(torch.tensor([0.4, 0.5, 0.6, math.nan]), config).tolist() == [True, False, False, True]
    assert unsure_samples(None, config) is None
    assert unsure_samples(torch.tensor([0.4]), SGLGenerationConfig()) is None


# --- in one call -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [USUAL, {**USUAL, "prune_layer": 0}, TILES, PATCHES], ids=str)
@pytest.mark.parametrize("more", [MORE, 1.0])
def test_a_batch_with_both_kinds(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], own: dict[str, Any], more: float
) -> None:
    call = {**inputs, **GREEDY, **DETAILS}
    ratios = {name: max(own[name], more) for name in ("retention_ratio", "vision_retention_ratio") if name in own}
    sure, unsure = pair.generate(**call, **own), pair.generate(**call, **{**own, **ratios})
    threshold = middle(sure.decision_score)
    is_unsure = sure.decision_score < threshold
    assert is_unsure.sum() == 2

    output = pair.generate(**call, **own, unsure_threshold=threshold, unsure_retention_ratio=more)

    for name in ("keep_mask", "vision_keep_mask"):
        usual = getattr(sure, name)
        if usual is None:
            assert getattr(output, name) is None
            continue
        valid = torch.arange(usual.shape[1]) < sure.num_visual_tokens[:, None]
        whole = getattr(unsure, name)  # `None` where everything is kept
        wanted = torch.where(is_unsure[:, None], valid if whole is None else whole, usual)
        assert torch.equal(getattr(output, name), wanted)
    if own is not PATCHES:  # whose tiles go on with as many patches as the batch's fullest
        length = inputs["input_ids"].shape[1]
        rows = (answers(each.sequences, length) for each in (sure, unsure, output))
        for usual, other, found, of_unsure in zip(*rows, is_unsure.tolist(), strict=True):
            assert found == (other if of_unsure else usual)


def test_a_batch_is_its_samples(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    call = {**GREEDY, **DETAILS, **USUAL, "unsure_retention_ratio": MORE}
    threshold = middle(pair.generate(**inputs, **call).decision_score, 3)
    whole = pair.generate(**inputs, **call, unsure_threshold=threshold)
    for row, sample in enumerate(samples(inputs, IMAGES)):
        alone = pair.generate(**sample, **call, unsure_threshold=threshold)
        width = alone.keep_mask.shape[1]
        assert alone.keep_mask[0].tolist() == whole.keep_mask[row, :width].tolist()
        wanted = answers(alone.sequences, sample["input_ids"].shape[1])[0]
        assert answers(whole.sequences, inputs["input_ids"].shape[1])[row] == wanted
        assert torch.equal(whole.average_retention(4)[row : row + 1], alone.average_retention(4))


@pytest.mark.parametrize("decoding", [{"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_none_is_unsure_or_all_are(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], decoding: dict[str, Any]
) -> None:
    for threshold, ratio in ((0.0, 0.2), (1.5, MORE), (1.5, 1.0)):
        found = []
        for own in (
            {"retention_ratio": ratio},
            {"retention_ratio": 0.2, "unsure_threshold": threshold, "unsure_retention_ratio": max(ratio, MORE)},
        ):
            torch.manual_seed(0)
            found.append(pair.generate(**inputs, **decoding, **own, max_new_tokens=4, prune_layer=1))
        assert torch.equal(*found)


def test_it_never_keeps_less(pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> None:
    usual = pair.generate(**inputs, **GREEDY, **DETAILS, **USUAL)
    less = pair.generate(**inputs, **GREEDY, **DETAILS, **USUAL, unsure_threshold=1.5, unsure_retention_ratio=0.05)
    assert torch.equal(less.keep_mask, usual.keep_mask)


def test_who_exits_exits_and_the_rule_is_for_the_others(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    call = {**inputs, **GREEDY, **DETAILS, **USUAL, "unsure_retention_ratio": MORE}
    known = pair.generate(**call)
    scores = known.decision_score.masked_fill(~known.draft_complete, -1)
    exit_at, unsure_at = middle(scores, 4), middle(scores, 2)
    rule = pair.generate(**call, unsure_threshold=unsure_at)
    output = pair.generate(**call, unsure_threshold=unsure_at, early_exit_threshold=exit_at)
    assert output.exited_early.tolist() == (scores >= exit_at).tolist()
    assert output.exited_early.sum() == 1
    rest = ~output.exited_early
    assert torch.equal(output.keep_mask[rest], rule.keep_mask[rest])
    assert not output.keep_mask[~rest].any()
    rows = (answers(each.sequences, inputs["input_ids"].shape[1]) for each in (output, rule))
    assert [found == wanted for found, wanted in zip(*rows, strict=True)].count(True) >= int(rest.sum())
    # A threshold above that of the exits: who does not exit is unsure.
    both = pair.generate(**call, unsure_threshold=1.5, early_exit_threshold=exit_at)
    more = pair.generate(**call, unsure_threshold=1.5)
    assert torch.equal(both.keep_mask[rest], more.keep_mask[rest])


def test_scores_are_computed_for_it_and_only_where_something_is_pruned(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor]
) -> None:
    passes: list[int] = []
    hook = pair.small.register_forward_hook(lambda *_: passes.append(1))
    found = []
    for own in ({}, {"unsure_threshold": 0.5}, {"unsure_threshold": 0.5, "score_draft": False}):
        passes.clear()
        pair.generate(**inputs, **GREEDY, **USUAL, **own)
        found.append(len(passes))
    passes.clear()
    whole = pair.generate(**inputs, **GREEDY, retention_ratio=1.0, unsure_threshold=0.5)
    hook.remove()
    assert found == [found[0], found[0] + 1, found[0] + 1]
    assert not passes
    assert torch.equal(whole, pair.large.generate(**inputs, **GREEDY))


def test_a_conversation_goes_on(pair: SGLForConditionalGeneration) -> None:
    inputs = prompts(images=[[2]], text=[4])
    call = {**GREEDY, **DETAILS, **USUAL, "unsure_retention_ratio": MORE}
    for first_threshold, later_threshold in ((1.5, 0.0), (0.0, 1.5)):
        first = pair.generate(**inputs, **call, unsure_threshold=first_threshold)
        ids = torch.cat([first.sequences, torch.tensor([[3, 4, 5]])], dim=1)
        turn = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole = pair.generate(**turn, **call, unsure_threshold=later_threshold)
        cache = {cache_name(): cache_of(first)}
        found = pair.generate(**turn, **call, unsure_threshold=later_threshold, **cache)
        assert torch.equal(found.sequences, whole.sequences)
        assert torch.equal(found.keep_mask, whole.keep_mask)


def test_a_pairs_own_rule_is_turned_off_by_none_and_by_a_preset(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = pair.generate(**inputs, **GREEDY, **DETAILS, preset="fast")
    own = SGLGenerationConfig.from_generation_config(pair.generation_config)
    own.update(unsure_threshold=1.5, retention_ratio=0.05, prune_layer=2 / 48)
    monkeypatch.setattr(pair, "generation_config", own)
    assert pair.generate(**inputs, **GREEDY, **DETAILS).keep_mask.sum() == usual.num_visual_tokens.sum()
    for off in ({"unsure_threshold": None}, {"preset": "fast"}):
        assert torch.equal(pair.generate(**inputs, **GREEDY, **DETAILS, **off).keep_mask, usual.keep_mask)


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"confirmation_threshold": 0.5}, "both say of which samples the large model reads more: pass None for one"),
        ({"guidance": "prompt"}, 'With `guidance="prompt"` .* `unsure_threshold` .* or set `guidance="answer"`'),
    ],
)
def test_is_refused(
    pair: SGLForConditionalGeneration, inputs: dict[str, Tensor], own: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        pair.generate(**inputs, **GREEDY, **own, unsure_threshold=0.5)
