"""`evaluate` and `calibrate` as Python functions, on models that are open already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scene_data import write_data
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLGenerationConfig
from transformers_sgl.evaluation import KeepAccuracy, LargeCallBudget, calibrate, evaluate
from transformers_sgl.evaluation.run_folder import pair_facts


@pytest.fixture(scope="module")
def pair(embedded_pair_path: Path) -> tuple[Any, Any]:
    return (
        AutoModelForImageTextToText.from_pretrained(embedded_pair_path),
        AutoProcessor.from_pretrained(embedded_pair_path),
    )


def test_evaluate_gives_what_it_writes(pair: tuple[Any, Any], tmp_path: Path) -> None:
    data, out = str(write_data(tmp_path / "test.jsonl", "test", 4)), tmp_path / "out"
    options: dict[str, Any] = {"out": out, "methods": ["large", "random"], "retentions": [0.35, 0.35], "batch_size": 4}
    evaluation = evaluate(pair, data, **options, max_new_tokens=4)
    assert [row["method"] for row in evaluation.report["rows"]] == ["large", "random"]
    assert [path.name for path in evaluation.written] == ["summary.json", "speed.json", "table.md", "figure.png"]
    assert evaluation.report == json.loads((out / "summary.json").read_text())
    assert evaluation.speed == json.loads((out / "speed.json").read_text())
    assert evaluation.to_markdown() + "\n" == (out / "table.md").read_text()
    assert json.loads(json.dumps(evaluation.to_dict()))["written"] == [str(path) for path in evaluation.written]
    assert evaluate(pair, data, **options, max_new_tokens=4).report == evaluation.report
    with pytest.raises(ValueError, match="another run, which differs in max_new_tokens"):
        evaluate(pair, data, **options, max_new_tokens=5)


def test_calibrate_reports_and_leaves_an_open_pair_alone(pair: tuple[Any, Any], tmp_path: Path) -> None:
    data, out = write_data(tmp_path / "test.jsonl", "test", 24), tmp_path / "out"
    settings = pair[0].generation_config.to_dict()
    promise = LargeCallBudget(0.8)
    report = calibrate(pair, data, promise, out=out, confidence=0.6, max_new_tokens=4)
    assert [path.name for path in report.written] == ["curve.png", "calibration.json", "generation_config.json"]
    assert json.loads((out / "calibration.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert SGLGenerationConfig.from_pretrained(out).early_exit_threshold == report.threshold
    assert pair[0].generation_config.to_dict() == settings


def test_what_can_be_wrong_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    data = str(write_data(tmp_path / "test.jsonl", "test", 3))
    with pytest.raises(ValueError, match="no method 'best'"):
        evaluate("no/such/pair/at/all", data, out=tmp_path / "out", methods=["best"])
    with pytest.raises(ValueError, match="at most"):
        calibrate("no/such/pair/at/all", data, KeepAccuracy(0.99), out=tmp_path / "out")
    with pytest.raises(OSError, match="There is no folder"):
        evaluate("no/such/pair/at/all", data, out=tmp_path / "out", methods=["large"])
    assert not (tmp_path / "out").exists()


def test_weights_in_memory_are_told_apart(pair: tuple[Any, Any]) -> None:
    first = pair_facts(pair[0], None)
    assert pair_facts(pair[0], None) == first
    weight = next(iter(pair[0].parameters()))
    weight.data.view(-1)[0] += 1
    try:
        assert pair_facts(pair[0], None)["weights"] != first["weights"]
    finally:
        weight.data.view(-1)[0] -= 1
