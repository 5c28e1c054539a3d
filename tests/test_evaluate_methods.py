"""The tables that compare methods on the embedded pair."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluate_methods
import pytest
from joined_evaluations import Records, joined, relative_operations, report, versus_large
from method_tables import (
    NAMES,
    additions_table,
    by_small_answer_table,
    guides_table,
    losses_table,
    methods_table,
    metrics_table,
    score_cell,
)
from method_verdicts import claims_table, every_verdict, summary_table
from PIL import Image

from transformers_sgl.evaluation.cost import Cost
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import METHODS
from transformers_sgl.evaluation.metrics import METRICS
from transformers_sgl.evaluation.run import Result

SCALED = {"vision": 6.0, "decoder": 4.0, "small": 1.0, "text": 0.1}


def row(method: str, target: float | None, score: float, reached: float | None = None) -> dict[str, Any]:
    return {
        "method": method,
        "target_retention": target,
        "score": score,
        "interval": [score - 0.01, score + 0.01],
        "average_retention": target if reached is None else reached,
        "large_call_rate": 0.25 if method == "sgl" else 1.0,
        "gigaflops": 2.0,
    }


def difference(method: str, other: str, target: float, mean: float, p_value: float) -> dict[str, Any]:
    names = {"method": method, "other": other, "target_retention": target}
    return {**names, "mean": mean, "low": mean - 0.01, "high": mean + 0.01, "p_value": p_value}


def evaluation() -> dict[str, Any]:
    pruned = [(name, target) for name in ("sgp", "sgl", "random") for target in (0.64, 0.35, 0.09)]
    rows = [row("large", None, 0.9), *(row(name, target, 0.8) for name, target in pruned)]
    at_equal_time = [difference("sgp", "random", 0.64, -0.02, 0.01), difference("sgl", "random", 0.64, 0.04, 0.3)]
    return {
        "summary": {
            "rows": rows,
            "num_samples": 1000,
            "num_images": 100,
            "metric": "exact_match",
            "batch_size": 8,
            "thresholds": {"sgl": [0.5, 0.6, 0.7]},
            "comparisons": [
                difference("sgp", "random", 0.64, 0.1, 0.001),
                difference("sgl", "random", 0.64, 0.2, 0.1),
            ],
            "at_equal_operations": [],
        },
        "speed": {"rows": [{"relative_to_large": 0.5} for _ in rows], "at_equal_time": at_equal_time},
        "scaled": {
            "operations": {"vision": 84e12, "decoder": 72e12, "small": 11e12},
            "rows": [{"relative_to_large": 0.25} for _ in rows],
            "at_equal_operations": [difference("sgp", "random", 0.64, 0.05, 0.01)],
        },
        "versus_small": [difference("sgp", "", 0.64, 0.02, 0.2)],
    }


def test_every_row_has_a_name_and_is_a_method_of_the_package() -> None:
    shown = {*evaluate_methods.METHODS, *evaluate_methods.GUIDES}
    assert shown == set(NAMES)
    assert shown <= set(METHODS)  # a method that is new has no figures yet


def test_a_method_that_does_not_prune_has_one_score_and_the_others_one_for_each_retention() -> None:
    table = methods_table(evaluation())
    assert table["columns"][1:4] == ["64%", "35%", "9%"]
    assert table["rows"][0] == ["large model alone", "90.0 [89.0, 91.0]", "", "", "2", "0.50", "0.25"]
    costs = ["2 / 2 / 2", "0.50 / 0.50 / 0.50", "0.25 / 0.25 / 0.25"]
    assert table["rows"][1][1:] == ["80.0 [79.0, 81.0]"] * 3 + costs
    assert "`sgl` from 0.500, 0.600, 0.700 on, and calls the large model for 25 %, 25 %, 25 %" in table["caption"]
    assert "(vision encoder 84, decoder 72, small model 11 TFLOP)" in table["caption"]
    without = evaluation()
    without["summary"]["thresholds"] = {}
    assert "Early exit" not in methods_table(without)["caption"]
    assert table["columns"][-1] == "26B/2B"


def test_a_retention_that_was_missed_is_told() -> None:
    assert score_cell(row("fastv", 0.09, 0.5, reached=0.17)) == "50.0 [49.0, 51.0] (17%)"
    assert score_cell(row("fastv", 0.09, 0.5, reached=0.1)) == "50.0 [49.0, 51.0]"


def test_what_a_method_adds_is_told_against_the_one_without_it() -> None:
    found = evaluation()
    found["summary"]["comparisons"] += [
        difference("sgp-first", "sgp", 0.09, 0.02, 0.01),
        difference("sgp-first", "random", 0.35, 0.5, 0.01),
        difference("unsure", "sgp", 0.64, -0.01, 0.2),
    ]
    table = additions_table({"scenes": found})
    assert table["columns"] == ["data", "method", "minus", "64%", "35%", "9%"]
    assert table["rows"] == [
        ["scenes", "`sgp-first`", "`sgp`", "-", "-", "**+2.0 [+1.0, +3.0]**"],
        ["scenes", "`unsure`", "`sgp`", "-1.0 [-2.0, +0.0]", "-", "-"],
    ]


def test_guides_are_compared_side_by_side() -> None:
    names = evaluate_methods.GUIDES[1:]
    rows = [row(name, target, 0.8) for name in names for target in (0.64, 0.35, 0.09)]
    compared = [difference("sgp", "oracle", 0.09, -0.1, 0.04), difference("sgp", "sgp-last", 0.09, 0.1, 0.5)]
    table = guides_table({"scenes": {"rows": rows, "comparisons": compared, "num_samples": 9, "metric": "anls"}})
    assert "Percent (scenes: ANLS) on 9 questions" in table["caption"]
    assert table["rows"][0][0] == "all layers, prompt and generated tokens"
    assert len(table["rows"]) == len(names)
    assert "0.04 (oracle" in table["caption"]
    assert "last" not in table["caption"]


# ------------------------------------------------------------------------------------ several evaluations put together

SAMPLES = [Sample(Image.new("RGB", (8, 8)), "?", ("x",), image_id=str(number)) for number in range(4)]


def records(seconds_of_large: float, scores: dict[tuple[str, float | None], list[float]], **facts: Any) -> Records:
    """An evaluation in batches of two, in which every method but the large model takes half of its time."""
    results = {
        run: {
            place: Result(place, *run, "x", score, seconds_of_large / (1 if run[0] == "large" else 2), 2, 0.5)
            for place, score in enumerate(of_run)
        }
        for run, of_run in scores.items()
    }
    costs = {run: Cost(100, None, 40, 40) for run in scores}
    known = {"data": "things", "metric_name": "exact_match", "batch_size": 2, "seed": 0, "max_new_tokens": 8}
    known |= {"num_samples": 4, "dtype": [], "data_sha256": "a", "weights": "b", "thresholds": {}}
    return Records(results, costs, {**known, **facts})


LARGE, SMALL, SGP, VISION = ("large", None), ("small", None), ("sgp", 0.35), ("sgp-vision", 0.35)


def test_evaluations_at_other_speeds_are_told_relative_to_the_large_model() -> None:
    fast = records(1.0, {LARGE: [1, 1, 1, 1], SMALL: [0, 0, 0, 1], SGP: [1, 0, 1, 0]}, thresholds={"sgl": [0.5]})
    slow = records(10.0, {LARGE: [1, 1, 1, 1], VISION: [1, 1, 1, 0]}, thresholds={"sgl-vision": [0.7]})
    whole = joined([fast, slow])
    assert list(whole.results) == [LARGE, SMALL, SGP, VISION]
    assert [result.seconds for result in whole.results[VISION].values()] == [0.5] * 4
    assert whole.facts["thresholds"] == {"sgl": [0.5], "sgl-vision": [0.7]}
    found = report(whole, SAMPLES, ["large", "small", "sgp-vision", "sgp"], SCALED)
    assert [row["method"] for row in found["summary"]["rows"]] == ["large", "small", "sgp-vision", "sgp"]
    assert [row["relative_to_large"] for row in found["speed"]["rows"]] == [1, 0.5, 0.5, 0.5]
    (compared,) = found["summary"]["comparisons"]
    assert (compared["method"], compared["other"], compared["mean"]) == ("sgp-vision", "sgp", 0.25)
    versus = {row["method"]: row["mean"] for row in found["versus_small"]}
    assert versus == {"sgp": 0.25, "sgp-vision": 0.5}


def test_what_one_of_them_has_not_come_to_is_left_out() -> None:
    first = records(1.0, {LARGE: [1, 1, 1, 1], SMALL: [0, 0, 0, 0], SGP: [1, 0, 1, 0]})
    whole = joined([first, records(2.0, {LARGE: [1, 1], VISION: [0, 1]})])
    assert whole.answered == [0, 1]
    found = report(whole, SAMPLES[:2], ["large", "small", "sgp", "sgp-vision"], SCALED)
    assert [row["score"] for row in found["summary"]["rows"]] == [1, 0, 0.5, 0.5]


def test_what_does_not_belong_together_is_refused() -> None:
    first = records(1.0, {LARGE: [1, 1]})
    with pytest.raises(ValueError, match="they differ in data_sha256, weights: evaluate the same"):
        joined([first, records(1.0, {LARGE: [1, 1]}, data_sha256="c", weights="d")])
    with pytest.raises(ValueError, match="they differ in the large model"):
        joined([first, records(1.0, {VISION: [1, 1]})])


def test_operations_on_other_proportions_by_hand() -> None:
    costs = {
        LARGE: Cost(1000, None, 200, 800),
        SMALL: Cost(300, None, 0, 0),
        SGP: Cost(
            200 + 400 + 330, None, 200, 400
        ),  # the small model takes a tenth more, and half of the decoder is left
        VISION: Cost(50 + 200 + 300, None, 50, 200),
    }
    # All questions, those that were counted, calls: half as many were read again as among the counted ones.
    retained = {LARGE: (1.0, 1.0, 1.0), SMALL: (0.0, 0.0, 0.0), SGP: (0.5, 0.5, 1.0), VISION: (0.2, 0.4, 0.5)}
    found = relative_operations(costs, retained, SCALED)
    vision = (6 * 0.25 / 2 + 4 * (0.1 * 0.5 + 0.9 * 0.2) + 1) / 10
    assert found == pytest.approx({LARGE: 1, SMALL: 0.1, SGP: (6 + 4 * 0.55 + 1.1) / 10, VISION: vision})


def test_the_preset_has_one_score_and_no_retention() -> None:
    found = evaluation()
    found["summary"]["rows"].append(row("confirmed", None, 0.9, reached=0.42))
    found["speed"]["rows"].append({"relative_to_large": 0.7})
    found["scaled"]["rows"].append({"relative_to_large": 0.45})
    assert methods_table(found)["rows"][-1] == [
        "**confirmed** (`confirmed`)",
        "90.0 [89.0, 91.0] (42%)",
        "",
        "",
        "2",
        "0.70",
        "0.45",
    ]
    loss = {
        "method": "confirmed",
        "target_retention": None,
        "score": 0.9,
        "large_score": 0.91,
        **difference("", "", 0, -0.01, 0.2),
    }
    loss |= {"method": "confirmed", "target_retention": None}
    found["versus_large"] = [{"num_samples": 1200, "rows": [loss]}]
    found["versus_large"].append({"num_samples": 1000, "rows": [difference("sgp", "", 0.35, -0.03, 0.01)]})
    assert losses_table({"scenes": found})["rows"] == [
        ["scenes", "**guided** (`sgp`)", "-", "**-3.0 [-4.0, -2.0]**", "-"],
        ["scenes", "**confirmed** (`confirmed`)", "-1.0 [-2.0, +0.0]", "", ""],
    ]


def test_losses_are_split_by_the_small_model_s_answer() -> None:
    loss = {"mean": -0.02, "low": -0.03, "high": -0.01, "p_value": 0.01}
    rows = [
        {"method": "large", "target_retention": None},
        {"method": "sgp", "target_retention": 0.35, "vs_large": loss},
        {"method": "random", "target_retention": 0.35, "vs_large": loss},
    ]
    summary = {"rows": rows, "by_small_answer": {"right": {"num_samples": 1500, "rows": rows}}}
    table = by_small_answer_table({"scenes": {"summary": summary}})
    assert table["columns"][-1] == "35%"
    assert table["rows"] == [["scenes", "right", "1,500", "**guided** (`sgp`)", "**-2.0 [-3.0, -1.0]**"]]


def test_the_loss_is_measured_on_all_that_was_answered() -> None:
    group = records(1.0, {LARGE: [1, 1, 1, 0], VISION: [1, 0, 1, 0]})
    found = versus_large(group, SAMPLES)
    assert found["num_samples"] == 4
    assert [(each["method"], each["mean"], each["large_score"]) for each in found["rows"]] == [
        ("sgp-vision", -0.25, 0.75)
    ]


def few_tokens(*means: float) -> dict[str, Any]:
    """Guided pruning beside two others: how far it is ahead of DivPrune and CDPruner at 20, 9 and 5 %."""
    targets = (0.2, 0.09, 0.05)
    names = [(other, target) for other in ("divprune", "cdpruner") for target in targets]
    compared = [
        difference("sgp", other, target, mean, 0.01 if mean else 0.5)
        for (other, target), mean in zip(names, means, strict=True)
    ]
    rows = [row(name, target, 0.8) for name in ("sgp", "divprune", "cdpruner") for target in targets]
    return {
        "summary": {"rows": rows, "comparisons": compared, "at_equal_operations": compared[:1]},
        "speed": {"at_equal_time": []},
        "scaled": {"at_equal_operations": compared[1:2]},
        "versus_small": [],
    }


FEW = {
    "scenes": few_tokens(-0.1, 0.1, 0.2, 0.0, 0.1, 0.2),
    "reading": few_tokens(-0.2, 0.0, 0.3, 0.1, 0.1, 0.1),
    "easy-VQA": few_tokens(0.0, 0.1, 0.0, 0.0, -0.1, 0.0),
}


def test_a_verdict_has_the_difference_and_its_interval_at_equal_retention_and_costs() -> None:
    found = every_verdict(FEW)
    assert len(found) == 3 * 3 * 2
    first = found[0]
    assert [first[name] for name in ("data", "method", "target_retention", "other")] == [
        "scenes",
        "sgp",
        0.2,
        "divprune",
    ]
    assert (first["equal_retention"]["mean"], first["equal_retention"]["low"]) == (-0.1, pytest.approx(-0.11))
    assert first["equal_operations"]["mean"] == -0.1
    assert (first["equal_time"], first["equal_scaled"]) == (None, None)


def test_the_summary_counts_and_names_where_it_is_behind() -> None:
    rows = {row[1]: row[2:] for row in summary_table(FEW, "26B/2B")["rows"]}
    assert rows["DivPrune"] == [
        "ahead 4; level 3; behind 2 (scenes 20%, reading 20%)",
        "level 1; behind 2 (scenes 20%, reading 20%)",
        "-",
        "ahead 2; level 1",
    ]
    assert rows["CDPruner"][0] == "ahead 5; level 3; behind 1 (easy-VQA 9%)"
    assert summary_table(FEW, "26B/2B", ["sgl"])["rows"] == []


def test_what_is_claimed_of_few_tokens_is_listed() -> None:
    table = claims_table(FEW)
    assert table["columns"] == [
        "method",
        "behind",
        "ahead of DivPrune at 9%",
        "ahead of DivPrune at 5%",
        "ahead of CDPruner at 9%",
        "ahead of CDPruner at 5%",
    ]
    assert table["rows"] == [
        [
            "`sgp`",
            "DivPrune (scenes 20%, reading 20%); CDPruner (easy-VQA 9%)",
            "scenes, easy-VQA of 3",
            "scenes, reading of 3",
            "scenes, reading of 3",
            "scenes, reading of 3",
        ]
    ]
    assert claims_table({"scenes": few_tokens(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)})["rows"] == [
        ["`sgp`", "nobody", *["none of 1"] * 4]
    ]


def test_the_same_answers_are_scored_by_every_metric() -> None:
    first = records(1.0, {LARGE: [1, 1, 1, 1], SMALL: [0, 0, 0, 0], SGP: [1, 0, 1, 0]})
    answers = {0: "x", 1: "wrong", 2: "x", 3: "xx"}
    of_sgp = {place: replace(result, answer=answers[place]) for place, result in first.results[SGP].items()}
    first.results[SGP].update(of_sgp)
    found = report(first, SAMPLES, ["large", "small", "sgp"], SCALED, ["exact_match", "anls"])
    by_metric = {name: [each["score"] for each in rows] for name, rows in found["metrics"].items()}
    assert by_metric == {"exact_match": [1, 1, 0.5], "anls": [1, 1, pytest.approx((1 + 0 + 1 + 0.5) / 4)]}
    table = metrics_table(found, "pages")
    assert table["rows"][-2:] == [
        ["**guided** (`sgp`)", "exact match", "50.0"],
        ["**guided** (`sgp`)", "anls", "62.5"],
    ]


def test_groups_make_up_the_table_and_share_the_large_model() -> None:
    groups = evaluate_methods.GROUPS
    assert {name for group in groups.values() for name in group} == set(evaluate_methods.METHODS)
    assert all(group[0] == "large" for group in groups.values())
    others = [name for group in groups.values() for name in group if name != "large"]
    assert len(others) == len(set(others))
    assert evaluate_methods.RETENTIONS == (0.64, 0.35, 0.20, 0.09, 0.05)
    assert {each.pair for each in evaluate_methods.DATA.values()} == {"sgl-tiny", "sgl-tiny-reading"}
    assert {metric for each in evaluate_methods.DATA.values() for metric in each.metrics} <= set(METRICS)


def test_a_data_set_is_evaluated_and_told_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_methods, "GROUPS", {"baselines": ["large", "small", "sgp", "random"]})
    monkeypatch.setattr(evaluate_methods, "METHODS", ["large", "small", "sgp", "random"])
    monkeypatch.setattr(evaluate_methods, "RETENTIONS", (0.05,))
    monkeypatch.setattr(evaluate_methods, "operations_of_parts", lambda: {**SCALED})
    command = f"x --work {tmp_path / 'work'} --output {tmp_path} --figures {tmp_path} --limit 2 --batch-size 2"
    monkeypatch.setattr("sys.argv", [*command.split(), "--data", "scenes", "--only", "baselines"])
    evaluate_methods.main()
    written = json.loads((tmp_path / "sgl_tiny_methods.json").read_text())
    assert list(written["evaluations"]) == ["scenes"]
    assert written["tables"]["methods-scenes"]["columns"][:2] == ["method", "5%"]
    assert [row[0] for row in written["tables"]["methods-claims"]["rows"]] == ["`sgp`"]
    assert {each["other"] for each in written["verdicts"]} == {"random"}
    summary = written["evaluations"]["scenes"]["summary"]
    assert summary["rows"]
    assert "comparisons" not in summary  # the verdicts have them
    assert (tmp_path / "methods-scenes.png").exists()
    assert not (tmp_path / "methods-reading.png").exists()

    monkeypatch.setattr("sys.argv", [*command.split(), "--data", "scenes", "--only", "tables"])
    evaluate_methods.main()
    assert json.loads((tmp_path / "sgl_tiny_methods.json").read_text()) == written
