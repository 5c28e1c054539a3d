"""The tables that compare methods on the embedded pair."""

from typing import Any

import evaluate_methods
from evaluate_methods import comparisons_table, guides_table, methods_table, score_cell

from transformers_sgl.evaluation.methods import METHODS


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
            "batch_size": 8,
            "thresholds": [0.5, 0.6, 0.7],
            "comparisons": [
                difference("sgp", "random", 0.64, 0.1, 0.001),
                difference("sgl", "random", 0.64, 0.2, 0.1),
            ],
            "at_equal_operations": [],
        },
        "speed": {"rows": [{"relative_to_large": 0.5} for _ in rows], "at_equal_time": at_equal_time},
    }


def test_every_row_has_a_name_and_is_a_method_of_the_package() -> None:
    shown = {*evaluate_methods.METHODS, *evaluate_methods.GUIDES}
    assert shown == set(evaluate_methods.NAMES)
    assert shown <= set(METHODS)  # a method that is new has no figures yet


def test_a_method_that_does_not_prune_has_one_score_and_the_others_one_for_each_retention() -> None:
    table = methods_table(evaluation())
    assert table["columns"][1:4] == ["64%", "35%", "9%"]
    assert table["rows"][0] == ["large model alone", "90.0 [89.0, 91.0]", "", "", "2", "0.50"]
    assert table["rows"][1][1:] == ["80.0 [79.0, 81.0]"] * 3 + ["2 / 2 / 2", "0.50 / 0.50 / 0.50"]
    assert "25 %, 25 %, 25 %" in table["caption"]
    assert "0.500, 0.600, 0.700" in table["caption"]


def test_a_retention_that_was_missed_is_told() -> None:
    assert score_cell(row("fastv", 0.09, 0.5, reached=0.17)) == "50.0 [49.0, 51.0] (17%)"
    assert score_cell(row("fastv", 0.09, 0.5, reached=0.1)) == "50.0 [49.0, 51.0]"


def test_what_is_significant_is_bold_and_what_cannot_be_compared_a_dash() -> None:
    table = comparisons_table({"scenes": evaluation()})
    assert table["rows"] == [
        [
            "scenes",
            "64%",
            "random",
            "**+10.0 [+9.0, +11.0]**",
            "-",
            "**-2.0 [-3.0, -1.0]**",
            "+4.0 [+3.0, +5.0]",
        ]
    ]


def test_guides_are_compared_side_by_side() -> None:
    names = evaluate_methods.GUIDES[1:]
    rows = [row(name, target, 0.8) for name in names for target in (0.64, 0.35, 0.09)]
    compared = [difference("sgp", "oracle", 0.09, -0.1, 0.04), difference("sgp", "sgp-last", 0.09, 0.1, 0.5)]
    table = guides_table({"scenes": {"rows": rows, "comparisons": compared}})
    assert table["rows"][0][0] == "all layers, prompt and generated tokens"
    assert len(table["rows"]) == len(names)
    assert "0.04 (oracle" in table["caption"]
    assert "last" not in table["caption"]
