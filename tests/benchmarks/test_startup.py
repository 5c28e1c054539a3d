"""Measuring the start: what is measured, not how long it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.parts import startup


def test_one_round_measures_everything(embedded_pair_path: Path) -> None:
    measured = startup.measure_startup(embedded_pair_path, rounds=1)

    assert json.loads(json.dumps(measured)) == measured
    with_it, without_it = "transformers and transformers_sgl", "transformers"
    assert set(measured["import_s"]) == {with_it, without_it, "transformers_sgl"}
    assert set(measured["auto_class_s"]) == {with_it, without_it}
    for name, auto_class in measured["auto_class_s"].items():  # which comes after
        assert 0 < measured["import_s"][name]["median"] < auto_class["median"]
    for kind in ("import", "auto_class"):
        seconds = measured[f"{kind}_s"]
        assert measured[f"{kind}_ratio"]["median"] == seconds[with_it]["median"] / seconds[without_it]["median"]
    assert measured["load_ratio"]["median"] == (
        measured["load_s"]["pair"]["median"] / measured["load_s"]["two models"]["median"]
    )


def test_rounds_take_turns_and_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def seconds_until(*statements: str) -> list[float]:
        asked.append(statements[0])
        return [float(len(asked)), 10.0 * len(asked)][: len(statements)]

    monkeypatch.setattr(startup, "_seconds_until", seconds_until)
    monkeypatch.setattr(startup, "_loading_seconds", lambda pair, rounds: ([1.0, 2.0, 4.0], [1.5, 2.0, 5.0]))
    measured = startup.measure_startup(Path("pair"), rounds=3)

    assert asked == ["import transformers", "import transformers, transformers_sgl", "import transformers_sgl"] * 3
    assert measured["import_s"]["transformers"] == {"median": 4.0, "min": 1.0, "max": 7.0}
    assert measured["auto_class_s"]["transformers"] == {"median": 40.0, "min": 10.0, "max": 70.0}
    assert measured["import_ratio"] == {"median": 5 / 4, "min": 8 / 7, "max": 2.0}
    assert measured["load_ratio"] == {"median": 1.25, "min": 1.0, "max": 1.5}


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`rounds` is 0"):
        startup.measure_startup(tmp_path, rounds=0)
    with pytest.raises(OSError, match="large"):
        startup.measure_startup(tmp_path)
