"""The statistics against slow or exact counterparts, and what is reported against numbers worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transformers_sgl.evaluation.cost import Cost
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.figure import draw_figure
from transformers_sgl.evaluation.methods import METHODS
from transformers_sgl.evaluation.report import as_markdown, p_value, split_as_markdown, summarise, write_report
from transformers_sgl.evaluation.run import Result, Run, plan
from transformers_sgl.evaluation.statistics import PairedScores, at_equal_cost

Array = np.ndarray


def images(*sizes: int) -> list[str]:
    """So many questions about each image."""
    return [f"image {number}" for number, size in enumerate(sizes) for _ in range(size)]


class TestInterval:
    def test_it_is_that_of_a_slow_bootstrap(self) -> None:
        names, scores = images(1, 3, 2, 5, 1, 4, 2, 2), np.random.default_rng(1).random(20)
        by_image = [[s for n, s in zip(names, scores, strict=True) if n == name] for name in dict.fromkeys(names)]
        rng, means = np.random.default_rng(2), []
        for _ in range(20_000):
            drawn = [by_image[number] for number in rng.integers(0, len(by_image), len(by_image))]
            values = [score for of_image in drawn for score in of_image]
            means.append(sum(values) / len(values))
        expected = np.percentile(means, [2.5, 97.5])
        assert PairedScores(names).interval(scores) == pytest.approx(expected, abs=0.01)

    def test_a_known_case(self) -> None:
        # The mean of 400 independent answers, of which half are right, is nearly normal: 0.5 +- 1.96 * 0.5 / 20.
        low, high = PairedScores(images(*[1] * 400)).interval(np.arange(400) % 2.0)
        assert (low, high) == pytest.approx((0.451, 0.549), abs=0.005)

    def test_questions_of_an_image_that_agree_widen_it(self) -> None:
        right = np.repeat(np.arange(100) % 2.0, 4)
        apart = PairedScores(images(*[1] * 400)).interval(right)
        together = PairedScores(images(*[4] * 100)).interval(right)
        # Four that agree are worth one: twice as wide.
        assert together[1] - together[0] == pytest.approx(2 * (apart[1] - apart[0]), rel=0.1)

    def test_the_order_of_questions_makes_no_difference(self) -> None:
        names, scores = images(1, 3, 2, 5), np.random.default_rng(1).random(11)
        order = np.random.default_rng(3).permutation(11)
        again = PairedScores([names[i] for i in order]).interval(scores[order])
        assert again == pytest.approx(PairedScores(names).interval(scores))

    def test_where_nothing_varies_it_is_a_point(self) -> None:
        assert PairedScores(images(2, 2, 3)).interval(np.ones(7)) == pytest.approx((1, 1))
        assert PairedScores(images(4)).interval(np.array([0.0, 1, 1, 1])) == pytest.approx((0.75, 0.75))

    def test_it_covers_what_it_should(self) -> None:
        rng, covered = np.random.default_rng(0), 0
        paired = PairedScores(images(*[2] * 60))
        for _ in range(300):
            of_image = rng.random(60).repeat(2)
            low, high = paired.interval((rng.random(120) < of_image).astype(float))  # 0.5 on average
            covered += low <= 0.5 <= high
        assert covered / 300 == pytest.approx(0.95, abs=0.03)

    def test_seeds_draw_otherwise_but_alike(self) -> None:
        names, scores = images(*[2] * 30), np.random.default_rng(1).random(60)
        one, other = (PairedScores(names, seed).interval(scores) for seed in (0, 1))
        assert one != other
        assert one == pytest.approx(other, abs=0.01)
        assert PairedScores(names, 1).interval(scores) == other


class TestDifference:
    @pytest.mark.parametrize("sizes", [[1] * 9, [2, 1, 3, 1, 1, 2, 4, 1]])
    def test_the_p_value_is_that_of_all_sign_flips(self, sizes: list[int]) -> None:
        names, rng = images(*sizes), np.random.default_rng(4)
        scores, others = rng.random(len(names)), rng.random(len(names)) * 0.5
        sums = [
            sum(s - o for n, s, o in zip(names, scores, others, strict=True) if n == name)
            for name in dict.fromkeys(names)
        ]
        flipped = [
            abs(sum(sign * value for sign, value in zip(signs, sums, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(sums))
        ]
        exact = sum(value >= abs(sum(sums)) - 1e-9 for value in flipped) / len(flipped)
        found = PairedScores(names).difference(scores, others)
        assert 0.001 < exact < 0.5
        assert found.p_value == pytest.approx(exact, abs=0.015)
        assert found.mean == pytest.approx(scores.mean() - others.mean())
        assert found.low < found.mean < found.high

    def test_by_hand(self) -> None:
        # Five images, and the one is right on all of them, the other on none: 2 of 2 ** 5 flips are as far from zero.
        found = PairedScores(images(1, 1, 1, 1, 1)).difference(np.ones(5), np.zeros(5))
        assert (found.mean, found.low, found.high) == (1, 1, 1)
        assert found.p_value == pytest.approx(2 / 32, abs=0.01)

    def test_equal_runs_do_not_differ(self) -> None:
        found = PairedScores(images(2, 3)).difference(np.ones(5), np.ones(5))
        assert (found.mean, found.low, found.high, found.p_value) == (0, 0, 0, 1)

    def test_it_is_the_same_the_other_way_round(self) -> None:
        rng = np.random.default_rng(4)
        one, other, paired = rng.random(20), rng.random(20), PairedScores(images(*[2] * 10))
        forth, back = paired.difference(one, other), paired.difference(other, one)
        assert back.mean == -forth.mean
        assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low))
        assert back.p_value == forth.p_value

    def test_a_p_value_is_never_zero(self) -> None:
        found = PairedScores(images(*[1] * 200)).difference(np.ones(200), np.zeros(200))
        assert found.p_value == pytest.approx(1 / 10_001)

    def test_without_a_difference_all_p_values_are_as_likely(self) -> None:
        rng = np.random.default_rng(7)
        values = []
        for seed in range(120):
            of_image = rng.normal(size=25).repeat(2)  # what the two questions of an image have in common
            one, other = of_image + rng.normal(size=50), of_image + rng.normal(size=50)
            values.append(PairedScores(images(*[2] * 25), seed).difference(one, other).p_value)
        # The greatest distance between two distributions of 120 values that are alike is beyond this once in 1,000.
        distance = max(abs((np.array(values) <= p).mean() - p) for p in np.linspace(0, 1, 101))
        assert distance < 1.95 / math.sqrt(120)


class TestAtEqualCost:
    low, high = np.array([0.0, 0.0]), np.array([1.0, 0.5])

    @pytest.mark.parametrize(
        ("cost", "expected"),
        [(1.0, None), (2.0, [0, 0]), (2.5, [0.25, 0.125]), (4.0, [1, 0.5]), (9.0, [1, 0.5])],
    )
    def test_it_lies_on_the_line(self, cost: float, expected: list[float] | None) -> None:
        found = at_equal_cost(cost, [(4.0, self.high), (2.0, self.low)])
        assert (found is None and expected is None) or found.tolist() == expected

    def test_of_two_settings_of_one_cost_the_better_counts(self) -> None:
        for points in itertools.permutations([(2.0, self.low), (2.0, self.high), (4.0, self.low)]):
            assert at_equal_cost(2.0, list(points)).tolist() == [1, 0.5]
            assert at_equal_cost(3.0, list(points)).tolist() == [0.5, 0.25]


QUESTIONS = [  # image, kind
    Sample(Path("a"), "?", ("x",), kind="colour", image_id="a"),
    Sample(Path("a"), "?", ("x",), kind="shape", image_id="a"),
    Sample(Path("b"), "?", ("x",), kind="colour", image_id="b"),
    Sample(Path("c"), "?", ("x",), image_id="c"),
]
SCORES = {
    ("large", None): [1, 1, 1, 1],
    ("small", None): [0, 0, 1, 0],
    ("sgp", 0.35): [1, 1, 1, 0],
    ("sgl", 0.35): [1, 0, 1, 0],
    ("random", 0.35): [0, 1, 0, 0],
    ("random", 0.09): [0, 0, 0, 0],
}
SECONDS = {"large": 4.0, "small": 1.0, "sgp": 3.0, "sgl": 2.0, "random": 2.0}
FLOPS = {"large": 8e9, "small": 1e9, "sgp": 4e9, "sgl": 3e9, "random": 2e9}
FACTS = {
    "data": "things",
    "metric_name": "exact_match",
    "batch_size": 2,
    "seed": 0,
    "max_new_tokens": 8,
    "dtype": ["torch.float32"] * 2,
    "thresholds": {"sgl": [0.5]},
}


def reported(*without: str) -> tuple[dict[str, Any], dict[str, Any], list[Run]]:
    scores = {key: values for key, values in SCORES.items() if key[0] not in without}
    names = dict.fromkeys(name for name, _ in scores)
    runs = [run for run in plan({name: METHODS[name] for name in names}, [0.35, 0.09], 10) if run.key in scores]
    results = []
    for run in runs:
        for index, score in enumerate(scores[run.key]):
            exits = run.name == "sgl" and index == 2
            retention = {"large": 1.0, "small": None}.get(run.name, run.average_retention)
            results.append(
                Result(
                    sample=index,
                    method=run.name,
                    average_retention=run.average_retention,
                    answer="x",
                    score=score,
                    seconds=SECONDS[run.name] * (1 + index // 2),  # the second batch takes twice as long
                    num_tokens=2 + index,
                    retention=None if exits else retention,
                    exited_early=exits if run.name in ("sgp", "sgl") else None,
                    num_draft_tokens_accepted=index if run.name in ("sgp", "sgl") else None,
                )
            )
    costs = {run.key: Cost(int(FLOPS[run.name]), 1000) for run in runs}
    return (*summarise(results, QUESTIONS, runs, costs, FACTS), runs)


class TestSummary:
    def test_rows_by_hand(self) -> None:
        summary, _, runs = reported()
        assert [(row["method"], row["target_retention"]) for row in summary["rows"]] == [run.key for run in runs]
        rows = {(row["method"], row["target_retention"]): row for row in summary["rows"]}
        assert [rows[key]["score"] for key in SCORES] == [1, 0.25, 0.75, 0.5, 0.25, 0]
        assert rows["sgp", 0.35]["score_by_kind"] == {"colour": 1, "shape": 1}
        assert rows["sgl", 0.35]["score_by_kind"] == {"colour": 1, "shape": 0}
        assert [rows[key]["average_retention"] for key in SCORES] == pytest.approx([1, None, 0.35, 0.35, 0.35, 0.09])
        assert [rows[key]["large_call_rate"] for key in SCORES] == [1, 0, 1, 0.75, 1, 1]
        assert {row["num_tokens"] for row in summary["rows"]} == {3.5}
        accepted = [rows[key]["num_draft_tokens_accepted"] for key in SCORES]
        assert accepted == [None, None, 1.5, 1.5, None, None]
        assert [rows[key]["gigaflops"] for key in SCORES] == [8, 1, 4, 3, 2, 2]
        assert "vs_large" not in rows["large", None]
        versus = rows["sgl", 0.35]["vs_large"]
        assert versus["mean"] == -0.5
        # Images a, b, c: sums of differences -1, 0, -1. Of four flips that matter two are as far from zero.
        assert versus["p_value"] == pytest.approx(0.5, abs=0.02)
        assert summary["num_samples"] == 4
        assert summary["num_images"] == 3

    def test_comparisons_by_hand(self) -> None:
        summary, _, _ = reported()
        found = [(c["method"], c["other"], c["target_retention"], c["mean"]) for c in summary["comparisons"]]
        assert found == [("sgp", "random", 0.35, 0.5), ("sgl", "random", 0.35, 0.25)]
        # At 4 operations random lies a third of the way from its own 2 to the whole model's 8. Its two settings cost
        # the same here, so the better one counts.
        equal = {(c["method"], c["other"]): c for c in summary["at_equal_operations"]}
        assert set(equal) == {("sgp", "random"), ("sgl", "random")}
        assert equal["sgp", "random"]["other_score"] == pytest.approx(0.25 * 2 / 3 + 1 / 3)
        assert equal["sgp", "random"]["mean"] == pytest.approx(0.75 - 0.5)

    def test_what_prunes_the_vision_tower_too_is_compared_with_what_does_not(self) -> None:
        scores = {**SCORES, ("sgp-vision", 0.35): [1, 0, 1, 0], ("sgl-vision", 0.35): [1, 1, 1, 1]}
        names = dict.fromkeys(name for name, _ in scores)
        runs = [run for run in plan({name: METHODS[name] for name in names}, [0.35, 0.09], 10) if run.key in scores]
        results = [
            Result(index, *run.key, "x", score, 1.0, 2, 0.5)
            for run in runs
            for index, score in enumerate(scores[run.key])
        ]
        costs = {run.key: Cost(100, None, 30, 50) for run in runs}
        summary, speed = summarise(results, QUESTIONS, runs, costs, FACTS)
        pairs = {(c["method"], c["other"]): c["mean"] for c in summary["comparisons"]}
        expected = {("sgp-vision", "sgp"): -0.25, ("sgl-vision", "sgl"): 0.5}
        expected |= {("sgp-vision", "random"): 0.25, ("sgl-vision", "random"): 0.75}
        assert pairs == {**expected, ("sgp", "random"): 0.5, ("sgl", "random"): 0.25}
        for found in (summary["at_equal_operations"], speed["at_equal_time"]):
            assert {(c["method"], c["other"]) for c in found} == set(pairs)
        assert {(row["vision_gigaflops"], row["decoder_gigaflops"]) for row in summary["rows"]} == {(3e-8, 5e-8)}

    def test_speed_by_hand(self) -> None:
        _, speed, runs = reported()
        assert [row["seconds"] for row in speed["rows"]] == [1.5 * SECONDS[run.name] for run in runs]
        assert [row["relative_to_large"] for row in speed["rows"]] == [SECONDS[run.name] / 4 for run in runs]
        assert all(row["relative_quartiles"] == [row["relative_to_large"]] * 2 for row in speed["rows"])
        assert {row["peak_memory_bytes"] for row in speed["rows"]} == {1000}
        equal = {(c["method"], c["other"]): c for c in speed["at_equal_time"]}
        # In 3 seconds of 4, random with its 2 seconds is half way to the whole model: (0.25 + 1) / 2.
        assert equal["sgp", "random"]["other_score"] == pytest.approx(0.625)
        assert equal["sgl", "random"]["other_score"] == pytest.approx(0.25)
        assert set(speed) >= {"machine", "versions", "seed", "date", "num_threads"}

    def test_what_took_a_slow_batch_by_itself_does_not_count_much(self) -> None:
        # Medians of ratios: a batch that the machine disturbed changes nothing as long as most were undisturbed.
        samples = [Sample(Path("a"), "?", ("x",), image_id=str(index)) for index in range(5)]
        runs = plan({"large": METHODS["large"], "random": METHODS["random"]}, [0.35], 10)
        results = [
            Result(index, *run.key, "x", 1.0, seconds * (100 if index == 2 and run.name == "random" else 1), 2, 1.0)
            for run, seconds in zip(runs, (2.0, 1.0), strict=True)
            for index in range(5)
        ]
        costs = {run.key: Cost(1, None) for run in runs}
        _, speed = summarise(results, samples, runs, costs, {**FACTS, "batch_size": 1})
        assert [row["relative_to_large"] for row in speed["rows"]] == [1, 0.5]

    def test_the_large_model_may_be_missing(self, tmp_path: Path) -> None:
        summary, speed, _ = reported("large")
        assert not any("vs_large" in row for row in summary["rows"])
        assert speed["at_equal_time"] == []
        assert {c["other"] for c in summary["at_equal_operations"]} == {"random"}
        write_report(summary, speed, tmp_path)
        assert Image.open(tmp_path / "figure.png").size[0] > 500
        assert "| random | 35 % |" in (tmp_path / "table.md").read_text()

    def test_nothing_but_a_model_alone(self, tmp_path: Path) -> None:
        summary, speed, _ = reported("sgp", "sgl", "random", "small")
        assert summary["comparisons"] == summary["at_equal_operations"] == []
        write_report(summary, speed, tmp_path)

    def test_where_every_draft_is_returned_there_is_no_retention(self) -> None:
        runs = plan({"sgl": METHODS["sgl"]}, [0.35], 10)
        results = [Result(index, "sgl", 0.35, "x", 1.0, 1.0, 2, exited_early=True) for index in range(4)]
        costs = {run.key: Cost(1, None) for run in runs}
        (row,) = summarise(results, QUESTIONS, runs, costs, FACTS)[0]["rows"]
        assert (row["average_retention"], row["large_call_rate"]) == (0, 0)


class TestBySmallAnswer:
    """The small model is right on the third question alone, which is the one about image b."""

    def test_rows_by_hand(self) -> None:
        parts = reported()[0]["by_small_answer"]
        assert {name: part["num_samples"] for name, part in parts.items()} == {"right": 1, "wrong": 3}
        rows = {
            name: {(row["method"], row["target_retention"]): row for row in part["rows"]}
            for name, part in parts.items()
        }
        others = [key for key in SCORES if key[0] != "small"]
        assert list(rows["right"]) == list(rows["wrong"]) == others
        assert [rows["right"][key]["score"] for key in others] == [1, 1, 1, 0, 0]
        assert [rows["right"][key]["interval"] for key in others] == [[1, 1], [1, 1], [1, 1], [0, 0], [0, 0]]
        assert [rows["wrong"][key]["score"] for key in others] == pytest.approx([1, 2 / 3, 1 / 3, 1 / 3, 0])
        # Images a (both right for sgp) and c (wrong), each drawn twice, or one of each: 1, 0 or 2 / 3.
        assert rows["wrong"]["sgp", 0.35]["interval"] == [0, 1]
        assert rows["wrong"]["large", None]["interval"] == [1, 1]
        assert "vs_large" not in rows["wrong"]["large", None]
        versus = rows["wrong"]["sgl", 0.35]["vs_large"]
        assert versus["mean"] == pytest.approx(-2 / 3)
        # Sums of differences by image: -1 and -1; two of four flips are as far from zero.
        assert versus["p_value"] == pytest.approx(0.5, abs=0.02)
        found = [(c["method"], c["other"], c["mean"]) for c in parts["wrong"]["comparisons"]]
        assert found == [("sgp", "random", pytest.approx(1 / 3)), ("sgl", "random", 0)]
        assert [c["mean"] for c in parts["right"]["comparisons"]] == [1, 1]

    def test_the_intervals_are_those_of_these_questions_alone(self) -> None:
        rng = np.random.default_rng(0)
        names, scores, chosen = images(*[2] * 30), rng.random(60), rng.random(60) < 0.4
        alone = [name for name, is_chosen in zip(names, chosen, strict=True) if is_chosen]
        assert PairedScores(names, 5).among(chosen).interval(scores[chosen]) == PairedScores(alone, 5).interval(
            scores[chosen]
        )

    def test_drafts_stand_for_the_small_model_where_it_was_not_asked_alone(self) -> None:
        def summary(drafts: list[float | None]) -> Any:
            runs = plan({"sgp": METHODS["sgp"]}, [0.35], 10)
            results = [
                Result(index, *runs[0].key, "x", score, 1.0, 2, 0.35, draft_score=draft)
                for index, (score, draft) in enumerate(zip([1, 1, 0, 0], drafts, strict=True))
            ]
            return summarise(results, QUESTIONS, runs, {runs[0].key: Cost(1, None)}, FACTS)[0]

        parts = summary([1.0, 0.5, 0.49, 1.0])["by_small_answer"]
        assert [(part["num_samples"], part["rows"][0]["score"]) for part in parts.values()] == [(3, 2 / 3), (1, 0)]
        assert list(summary([1.0] * 4)["by_small_answer"]) == ["right"]
        assert summary([1.0, 1.0, None, 1.0])["by_small_answer"] is None
        assert split_as_markdown(summary([None] * 4)) == ""

    def test_as_markdown(self) -> None:
        lines = split_as_markdown(reported()[0]).splitlines()
        assert lines[0] == (
            "| method | target retention | score where it is right | difference to large | score where it is wrong | "
            "difference to large |"
        )
        assert lines[2] == "| large |  | 100.0 [100.0, 100.0] |  | 100.0 [100.0, 100.0] |  |"
        assert lines[3] == (
            "| sgp | 35 % | 100.0 [100.0, 100.0] | +0.0 [+0.0, +0.0] | 66.7 [0.0, 100.0] | -33.3 [-100.0, +0.0] |"
        )
        assert lines[-1] == (
            "The small model's answer is right on 1 and wrong on 3 questions; 95 % intervals in brackets."
        )
        assert len(lines) == 2 + len(SCORES) - 1 + 2


class TestTable:
    def test_as_markdown(self) -> None:
        summary, speed, _ = reported()
        lines = as_markdown(summary, speed).splitlines()
        assert len(lines) == 2 + len(SCORES)
        assert {line.count("|") for line in lines} == {10}
        assert lines[1] == "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        cells = {line.split(" | ")[0].removeprefix("| "): line.removesuffix(" |").split(" | ") for line in lines[2:]}
        assert cells["large"][1:] == ["100 %", "100.0 [100.0, 100.0]", "", "", "100 %", "8", "1.00", "0.00"]
        assert cells["small"][1] == ""
        assert cells["small"][5:] == ["0 %", "1", "0.25", "0.00"]
        sgp = cells["sgp"]
        assert sgp[1] == "35 %"
        assert sgp[2].startswith("75.0 [")
        assert sgp[3].startswith("-25.0 [")
        assert sgp[5:] == ["100 %", "4", "0.75", "0.00"]

    @pytest.mark.parametrize(("value", "text"), [(0.0001, "< 0.001"), (0.00149, "0.0015"), (0.25, "0.25"), (1.0, "1")])
    def test_p_values(self, value: float, text: str) -> None:
        assert p_value(value) == text


class TestFigure:
    @pytest.mark.parametrize("without", [(), ("large",), ("small",)])
    def test_axes_legend_and_limits(self, tmp_path: Path, without: tuple[str, ...]) -> None:
        summary, speed, _ = reported(*without)
        figure = draw_figure(summary, speed, tmp_path / "figure.png")
        time, retention = figure.axes
        unit = " for a question (s)" if "large" in without else ", relative to the large model alone"
        assert time.get_xlabel() == f"end-to-end time{unit}"
        assert retention.get_xlabel() == "average retention of visual tokens (%)"
        for axes in figure.axes:
            assert axes.get_ylabel() == "exact match (%)"
            assert all(map(math.isfinite, (*axes.get_xlim(), *axes.get_ylim())))
            assert axes.get_ylim()[0] < 0 < 75 < axes.get_ylim()[1]
        assert time.get_xlim()[0] == 0
        assert retention.get_xlim() == (0, 100)
        names = {run if target else f"{run} alone" for run, target in SCORES if run not in without}
        (legend,) = figure.legends
        assert sorted(text.get_text() for text in legend.get_texts()) == sorted(names)
        assert "things, 4 questions; bars: 95 % intervals" in time.get_title()

    def test_points_stand_where_the_numbers_say(self, tmp_path: Path) -> None:
        summary, speed, _ = reported()
        time, retention = draw_figure(summary, speed, tmp_path / "figure.png").axes
        drawn = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in time.containers}
        assert drawn["random"] == [[0.5, 25], [0.5, 0]]
        assert drawn["sgp"] == [[0.75, 75]]
        bars = next(bars for bars in retention.containers if bars.lines[0].get_xydata().tolist() == [[35, 75]])
        (low, high) = bars.lines[2][0].get_segments()[0][:, 1]
        row = next(row for row in summary["rows"] if row["method"] == "sgp")
        assert (low, high) == pytest.approx([100 * end for end in row["interval"]])

    def test_every_method_looks_different(self, tmp_path: Path) -> None:
        names = [name for name, method in METHODS.items() if method.prunes]
        runs = plan({name: METHODS[name] for name in names}, [0.35], 10)
        results = [Result(index, name, 0.35, "x", 1.0, 1.0, 2, 0.35) for name in names for index in range(4)]
        costs = {run.key: Cost(1, None) for run in runs}
        figure = draw_figure(*summarise(results, QUESTIONS, runs, costs, FACTS), tmp_path / "figure.png")
        looks = [(bars.lines[0].get_color(), bars.lines[0].get_marker()) for bars in figure.axes[0].containers]
        assert len(set(looks)) == len(looks) == len(names)
        # The legend stands below the axes, not on them.
        figure.canvas.draw()
        (legend,) = figure.legends
        assert legend.get_window_extent().y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes)
        assert legend.get_window_extent().x0 >= 0
        assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_what_is_written(tmp_path: Path) -> None:
    summary, speed, _ = reported()
    files = write_report(summary, speed, tmp_path)
    names = ["summary.json", "speed.json", "table.md", "by_small_answer.md", "figure.png"]
    assert [file.name for file in files] == names
    assert files[3].read_text() == split_as_markdown(summary) + "\n"
    assert json.loads(files[0].read_text()) == summary
    assert json.loads(files[1].read_text()) == speed
    assert files[2].read_text() == as_markdown(summary, speed) + "\n"
    assert "NaN" not in files[0].read_text() + files[1].read_text()
    before = files[0].read_bytes()
    write_report(*reported()[:2], tmp_path)
    assert files[0].read_bytes() == before
