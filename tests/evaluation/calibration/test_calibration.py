from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_early_exit import records_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from transformers_sgl import SGLGenerationConfig
from transformers_sgl.evaluation.calibration import (
    CalibrationReport,
    KeepAccuracy,
    LargeCallBudget,
    Promise,
    Proportion,
    Record,
    allowed_failures,
)
from transformers_sgl.evaluation.calibration import (
    report as report_module,
)
from transformers_sgl.evaluation.calibration.bounds import least_sizes
from transformers_sgl.evaluation.calibration.report import write_results
from transformers_sgl.evaluation.calibration.threshold import check_feasible, choose_threshold, split_by_image
from transformers_sgl.evaluation.checks import check_packages


def record(score: float, draft_right: bool = True, large_right: bool = True, **fields: Any) -> Record:
    return Record(draft_right, large_right, score, **fields)


# --------------------------------------------------------------------------------------------------------- statistics


def allowed_by_counting(n: int, m: int, limit: Fraction, confidence: Fraction) -> int | None:
    """The same number from the definitions, in whole numbers and fractions only."""
    risk, breaking, allowed = 1 - confidence, math.floor(limit * m) + 1, None
    for c in range(n):
        population = sum(math.comb(n, k) * limit**k * (1 - limit) ** (n - k) for k in range(c + 1))
        worst = c + breaking
        fresh = sum(
            Fraction(math.comb(worst, k) * math.comb(n + m - worst, n - k), math.comb(n + m, n)) for k in range(c + 1)
        )
        if max(population, fresh) > risk:
            break
        allowed = c
    return allowed


class TestAllowedFailures:
    @pytest.mark.parametrize("sizes", [(1, 1), (20, 20), (60, 20), (20, 60), (90, 7), (100, 100)], ids=str)
    @pytest.mark.parametrize("limit", ["0.02", "0.1", "0.8"])
    @pytest.mark.parametrize("confidence", ["0.6", "0.95"])
    def test_equals_counting(self, sizes: tuple[int, int], limit: str, confidence: str) -> None:
        expected = allowed_by_counting(*sizes, Fraction(limit), Fraction(confidence))
        assert allowed_failures(*sizes, float(limit), float(confidence)) == expected

    def test_grows_with_samples_and_limit_and_falls_with_confidence(self) -> None:
        def number(size: int = 400, limit: float = 0.1, confidence: float = 0.9) -> int:
            allowed = allowed_failures(size, size, limit, confidence)
            return -1 if allowed is None else allowed

        for name, values in {
            "size": [20, 100, 400, 1000, 4000],
            "limit": [0.01, 0.05, 0.1, 0.3, 0.9],
            "confidence": [0.999, 0.99, 0.9, 0.6, 0.2],
        }.items():
            numbers = [number(**{name: value}) for value in values]
            assert numbers == sorted(numbers)
            assert numbers[0] < numbers[-1]

    def test_a_written_fraction_is_taken_exactly(self) -> None:
        # 1 - 0.9 is a little less than a tenth in floating point, where one failure of ten would be one too many
        assert math.floor((1 - 0.9) * 10) == 0
        assert math.floor(KeepAccuracy(0.9).limit * 10) == 1

    @pytest.mark.parametrize("name", ["limit", "confidence"])
    @pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan])
    def test_what_is_no_fraction_is_refused(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=f"`{name}` is {value}: pass a fraction above 0 and below 1."):
            allowed_failures(100, 100, **{"limit": 0.1, "confidence": 0.9, name: value})


scores = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])  # few, so that most of them are tied
samples_strategy = st.lists(st.tuples(scores, st.booleans(), st.booleans(), st.booleans()), min_size=5, max_size=9)


class TestThresholds:
    @given(samples_strategy, st.data())
    @settings(max_examples=60, deadline=None)
    @pytest.mark.parametrize("promise", [KeepAccuracy(0.6), LargeCallBudget(0.6)], ids=str)
    def test_no_set_of_samples_breaks_a_promise_in_more_splits_than_it_says(
        self, promise: Promise, samples: list[tuple[float, bool, bool, bool]], data: st.DataObject
    ) -> None:
        # Every split of the samples that count, so that nothing is left to chance.
        records = [record(score, draft, large, complete=complete) for score, draft, large, complete in samples]
        records = [r for r in records if promise.counts(r)]
        confidence = data.draw(st.sampled_from([0.3, 0.5, 0.7]))
        n = data.draw(st.integers(1, max(1, len(records) - 1)))
        allowed = allowed_failures(n, len(records) - n, promise.limit, confidence) if len(records) > n else None
        if allowed is None:
            return
        broken, splits = 0, list(combinations(range(len(records)), n))
        for chosen in splits:
            part = [records[i] for i in chosen]
            fresh = [records[i] for i in range(len(records)) if i not in chosen]
            try:
                threshold = promise.threshold(part, allowed)
            except ValueError:  # too many were cut off: no threshold at all, so none that breaks it
                assert sum(not r.complete for r in part) > allowed
                continue
            assert sum(promise.fails(r, threshold) for r in part) <= allowed
            broken += sum(promise.fails(r, threshold) for r in fresh) > promise.limit * len(fresh)
        assert broken <= (1 - confidence) * len(splits) + 1e-9

    def test_keeping_accuracy_stops_just_above_the_score_that_misleads_once_too_often(self) -> None:
        wrong = [record(score, draft_right=False) for score in (0.9, 0.7, 0.3)]
        irrelevant = [record(0.95, draft_right=False, large_right=False), record(0.75), record(0.1)]
        promise = KeepAccuracy(0.9)
        assert promise.threshold([*wrong, *irrelevant], allowed=0) == 0.95
        assert promise.threshold([*wrong, *irrelevant], allowed=1) == 0.75
        assert promise.threshold([*wrong, *irrelevant], allowed=2) == 0.7
        assert promise.threshold([*wrong, *irrelevant], allowed=3) == 0.0

    @pytest.mark.parametrize("worst", [0.5, 1.0])
    def test_above_all_scores_it_is_the_next_number_that_generate_tells_apart(self, worst: float) -> None:
        threshold = KeepAccuracy(0.9).threshold([record(worst, draft_right=False), record(0.25)], allowed=0)
        assert worst < threshold < worst + 1e-6
        # a tensor in float32 is compared in float32, where the next float64 number is the same one
        assert not bool(torch.tensor([worst]) >= threshold)
        assert bool(torch.tensor([worst]) >= math.nextafter(worst, 2))
        SGLGenerationConfig(early_exit_threshold=threshold)

    def test_tied_failures_count_together(self) -> None:
        tied = [record(0.5, draft_right=False) for _ in range(3)]
        threshold = KeepAccuracy(0.9).threshold([*tied, record(0.6)], allowed=2)
        assert threshold == 0.6
        assert LargeCallBudget(0.5).threshold([*tied, record(0.6)], allowed=2) == 0.5

    def test_the_budget_takes_the_highest_threshold_there_is(self) -> None:
        records = [record(score) for score in (0.4, 0.1, 0.2, 0.3)]
        assert [LargeCallBudget(0.5).threshold(records, allowed) for allowed in range(4)] == [0.1, 0.2, 0.3, 0.4]

    def test_thresholds_fall_and_rise_with_the_failures_allowed(self) -> None:
        rng = np.random.default_rng(0)
        records = [record(float(np.float32(score)), score > rng.random()) for score in rng.random(200)]
        falling = [KeepAccuracy(0.9).threshold(records, allowed) for allowed in range(150)]
        rising = [LargeCallBudget(0.5).threshold(records, allowed) for allowed in range(150)]
        assert falling == sorted(falling, reverse=True)
        assert rising == sorted(rising)

    def test_a_draft_that_was_cut_off_is_never_returned(self) -> None:
        cut_off = [record(0.9, draft_right=False, complete=False) for _ in range(3)]
        whole = [record(score) for score in (0.5, 0.6, 0.7)]
        assert KeepAccuracy(0.9).threshold([*cut_off, *whole], allowed=0) == 0.0
        assert LargeCallBudget(0.5).threshold([*cut_off, *whole], allowed=4) == 0.6
        with pytest.raises(ValueError, match="cut off in 3 of 6 .* only 2 may: ask for a higher `max_new_tokens`"):
            LargeCallBudget(0.5).threshold([*cut_off, *whole], allowed=2)


def uniform(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    score = rng.random(size)
    return score, rng.random(size) < score


def tied(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    score, right = uniform(rng, size)
    return score.round(1), right


def useless(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.random(size), rng.random(size) < 0.7


def sure_of_itself(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.minimum(rng.beta(8, 2, size) + 0.1, 1), rng.random(size) < 0.9


@pytest.mark.parametrize("draw", [uniform, tied, useless, sure_of_itself])
@pytest.mark.parametrize("held_out", [0.5, 0.3])
@pytest.mark.parametrize("promise", [KeepAccuracy(0.9), LargeCallBudget(0.4)], ids=str)
def test_the_promise_holds_on_held_out_samples_in_95_of_100_splits(
    draw: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]], held_out: float, promise: Promise
) -> None:
    rng = np.random.default_rng(0)
    score, right = draw(rng, 300)
    large_right = rng.random(300) < 0.92
    records = [record(float(s), bool(d), bool(r)) for s, d, r in zip(score, right, large_right, strict=True)]
    splits = 120
    held = sum(_routed_right(records, promise, held_out, seed) for seed in range(splits))
    assert held >= 0.95 * splits


def _routed_right(records: Sequence[Record], promise: Promise, held_out: float, seed: int) -> bool:
    """Whether the promise held in one split, told from the routed answers and not from what the report says of it."""
    calibration_part, fresh = split_by_image(range(len(records)), held_out, seed)
    counted = [sum(promise.counts(records[i]) for i in part) for part in (calibration_part, fresh)]
    allowed = allowed_failures(*counted, promise.limit)
    assert allowed is not None
    threshold = promise.threshold([records[i] for i in calibration_part], allowed)
    exits = [records[i].decision_score >= threshold for i in fresh]
    if isinstance(promise, LargeCallBudget):
        return exits.count(False) <= promise.limit * len(fresh)
    kept = [
        r.draft_right if leaves else True
        for r, leaves in zip(map(records.__getitem__, fresh), exits, strict=True)
        if r.large_right
    ]
    return sum(kept) >= (1 - promise.limit) * len(kept)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("population", [True, False])
def test_one_failure_more_would_be_too_many(population: bool, extra: int) -> None:
    # Scores without ties, all drafts wrong: every sample that exits is a failure, which is the worst that can be.
    # A huge fresh set is the population; an equally small one is the harder of the two promises.
    n, limit, confidence, splits = 60, Fraction(1, 10), 0.9, 4000
    m = 100_000 if population else 60
    allowed = allowed_failures(n, m, limit, confidence)
    assert allowed is not None
    rng = np.random.default_rng(0)
    worst = np.sort(rng.random((splits, n)), axis=1)[:, ::-1][:, allowed + extra]
    if population:
        broken = (1 - worst) > limit  # the fraction of all scores above the threshold
    else:
        broken = (rng.random((splits, m)) > worst[:, None]).sum(axis=1) > limit * m
    error = 2 * math.sqrt(0.1 * 0.9 / splits)
    assert (broken.mean() <= 0.1 + error) if extra == 0 else (broken.mean() > 0.1 + error)


class TestSplit:
    images = tuple(f"{index // 3}.png" for index in range(300))

    @pytest.mark.parametrize("held_out", [0.2, 0.5, 0.73])
    def test_questions_about_one_image_stay_together(self, held_out: float) -> None:
        calibration_part, fresh = split_by_image(self.images, held_out, seed=3)
        assert sorted([*calibration_part, *fresh]) == list(range(300))
        assert not {self.images[i] for i in calibration_part} & {self.images[i] for i in fresh}
        assert len(fresh) == 3 * round(100 * held_out)

    def test_the_seed_decides(self) -> None:
        assert split_by_image(self.images, 0.5, seed=1) == split_by_image(self.images, 0.5, seed=1)
        assert split_by_image(self.images, 0.5, seed=1) != split_by_image(self.images, 0.5, seed=2)

    def test_every_image_is_as_likely_held_out(self) -> None:
        held = np.zeros(6)
        for seed in range(600):
            held[split_by_image(range(6), 1 / 3, seed)[1]] += 1
        assert np.abs(held / 600 - 1 / 3).max() < 0.08

    @pytest.mark.parametrize("held_out", [0.001, 0.999])
    def test_no_side_is_empty(self, held_out: float) -> None:
        assert all(split_by_image(["a", "b"], held_out, seed=0))

    def test_one_image_cannot_be_split(self) -> None:
        with pytest.raises(ValueError, match="All samples are about one image"):
            split_by_image(["a", "a"], 0.5, seed=0)


class TestCalibrate:
    @pytest.fixture
    def records(self) -> list[Record]:
        rng = np.random.default_rng(1)
        score, right = uniform(rng, 400)
        return [
            record(float(np.float32(s)), bool(d), bool(rng.random() < 0.9)) for s, d in zip(score, right, strict=True)
        ]

    @pytest.mark.parametrize("promise", [KeepAccuracy(0.9), LargeCallBudget(0.5)], ids=str)
    def test_the_report_is_what_routing_gives(self, records: list[Record], promise: Promise) -> None:
        report = choose_threshold(records, range(400), promise, seed=5)
        _, fresh = split_by_image(range(400), 0.5, seed=5)
        exits = np.array([records[i].decision_score >= report.threshold for i in fresh])
        draft = np.array([records[i].draft_right for i in fresh])
        large = np.array([records[i].large_right for i in fresh])
        assert report.routed_accuracy.value == np.where(exits, draft, large).mean()
        assert report.large_accuracy.value == large.mean()
        assert report.small_accuracy.value == draft.mean()
        assert report.large_call_rate.value == (~exits).mean()
        assert report.kept_right is not None
        assert report.kept_right.value == np.where(exits, draft, large)[large].mean()
        if isinstance(promise, KeepAccuracy):
            assert (report.num_held_out, report.held_out_failures) == (large.sum(), (exits & large & ~draft).sum())
            assert report.promise_held == (report.kept_right.value >= 0.9)
            assert report.routed_accuracy.value >= 0.9 * report.large_accuracy.value
        else:
            assert (report.num_held_out, report.held_out_failures) == (200, (~exits).sum())
            assert report.promise_held == (report.large_call_rate.value <= 0.5)
        assert report.calibration_failures <= report.allowed_failures
        assert report.num_samples == report.num_images == 400

    def test_the_curve_runs_from_the_small_model_to_the_large_one(self, records: list[Record]) -> None:
        report = choose_threshold(records, range(400), LargeCallBudget(0.5))
        first, last = report.curve[0], report.curve[-1]
        assert (first.large_call_rate, first.accuracy) == (0, report.small_accuracy.value)
        assert (last.threshold, last.large_call_rate, last.accuracy) == (None, 1, report.large_accuracy.value)
        rates = [point.large_call_rate for point in report.curve]
        assert rates == sorted(rates)
        assert 100 <= len(report.curve) <= 201
        for point in report.curve:
            rate, large, small = point.large_call_rate, report.large_accuracy.value, report.small_accuracy.value
            assert point.random_accuracy == pytest.approx(rate * large + (1 - rate) * small)
        # these scores say how likely a draft is right, so they choose better than chance
        assert max(point.accuracy - point.random_accuracy for point in report.curve) > 0.05

    def test_another_part_than_the_held_out_one_has_the_say(self, records: list[Record]) -> None:
        _, fresh = split_by_image(range(400), 0.5, seed=0)
        changed = [record(0.0, False, r.large_right) if i in fresh else r for i, r in enumerate(records)]
        promise = LargeCallBudget(0.5)
        assert (
            choose_threshold(changed, range(400), promise).threshold
            == choose_threshold(records, range(400), promise).threshold
        )
        assert not choose_threshold(changed, range(400), promise).promise_held

    @pytest.mark.parametrize(("failures", "held"), [(20, True), (21, False)])
    def test_a_promise_holds_up_to_its_limit(self, failures: int, held: bool) -> None:
        _, fresh = split_by_image(range(80), 0.5, seed=0)
        failing = set(fresh[:failures])
        records = [record(0.1 if index in failing else 0.5) for index in range(80)]
        report = choose_threshold(records, range(80), LargeCallBudget(0.5))
        assert (report.threshold, report.held_out_failures, report.num_held_out) == (0.5, failures, 40)
        assert (report.promise_held, report.breaking_failures) == (held, 21)

    def test_the_guarantee_says_what_it_takes_for_granted(self, records: list[Record]) -> None:
        alone = choose_threshold(records, range(400), LargeCallBudget(0.5)).guarantee
        assert alone == (
            "At most 50% of the questions go to the large model: with 99% confidence among all questions like these, "
            "and likewise among 200 fresh ones."
        )
        shared = choose_threshold(records, [i // 2 for i in range(400)], KeepAccuracy(0.9)).guarantee
        assert shared.startswith("At least 90% of the large model's right answers stay right: with 99% confidence")
        assert shared.endswith("(as far as 400 questions about only 200 images are independent).")

    @pytest.mark.parametrize(
        ("promise", "number", "needed", "lines"),
        [(KeepAccuracy(0.99), 40, 600, 1200), (KeepAccuracy(0.9), 40, 60, 120), (LargeCallBudget(0.05), 40, 120, 240)],
        ids=str,
    )
    def test_too_few_samples_say_how_many_it_takes(
        self, promise: Promise, number: int, needed: int, lines: int
    ) -> None:
        def attempt(number: int) -> Any:
            return choose_threshold([record(0.5)] * (2 * number), range(2 * number), promise)

        number = min(number, needed - 1)
        with pytest.raises(ValueError, match=f"There are {number} calibration and {number} held-out") as error:
            attempt(number)
        assert f"takes at least {needed} and {needed}, or about {lines} lines of data in all" in str(error.value)
        assert promise.cure in str(error.value)
        assert "a lower `confidence`" in str(error.value)
        assert attempt(needed).allowed_failures == 0
        assert allowed_failures(needed - 1, needed - 1, promise.limit) is None

    @pytest.mark.parametrize("limit", ["0.03", "0.1", "0.4"])
    @pytest.mark.parametrize("held_out", ["0.2", "0.5", "0.8"])
    def test_the_least_sizes_are_the_next_that_suffice(self, limit: str, held_out: str) -> None:
        small, large = round(10 * (1 - float(held_out))), round(10 * float(held_out))
        found = least_sizes(small, large, Fraction(limit), 0.99)
        sizes = ((n, max(1, round(n * large / small))) for n in range(small + 1, 2000))
        assert found == next(s for s in sizes if allowed_failures(*s, Fraction(limit)) is not None)

    def test_an_immense_need_is_said_at_once(self) -> None:
        with pytest.raises(ValueError, match="takes at least [0-9]{10} and [0-9]{10}"):
            check_feasible(KeepAccuracy(0.999999999), range(100))

    def test_a_large_model_that_is_never_right_promises_nothing(self) -> None:
        with pytest.raises(ValueError, match="There are 0 calibration and 0 held-out samples that the large model"):
            choose_threshold([record(0.5, large_right=False) for _ in range(40)], range(40), KeepAccuracy(0.5))

    def test_what_no_run_could_prove_is_refused_before_it(self) -> None:
        check_feasible(KeepAccuracy(0.99), range(1000))
        check_feasible(LargeCallBudget(0.5), range(40))
        with pytest.raises(
            ValueError, match="There are at most 50 calibration and 50 held-out samples that the large"
        ):
            check_feasible(KeepAccuracy(0.99), range(100))
        with pytest.raises(ValueError, match="There are 5 calibration and 5 held-out samples. To promise"):
            check_feasible(LargeCallBudget(0.2), range(10))
        with pytest.raises(ValueError, match="`held_out` is 1"):
            check_feasible(LargeCallBudget(0.5), range(40), held_out=1)

    @pytest.mark.parametrize("promise", [KeepAccuracy, LargeCallBudget])
    @pytest.mark.parametrize("value", [0, 1, 1.5, -0.5, math.nan])
    def test_a_promise_is_a_fraction(self, promise: type[Promise], value: float) -> None:
        with pytest.raises(ValueError, match=f"`{promise.name}` is {value}: pass a fraction above 0 and below 1."):
            promise(value)


def test_intervals_are_clopper_and_pearson() -> None:
    # Clopper and Pearson (1934): each end is the value under which the tail has a probability of 2.5 %
    interval = Proportion.of(7, 20)
    upper = sum(math.comb(20, k) * interval.high**k * (1 - interval.high) ** (20 - k) for k in range(8))
    lower = sum(math.comb(20, k) * interval.low**k * (1 - interval.low) ** (20 - k) for k in range(7, 21))
    assert (upper, lower) == (pytest.approx(0.025), pytest.approx(0.025))
    assert (Proportion.of(0, 9).low, Proportion.of(9, 9).high) == (0, 1)


# ------------------------------------------------------------------------------------------------------------- report


class TestResults:
    @pytest.fixture
    def report(self) -> CalibrationReport:
        records = [record(i / 128, draft_right=i > 20) for i in range(128)]
        return choose_threshold(records, range(128), LargeCallBudget(0.5), measurement={"seed": 0, "machine": "a"})

    def test_everything_is_written_and_the_pair_keeps_its_settings(
        self, tmp_path: Path, report: CalibrationReport
    ) -> None:
        own = SGLGenerationConfig(retention_ratio=0.25, max_new_tokens=7, do_sample=False, temperature=0.5)
        pair = tmp_path / "pair"
        pair.mkdir()
        (pair / "generation_config.json").write_text("old")
        written = write_results(report, tmp_path, own, pair)
        names = ["curve.png", "calibration.json", "generation_config.json", "pair/generation_config.json"]
        assert written == [tmp_path / name for name in names]
        for folder in (tmp_path, pair):
            saved = SGLGenerationConfig.from_pretrained(folder)
            assert saved.early_exit_threshold == report.threshold
            assert (saved.retention_ratio, saved.max_new_tokens, saved.temperature) == (0.25, 7, 0.5)
        assert own.early_exit_threshold is None
        found = json.loads((tmp_path / "calibration.json").read_text())
        assert found["threshold"] == report.threshold
        assert found["promise"] == {"large_call_budget": 0.5}
        assert found["large_accuracy"]["total"] == 64
        assert (found["seed"], found["machine"]) == (0, "a")
        assert len(found["curve"]) == len(report.curve)
        assert sorted(path.name for path in pair.iterdir()) == ["generation_config.json"]

    def test_the_settings_are_those_that_save_pretrained_writes(
        self, tmp_path: Path, report: CalibrationReport
    ) -> None:
        own = SGLGenerationConfig(retention_ratio=0.25, eos_token_id=3)
        write_results(report, tmp_path, own)
        own.early_exit_threshold = report.threshold
        own.save_pretrained(tmp_path / "saved")
        name = "generation_config.json"
        assert (tmp_path / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()

    @pytest.mark.parametrize("failing", ["_draw", "write_atomically"])
    def test_the_pair_is_written_last(
        self,
        tmp_path: Path,
        report: CalibrationReport,
        monkeypatch: pytest.MonkeyPatch,
        failing: str,
    ) -> None:
        pair = tmp_path / "pair"
        pair.mkdir()
        (pair / "generation_config.json").write_text("old")

        def fail(*args: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(report_module, failing, fail)
        with pytest.raises(OSError, match="no space left"):
            write_results(report, tmp_path, SGLGenerationConfig(), pair)
        assert {path.name: path.read_text() for path in pair.iterdir()} == {"generation_config.json": "old"}

    def test_the_curve_shows_both_routings_and_the_chosen_point(
        self, tmp_path: Path, report: CalibrationReport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from matplotlib.figure import Figure

        drawn = []
        savefig = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
        report_module._draw(report, tmp_path / "curve.png")
        (axes,) = drawn[0].axes
        see, chance, chosen = axes.lines
        assert np.allclose(see.get_ydata(), [100 * point.accuracy for point in report.curve])
        assert np.allclose(chance.get_ydata(), [100 * point.random_accuracy for point in report.curve])
        assert chosen.get_xdata() == [100 * report.large_call_rate.value]
        assert chosen.get_ydata() == [100 * report.routed_accuracy.value]
        assert "large model (%)" in axes.get_xlabel()
        assert "accuracy (%)" in axes.get_ylabel()
        assert Image.open(tmp_path / "curve.png").width > 600


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages("Calibration", "calibrate")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(
        ValueError, match=r"Calibration needs matplotlib and scipy .*: run `pip install 'transformers_sgl\[cal"
    ):
        check_packages("Calibration", "calibrate")
    with pytest.raises(ValueError, match=r"An evaluation needs .*: run `pip install 'transformers_sgl\[evaluate\]'`"):
        check_packages("An evaluation", "evaluate")


@pytest.mark.parametrize("data", ["easy-VQA", "scenes"])
@pytest.mark.parametrize("promise", [KeepAccuracy(0.99), LargeCallBudget(0.4)], ids=lambda promise: promise.name)
def test_thresholds_of_the_embedded_pair_keep_their_promise_on_questions_they_have_not_seen(
    data: str, promise: Promise
) -> None:
    measured = Path(__file__).parents[3] / "benchmarks" / "results" / "sgl_tiny_early_exit.json"
    records = records_of({k: np.array(v) for k, v in json.loads(measured.read_text())["answers"][data].items()})
    reports = [choose_threshold(records, range(len(records)), promise, seed=seed) for seed in range(100)]
    assert sum(report.promise_held for report in reports) >= 95
    # and the promise is not kept by calling the large model always, or never
    rates = [report.large_call_rate.value for report in reports]
    assert 0.01 < np.mean(rates) < 0.5
