"""`evaluate` and `calibrate` as Python functions, on models that are open already."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from scene_data import write_data
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLGenerationConfig
from transformers_sgl.evaluation import KeepAccuracy, LargeCallBudget, calibrate, evaluate
from transformers_sgl.evaluation.calibration.threshold import choose_threshold
from transformers_sgl.evaluation.run_folder import pair_facts
from transformers_sgl.storage.files import locked


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


class TestASecondProcess:
    def test_one_with_the_same_out_is_refused_before_anything_is_opened(self, tmp_path: Path) -> None:
        data, out = str(write_data(tmp_path / "test.jsonl", "test", 24)), tmp_path / "out"
        message = "Another process is writing into '.*out': wait until it is done, or give another `out`"
        for run in (
            lambda: evaluate("no/such/pair", data, out=out, methods=["large"], device="cpu"),
            lambda: calibrate("no/such/pair", data, LargeCallBudget(0.8), out=out, confidence=0.6, device="cpu"),
        ):
            with held_by_another(out), pytest.raises(OSError, match=message):
                run()
            with pytest.raises(OSError, match="no/such/pair"):  # it is free again
                run()
        assert list(out.iterdir()) == []

    def test_two_at_once_give_one_result_and_one_refusal(self, pair: tuple[Any, Any], tmp_path: Path) -> None:
        data, out = str(write_data(tmp_path / "test.jsonl", "test", 4)), tmp_path / "out"
        options: dict[str, Any] = {"methods": ["large"], "batch_size": 1, "max_new_tokens": 2, "device": "cpu"}
        alone = evaluate(pair, data, out=tmp_path / "alone", **options)
        numbers = []
        for _ in range(2):
            if (number := os.fork()) == 0:
                code = 1
                try:
                    evaluate(pair, data, out=out, **options)
                    code = 0
                except OSError as error:
                    code = 2 if "Another process is writing into" in str(error) else 1
                finally:
                    os._exit(code)  # never back into the tests
            numbers.append(number)
        assert sorted(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers) in ([0, 0], [0, 2])
        assert json.loads((out / "summary.json").read_text()) == alone.report
        assert len((out / "samples.jsonl").read_text().splitlines()) == 4

    def test_a_pair_that_is_saved_anew_meanwhile_does_not_get_the_threshold(
        self, embedded_pair_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = write_data(tmp_path / "test.jsonl", "test", 24)
        folder = Path(shutil.copytree(embedded_pair_path, tmp_path / "pair"))
        weights = folder / "small" / "model.safetensors"

        def save_another(*args: Any, **kwargs: Any) -> Any:
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
            return choose_threshold(*args, **kwargs)

        module = sys.modules["transformers_sgl.evaluation.calibration.calibrate"]
        monkeypatch.setattr(module, "choose_threshold", save_another)
        before = (folder / "generation_config.json").read_bytes()
        settings: dict[str, Any] = {"confidence": 0.6, "max_new_tokens": 4, "device": "cpu"}
        with pytest.raises(OSError, match="Another pair was saved into '.*pair' while this one was calibrated"):
            calibrate(folder, data, LargeCallBudget(0.8), out=tmp_path / "out", **settings)
        assert (folder / "generation_config.json").read_bytes() == before


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """Another thread writes into the folder; to a lock it is as good as another process."""
    inside, leave = Event(), Event()

    def hold() -> None:
        with locked(folder):
            inside.set()
            leave.wait()

    thread = Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_weights_in_memory_are_told_apart(pair: tuple[Any, Any]) -> None:
    first = pair_facts(pair[0], None)
    assert pair_facts(pair[0], None) == first
    weight = next(iter(pair[0].parameters()))
    weight.data.view(-1)[0] += 1
    try:
        assert pair_facts(pair[0], None)["weights"] != first["weights"]
    finally:
        weight.data.view(-1)[0] -= 1
