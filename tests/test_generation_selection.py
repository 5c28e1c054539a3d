"""`selection` in one `generate` call of a pair: what is recorded for it, and which tokens stay."""

from __future__ import annotations

import pytest
import torch
from tiny_models import answers, find_visual_tokens, prompts, samples, state, tiny_internvl
from torch import Tensor

from transformers_sgl import (
    AttentionRecorder,
    ConditionalDPPProcessor,
    ImportanceProcessor,
    ImportanceProcessorList,
    SGLForConditionalGeneration,
    VisualTokens,
)

pytestmark = pytest.mark.mechanics

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 2, "return_dict_in_generate": True}
SETTINGS = [
    {"retention_ratio": 0.3, "prune_layer": 0},
    {"retention_ratio": 0.3, "prune_layer": 2},
    {"retention_ratio": 0.2, "prune_layer": 1, "vision_retention_ratio": 0.7},
    {"retention_ratio": 0.2, "prune_layer": 0, "vision_retention_ratio": 0.5, "vision_prune_layer": 1},
    {"retention_ratio": 0.3, "prune_layer": 1, "guidance": "prompt"},
    {"retention_ratio": 0.3, "prune_layer": 0, "confirmation_threshold": 0.5},
]


def tiny_pair() -> SGLForConditionalGeneration:
    large = tiny_internvl(num_vision_layers=3)
    return SGLForConditionalGeneration(large=large, small=tiny_internvl(num_layers=3, seed=54, hidden_size=16)).eval()


class Watch(ImportanceProcessor):
    """Remembers what it was given."""

    def __init__(self, needs_features: bool = False) -> None:
        self.needs_features = needs_features
        self.seen: list[VisualTokens] = []

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        self.seen.append(visual_tokens)
        return importance


def projected(model: SGLForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """What the small model's own vision tower and projector make of the images, one token after the other."""
    found = model.small.model.get_image_features(pixel_values=inputs["pixel_values"])
    return (found if isinstance(found, Tensor) else found.pooler_output).flatten(0, -2)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_recorder_keeps_what_the_decoder_is_given(padding_side: str) -> None:
    pair, inputs = tiny_pair(), prompts(padding_side=padding_side)
    tokens = find_visual_tokens(inputs)
    for use_cache in (True, False):
        with AttentionRecorder(pair.small, tokens, records_features=True) as recorder:
            pair.small.generate(**inputs, do_sample=False, max_new_tokens=3, use_cache=use_cache)
        assert recorder.features is not None
        assert recorder.features.shape == (*tokens.valid.shape, 16)
        assert torch.equal(recorder.features[tokens.valid], projected(pair, inputs))
        assert not recorder.features[~tokens.valid].any()
    with AttentionRecorder(pair.small, tokens) as recorder:
        pair.small.generate(**inputs, do_sample=False, max_new_tokens=3)
    assert recorder.features is None


def test_features_are_recorded_for_processors_that_need_them_only() -> None:
    pair, inputs = tiny_pair(), prompts()
    for needs, selection in ((False, "top_k"), (True, "top_k"), (False, "dpp")):
        for of_tower in (False, True):
            watch = Watch(needs)
            name = "vision_processor" if of_tower else "importance_processor"
            pair.generate(**inputs, **GREEDY, retention_ratio=0.5, selection=selection, **{name: watch})
            features = watch.seen[0].features
            assert (features is not None) == (needs or selection == "dpp")
            if features is not None:
                assert torch.equal(features[find_visual_tokens(inputs).valid], projected(pair, inputs))


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_kept_tokens_are_those_that_the_processor_chooses(settings: dict) -> None:
    pair, inputs = tiny_pair(), prompts()
    top = pair.generate(**inputs, **GREEDY, **settings, selection="top_k")
    before = state(pair)
    watch = Watch()
    output = pair.generate(**inputs, **GREEDY, **settings, selection="dpp", importance_processor=watch)
    importance = output.importance
    if output.vision_keep_mask is not None:
        importance = importance.masked_fill(~output.vision_keep_mask, float("-inf"))
    # Each image's best token, then the others.
    best = importance.clone()
    for sample, tokens in enumerate(watch.seen[0].image_index):
        for image in range(int(tokens.max()) + 1):
            most, place = importance[sample].masked_fill(tokens != image, float("-inf")).max(dim=0)
            best[sample, place] = float("inf") if most.isfinite() else best[sample, place]
    choose = ImportanceProcessorList([ConditionalDPPProcessor(settings["retention_ratio"])])
    assert torch.equal(output.keep_mask, choose.keep_mask(watch.seen[0], best))
    assert torch.equal(output.keep_mask.sum(dim=1), top.keep_mask.sum(dim=1))
    assert not torch.equal(output.keep_mask, top.keep_mask)
    assert state(pair) == before


@pytest.mark.parametrize("settings", SETTINGS[:-1])
def test_a_batch_answers_as_its_samples_do_alone(settings: dict) -> None:
    pair, inputs = tiny_pair(), prompts()
    together = pair.generate(**inputs, **GREEDY, **settings, selection="dpp")
    written = answers(together.sequences, inputs["input_ids"].shape[1])
    for index, one in enumerate(samples(inputs)):
        alone = pair.generate(**one, **GREEDY, **settings, selection="dpp")
        assert answers(alone.sequences, one["input_ids"].shape[1]) == written[index : index + 1]
        assert torch.equal(together.keep_mask[index, : alone.keep_mask.shape[1]], alone.keep_mask[0])


def test_early_exits_leave_the_others_their_own_features() -> None:
    pair, inputs = tiny_pair(), prompts()
    whole = pair.generate(**inputs, **GREEDY, retention_ratio=0.3, prune_layer=0, selection="dpp")
    threshold = float(whole.decision_score.sort().values[-1])
    some = pair.generate(
        **inputs, **GREEDY, retention_ratio=0.3, prune_layer=0, selection="dpp", early_exit_threshold=threshold
    )
    exited = some.exited_early
    assert exited.sum() == 1
    assert torch.equal(some.keep_mask[~exited], whole.keep_mask[~exited])


def test_more_is_selected_where_the_guide_is_unsure() -> None:
    pair, inputs = tiny_pair(), prompts()
    settings = {"retention_ratio": 0.3, "prune_layer": 0, "selection": "facility_location"}
    usual = pair.generate(**inputs, **GREEDY, **settings)
    more = pair.generate(**inputs, **GREEDY, **{**settings, "retention_ratio": 0.6})
    threshold = float(usual.decision_score.sort().values[1])
    unsure = usual.decision_score < threshold
    mixed = pair.generate(
        **inputs, **GREEDY, **settings, unsure_threshold=threshold, unsure_retention_ratio=0.6
    ).keep_mask
    assert torch.equal(mixed, torch.where(unsure[:, None], more.keep_mask, usual.keep_mask))


def test_nothing_is_selected_where_every_token_stays() -> None:
    pair, inputs = tiny_pair(), prompts()
    stock = pair.large.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=2)
    output = pair.generate(**inputs, **GREEDY, retention_ratio=1.0, selection="dpp")
    assert torch.equal(output.sequences, stock)


def test_an_unknown_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="`selection` is 'best': choose one of 'top_k', 'dpp'"):
        tiny_pair().generate(**prompts(), selection="best")
