"""Every processor against what a plain loop over one sample's tokens would do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_sgl import (
    ImportanceProcessor,
    ImportanceProcessorList,
    MinimumPerImageProcessor,
    RetentionRatioProcessor,
    VisualTokens,
)

pytestmark = pytest.mark.mechanics

# No deadline: how long an example takes says more about the machine than about the code.
RANDOMLY = settings(max_examples=40, deadline=None)

IMAGE = 9
DROPPED, PROTECTED = -math.inf, math.inf

# Few distinct values, so that ties are common; sums of quarters are exact.
FINITE = st.integers(0, 8).map(lambda number: number / 4)
ANY_IMPORTANCE = st.one_of(FINITE, FINITE, FINITE, st.sampled_from([DROPPED, PROTECTED]))


class Samples:
    """A batch whose samples have images of different sizes, and an importance for every visual token."""

    def __init__(self, samples: list[list[list[float]]]) -> None:
        self.images = samples  # per sample, per image, the importance of its tokens
        self.flat = [[value for image in sample for value in image] for sample in samples]
        rows = [[token for image in sample for token in [*([IMAGE] * len(image)), 1]] + [2] for sample in samples]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        self.tokens = VisualTokens.from_input_ids(ids, IMAGE, ids > 0)
        # As `ImportanceProcessorList.keep_mask` hands it over: -inf where a sample has fewer tokens.
        self.importance = torch.full(self.tokens.valid.shape, DROPPED)
        for row, values in zip(self.importance, self.flat, strict=True):
            row[: len(values)] = torch.tensor(values)

    def unpadded(self, importance: torch.Tensor) -> list[list[float]]:
        """What a processor returned for the real tokens; nothing may have come to life where there is none."""
        assert (importance[~self.tokens.valid] == DROPPED).all()
        return [row[: len(values)].tolist() for row, values in zip(importance, self.flat, strict=True)]


def samples(values: st.SearchStrategy[float] = ANY_IMPORTANCE) -> st.SearchStrategy[Samples]:
    image = st.lists(values, min_size=1, max_size=6)
    return st.lists(st.lists(image, max_size=3), min_size=1, max_size=3).map(Samples)


def descending(values: list[float]) -> list[int]:
    """Indices by falling importance, equal ones in order."""
    return sorted(range(len(values)), key=lambda index: -values[index])


def only(values: list[float], kept: set[int]) -> list[float]:
    return [value if index in kept else DROPPED for index, value in enumerate(values)]


# --- a fixed fraction ---


@RANDOMLY
@given(samples(), st.floats(0.01, 1.0))
def test_retention_ratio_equals_a_plain_loop(batch, ratio):
    result = batch.unpadded(RetentionRatioProcessor(ratio)(batch.tokens, batch.importance))

    expected = []
    for values in batch.flat:
        budget = max(1, math.floor(ratio * len(values)), values.count(PROTECTED))
        expected.append(only(values, set(descending(values)[:budget])))
    assert result == expected


@RANDOMLY
@given(samples(FINITE), st.floats(0.01, 1.0))
def test_retention_ratio_keeps_the_papers_count_in_every_sample(batch, ratio):
    keep_mask = ImportanceProcessorList([RetentionRatioProcessor(ratio)]).keep_mask(batch.tokens, batch.importance)

    expected = [max(1, math.floor(ratio * len(values))) if values else 0 for values in batch.flat]
    assert keep_mask.sum(dim=1).tolist() == expected


@pytest.mark.parametrize(
    ("ratio", "count", "kept"), [(0.3, 10, 3), (0.29, 100, 28), (0.05, 19, 1), (0.05, 256, 12), (1, 7, 7), (1.0, 1, 1)]
)
def test_the_count_is_what_floor_says_in_plain_python(ratio, count, kept):
    batch = Samples([[[0.5] * count]])

    result = batch.unpadded(RetentionRatioProcessor(ratio)(batch.tokens, batch.importance))

    assert kept == max(1, math.floor(ratio * count))
    assert result == [[0.5] * kept + [DROPPED] * (count - kept)]  # of equal tokens the earlier ones


# --- a minimum per image ---


@RANDOMLY
@given(samples(), st.integers(1, 7))
def test_minimum_per_image_protects_each_images_best_and_nothing_else(batch, min_tokens):
    result = batch.unpadded(MinimumPerImageProcessor(min_tokens)(batch.tokens, batch.importance))

    expected = []
    for images in batch.images:
        row: list[float] = []
        for values in images:
            best = set(descending(values)[:min_tokens])
            row += [PROTECTED if index in best and value != DROPPED else value for index, value in enumerate(values)]
        expected.append(row)
    assert result == expected


@RANDOMLY
@given(samples(FINITE), st.integers(1, 3), st.floats(0.01, 1.0))
def test_after_a_minimum_per_image_no_image_vanishes_and_the_rest_goes_by_rank(batch, min_tokens, ratio):
    processors = ImportanceProcessorList([MinimumPerImageProcessor(min_tokens), RetentionRatioProcessor(ratio)])

    keep_mask = processors.keep_mask(batch.tokens, batch.importance)

    for sample, images in enumerate(batch.images):
        protected = sum(min(min_tokens, len(values)) for values in images)
        budget = max(1, math.floor(ratio * len(batch.flat[sample]))) if images else 0
        assert int(keep_mask[sample].sum()) == max(protected, budget)  # protected tokens count within the budget
        for number, values in enumerate(images):
            of_image = keep_mask[sample, batch.tokens.image_index[sample] == number]
            assert int(of_image.sum()) >= min(min_tokens, len(values))


def test_a_minimum_protects_nothing_where_there_is_no_token():
    batch = Samples([[[1.0, 2.0], [3.0]], [[4.0]]])
    protected = MinimumPerImageProcessor(1)(batch.tokens, batch.importance.clamp(min=0.0))
    assert protected.tolist() == [[1.0, PROTECTED, PROTECTED], [PROTECTED, 0.0, 0.0]]


def test_a_minimum_protects_from_a_processor_of_the_users_too():
    class AboveHalf(ImportanceProcessor):
        def __call__(self, visual_tokens, importance):
            return importance.masked_fill(importance < 0.5, DROPPED)

    batch = Samples([[[8.0, 0.0], [0.0, 0.25]]])

    processors = ImportanceProcessorList([MinimumPerImageProcessor(1), AboveHalf()])

    assert processors.keep_mask(batch.tokens, batch.importance).tolist() == [[True, False, False, True]]


# --- what holds for all of them ---


@pytest.mark.parametrize("processor", [RetentionRatioProcessor(0.4), MinimumPerImageProcessor(2)])
@RANDOMLY
@given(batch=samples())
def test_dropped_stays_dropped_protected_stays_protected_and_the_input_is_not_changed(processor, batch):
    before = batch.importance.clone()

    after = processor(batch.tokens, batch.importance)

    assert batch.importance.equal(before)
    assert (after[before == DROPPED] == DROPPED).all()
    assert (after[before == PROTECTED] == PROTECTED).all()


@pytest.mark.parametrize("processor", [RetentionRatioProcessor(0.4), MinimumPerImageProcessor(2)])
def test_prompts_without_images_pass_through(processor):
    tokens = VisualTokens.from_input_ids(torch.ones(2, 3, dtype=torch.long), IMAGE)

    keep_mask = ImportanceProcessorList([processor]).keep_mask(tokens, torch.zeros(2, 0))

    assert keep_mask.shape == (2, 0)


@RANDOMLY
@given(samples(FINITE))
def test_an_empty_list_keeps_every_visual_token(batch):
    assert ImportanceProcessorList().keep_mask(batch.tokens, batch.importance).equal(batch.tokens.valid)


def test_processors_run_in_the_lists_order():
    batch = Samples([[[4.0, 3.0, 2.0, 1.0]]])
    half, best_of_rest = RetentionRatioProcessor(0.5), DropTheFirst()

    ratio_first = ImportanceProcessorList([half, best_of_rest]).keep_mask(batch.tokens, batch.importance)
    ratio_last = ImportanceProcessorList([best_of_rest, half]).keep_mask(batch.tokens, batch.importance)

    assert ratio_first.tolist() == [[False, True, False, False]]
    assert ratio_last.tolist() == [[False, True, True, False]]


# --- a user's own processors ---


class DropTheFirst(ImportanceProcessor):
    def __call__(self, visual_tokens, importance):
        importance = importance.clone()
        importance[:, 0] = DROPPED
        return importance


class TooWide(ImportanceProcessor):
    def __call__(self, visual_tokens, importance):
        return torch.cat([importance, importance], dim=1)


class NotANumber(ImportanceProcessor):
    def __call__(self, visual_tokens, importance):
        return importance * math.nan


class DropsEverything(ImportanceProcessor):
    def __call__(self, visual_tokens, importance):
        return torch.full_like(importance, DROPPED)


class RevivesPadding(ImportanceProcessor):
    def __call__(self, visual_tokens, importance):
        return torch.ones_like(importance)


class LikesTheEnd(ImportanceProcessor):
    """Ranks by place alone, and so gives the places that only fill up the highest importance."""

    def __call__(self, visual_tokens, importance):
        return torch.arange(importance.shape[1], dtype=torch.float32).expand_as(importance)


@pytest.mark.parametrize(
    ("processor", "sentence"),
    [
        (TooWide(), r"TooWide returned importance of shape \(1, 4\) instead of \(1, 2\): return one value per visual"),
        (NotANumber(), "NotANumber returned NaN: return finite importance, or -inf to drop a token"),
        (DropsEverything(), "dropped every visual token of a sample: leave at least one above -inf"),
    ],
    ids=["shape", "NaN", "everything"],
)
def test_a_processor_that_breaks_the_contract_is_refused(processor, sentence):
    batch = Samples([[[0.5, 0.25]]])

    with pytest.raises(ValueError, match=sentence):
        ImportanceProcessorList([processor]).keep_mask(batch.tokens, batch.importance)


def test_dropping_everything_is_refused_although_other_samples_have_no_images():
    batch = Samples([[], [[0.5]]])

    with pytest.raises(ValueError, match="dropped every visual token"):
        ImportanceProcessorList([DropsEverything()]).keep_mask(batch.tokens, batch.importance)


def test_filling_places_are_never_kept():
    batch = Samples([[[0.5, 0.5, 0.5]], [[0.5]]])

    keep_mask = ImportanceProcessorList([RevivesPadding()]).keep_mask(batch.tokens, batch.importance)

    assert keep_mask.tolist() == [[True, True, True], [True, False, False]]


def test_filling_places_take_nothing_from_the_budget_of_the_next_processor():
    batch = Samples([[[0.5] * 8], [[0.5] * 2]])

    keep_mask = ImportanceProcessorList([LikesTheEnd(), RetentionRatioProcessor(0.5)]).keep_mask(
        batch.tokens, batch.importance
    )

    assert keep_mask.sum(dim=1).tolist() == [4, 1]


def test_a_processor_must_implement_call():
    class Nothing(ImportanceProcessor):
        pass

    with pytest.raises(TypeError, match="__call__"):
        Nothing()


# --- bad constructor values ---


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.01, 2, True, False, "0.5", None, math.nan, math.inf])
def test_a_fraction_outside_its_range_is_refused(value):
    with pytest.raises(ValueError, match=r"`retention_ratio` is .*: pass a number above 0 and up to 1"):
        RetentionRatioProcessor(value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_a_minimum_that_is_no_count_is_refused(value):
    with pytest.raises(ValueError, match=r"`min_tokens` is .*: pass a whole number of 1 or more"):
        MinimumPerImageProcessor(value)
