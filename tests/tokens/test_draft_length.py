"""How many tokens a round drafts: as many as pay, and none where none do. Time is simulated."""

from __future__ import annotations

import random

import pytest

from transformers_sgl.tokens.draft_length import MOST, DraftLength


def answered(
    lengths: DraftLength,
    acceptance: float,
    cost: float,
    tokens: int = 128,
    seed: int = 0,
    change_at: int | None = None,
    width: float = 1.0,
) -> tuple[float, int]:
    """What an answer takes, in steps of the large model, and how often the small one has run.

    From `change_at` on, every drafted token is right. A pass of the large model that reads drafts takes `width` steps.
    """
    chance = random.Random(seed)
    written, taken, num_small = 1, 0.0, 0
    lengths.note(0, 1)  # the first draft
    while written < tokens:
        number = min(lengths.next_length(written), tokens - 1 - written)
        rate = 1.0 if change_at is not None and written >= change_at else acceptance
        right = 0
        while right < number and chance.random() < rate:
            right += 1
        taken += (width if number else 1) + number * cost
        num_small += number
        if number:
            lengths.time_small(number * cost, number)
            lengths.time_large(width)
            lengths.note(right, int(right < number))
        else:
            lengths.time_step(1.0)
        written += right + 1
    return taken, num_small


@pytest.mark.parametrize("cost", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
def test_adaptive_rounds_are_nearly_as_fast_as_the_best_fixed_length(acceptance: float, cost: float) -> None:
    def mean(fixed: int | None) -> float:
        return sum(answered(DraftLength(fixed), acceptance, cost, seed=seed)[0] for seed in range(10)) / 10

    best = min(*(mean(number) for number in range(1, MOST + 1)), 127.0)
    assert mean(None) < 1.15 * best


@pytest.mark.parametrize("cost", [0.03, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("tokens", [64, 128, 512])
def test_drafts_that_are_never_right_cost_little(tokens: int, cost: float) -> None:
    taken, _ = answered(DraftLength(), 0.0, cost, tokens)
    assert taken < 1.05 * (tokens - 1)


def test_drafts_that_become_right_are_found_again() -> None:
    taken, _ = answered(DraftLength(), 0.0, 0.1, tokens=400, change_at=200)
    assert taken < 300  # 200 passes of one token each, and the rest in long rounds


def test_a_small_model_as_slow_as_the_large_one_hardly_drafts() -> None:
    _, num_small = answered(DraftLength(), 0.6, 1.0, tokens=256)
    assert num_small < 40


def test_a_fixed_length_is_kept() -> None:
    lengths = DraftLength(3)
    lengths.note(0, 50)
    assert [lengths.next_length(written) for written in range(1, 20)] == [3] * 19


@pytest.mark.parametrize("width", [1.0, 1.3, 1.6, 2.0])
@pytest.mark.parametrize("acceptance", [0.5, 0.8])
def test_passes_that_take_longer_with_drafts_are_weighed(acceptance: float, width: float) -> None:
    def mean(fixed: int | None) -> float:
        taken = (answered(DraftLength(fixed), acceptance, 0.2, seed=seed, width=width)[0] for seed in range(10))
        return sum(taken) / 10

    best = min(*(mean(number) for number in range(1, MOST + 1)), 127.0)
    assert mean(None) < min(1.05 * 127, 1.25 * best)


def measured(small: float, large: float, right: int = 30) -> DraftLength:
    """Lengths where `right` tokens were right and ten wrong, and passes took so many milliseconds."""
    lengths = DraftLength()
    lengths.note(right, 10)
    for _ in range(5):
        lengths.time_small(4 * small / 1000, 4)
        lengths.time_large(large / 1000)
    return lengths


def test_one_step_without_drafts_is_timed_where_it_could_matter() -> None:
    lengths = measured(small=3, large=20)
    assert lengths.next_length(5) == 0
    lengths.time_step(0.020)
    assert min(lengths.next_length(written) for written in range(6, 12)) > 0  # and no other


def test_no_step_is_spent_on_timing_where_rounds_pay_in_any_case() -> None:
    lengths = measured(small=1, large=20, right=95)
    assert min(lengths.next_length(written) for written in range(5, 12)) > 0


def test_a_step_is_never_thought_to_take_longer_than_a_pass_with_drafts() -> None:
    lengths = measured(small=3, large=20)
    assert lengths.width == 1.0
    lengths.time_step(0.010)
    assert lengths.width == pytest.approx(2.0)
    lengths = measured(small=3, large=20)
    lengths.time_step(0.090)
    assert lengths.width == 1.0
