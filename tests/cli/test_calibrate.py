from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.cli import main
from transformers_sgl.evaluation import Scenes, read_samples
from transformers_sgl.evaluation.calibration.threshold import choose_threshold
from transformers_sgl.evaluation.methods import Pair
from transformers_sgl.hub import embedded_pair


def write_questions(folder: Path, num_scenes: int) -> Path:
    """Drawn scenes with one question each, as data for `calibrate`."""
    lines = []
    for index, scene in enumerate(Scenes("test", seed=5, questions_per_scene=1, length=num_scenes)):
        image = f"{index}.png"
        scene.image.save(folder / image)
        lines += [{"image": image, "question": q.question, "answer": q.answer} for q in scene.questions]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# So few questions that not every split keeps the promise; this one does.
CALIBRATION = ("--large-call-budget", "0.8", "--confidence", "0.6", "--max-new-tokens", "24", "--seed", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture
def pair(tmp_path, embedded_pair_path) -> Path:
    return Path(shutil.copytree(embedded_pair_path, tmp_path / "pair"))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, embedded_pair_path, data) -> tuple[Path, Path, str]:
    """A copy of the pair after calibration, the results' folder, and what was printed."""
    folder = tmp_path_factory.mktemp("calibrated")
    pair, out = shutil.copytree(embedded_pair_path, folder / "pair"), folder / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["calibrate", str(pair), "--data", str(data), "--out", str(out), *CALIBRATION]) == 0
    return pair, out, printed.getvalue()


class TestCalibrate:
    def test_the_pair_exits_from_the_threshold_on(self, calibrated, data):
        pair, out, _ = calibrated
        report = json.loads((out / "calibration.json").read_text())
        model = AutoModelForImageTextToText.from_pretrained(pair)
        assert model.generation_config.early_exit_threshold == report["threshold"]
        name = "generation_config.json"
        assert (pair / name).read_bytes() == (out / name).read_bytes()
        own, now = (json.loads((folder / name).read_text()) for folder in (embedded_pair(), pair))
        version = {"transformers_version": now["transformers_version"]}  # whoever saves writes their own
        assert now == {**own, **version, "early_exit_threshold": report["threshold"]}

        # what was calibrated is what `generate` now does
        processor = AutoProcessor.from_pretrained(pair)
        samples = read_samples(data)[:8]
        records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        inputs = Pair(model, processor).inputs(processor, samples, [sample.open_image() for sample in samples])
        output = model.generate(**inputs, max_new_tokens=24, return_dict_in_generate=True)
        exits = [record["decision_score"] >= report["threshold"] for record in records]
        assert output.exited_early.tolist() == exits[:8]
        assert 0 < sum(exits) < len(exits) == 24
        assert [r["sample"] for r in records] == list(range(24))

    def test_the_summary_says_what_was_found(self, calibrated):
        pair, out, printed = calibrated
        lines = dict(line.split("  ", maxsplit=1) for line in printed.splitlines())
        assert list(lines) == [
            "threshold",
            "promise",
            "calibration",
            "held out",
            "accuracy",
            "kept right",
            "large calls",
            "written",
        ]
        report = json.loads((out / "calibration.json").read_text())
        assert float(lines["threshold"]) == pytest.approx(report["threshold"], abs=1e-6)
        assert "At most 80% of the questions go to the large model: with 60% confidence" in lines["promise"]
        assert f"promise {'kept' if report['promise_held'] else 'NOT kept'}: 12 samples count" in lines["held out"]
        for file in ("calibration.json", "curve.png", "generation_config.json"):
            assert str(out / file) in lines["written"]
            assert (out / file).stat().st_size > 0
        assert str(pair / "generation_config.json") in lines["written"]

    def test_the_same_command_asks_no_question_twice(self, calibrated, data, capsys, monkeypatch):
        pair, out, _ = calibrated
        batches = count_batches(monkeypatch)
        report = json.loads((out / "calibration.json").read_text())
        arguments = ["calibrate", str(pair), "--data", str(data), "--out", str(out), *CALIBRATION, "--json"]
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out) == report
        # another split and batch size use the same answers
        module = sys.modules["transformers_sgl.evaluation.calibration.calibrate"]
        monkeypatch.setattr(module, "write_results", lambda *arguments: [])
        assert main([*arguments, "--seed", "5", "--held-out", "0.4", "--batch-size", "3"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert (again["seed"], again["num_held_out"]) == (5, 10)
        assert batches == []

    def test_a_promise_that_is_not_kept_is_not_put_into_the_pair(
        self, calibrated, data, capsys, monkeypatch, tmp_path
    ):
        pair, out, _ = calibrated
        out = shutil.copytree(out, tmp_path / "out")
        before, found = (pair / "generation_config.json").read_bytes(), choose_threshold
        monkeypatch.setattr(
            sys.modules["transformers_sgl.evaluation.calibration.calibrate"],
            "choose_threshold",
            lambda *arguments, **options: replace(found(*arguments, **options), promise_held=False, threshold=0.123),
        )
        assert main(["calibrate", str(pair), "--data", str(data), "--out", str(out), *CALIBRATION]) == 0
        printed = capsys.readouterr().out
        assert "promise NOT kept" in printed
        assert printed.rstrip().endswith("the pair's own settings stay as they were: give more data, or promise less")
        assert (pair / "generation_config.json").read_bytes() == before
        assert json.loads((out / "calibration.json").read_text())["threshold"] == 0.123

    def test_another_run_is_refused_and_nothing_is_touched(self, calibrated, data, capsys):
        pair, out, _ = calibrated
        before = {path: path.read_bytes() for path in [*out.iterdir(), pair / "generation_config.json"]}
        arguments = ["calibrate", str(pair), "--data", str(data), "--out", str(out), *CALIBRATION]
        assert main([*arguments, "--max-new-tokens", "12"]) == 2
        assert "another run, which differs in max_new_tokens: give another `out`" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in [*out.iterdir(), pair / "generation_config.json"]} == before

    def test_an_interrupted_run_goes_on(self, calibrated, data, pair, tmp_path, capsys, monkeypatch):
        settings = (pair / "generation_config.json").read_bytes()
        out = tmp_path / "out"
        arguments = ["calibrate", str(pair), "--data", str(data), "--out", str(out), *CALIBRATION]
        with monkeypatch.context() as patch:
            batches = count_batches(patch, stop_after=2)
            assert main(arguments) == 130
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == (
            "transformers-sgl: Stopped after 2 of 3 batches; the same command goes on from there.\n"
        )
        assert (pair / "generation_config.json").read_bytes() == settings
        assert sorted(path.name for path in out.iterdir()) == ["run.json", "samples-0.jsonl"]

        batches = count_batches(monkeypatch)
        assert main(arguments) == 0
        assert batches == [8]
        whole = calibrated[1]
        records, others = (
            [{**json.loads(line), "seconds": None} for line in (folder / "samples.jsonl").read_text().splitlines()]
            for folder in (out, whole)
        )
        assert records == others
        found, expected = (json.loads((folder / "calibration.json").read_text()) for folder in (out, whole))
        assert found == expected

    def test_a_pair_that_samples_is_refused_and_left_alone(self, data, pair, tmp_path, capsys):
        settings = json.dumps({"do_sample": True, "eos_token_id": 454, "pad_token_id": 455})
        (pair / "generation_config.json").write_text(settings)
        arguments = ["calibrate", str(pair), "--data", str(data), "--out", str(tmp_path / "out"), *CALIBRATION]
        assert main(arguments) == 2
        assert "set do_sample=False" in capsys.readouterr().err
        assert (pair / "generation_config.json").read_text() == settings
        assert not (tmp_path / "out").exists()

    def test_too_few_right_answers_leave_the_pair_alone(self, data, pair, tmp_path, capsys):
        # no answer is right, so that nothing counts; the line that says so comes after the run
        lines = [{**json.loads(line), "answer": "?"} for line in data.read_text().splitlines()[:10]]
        wrong = data.with_name("wrong.jsonl")
        wrong.write_text("".join(json.dumps(line) + "\n" for line in lines))
        settings = (pair / "generation_config.json").read_bytes()
        promise = ("--keep-accuracy", "0.5", "--confidence", "0.6", "--max-new-tokens", "4")
        assert main(["calibrate", str(pair), "--data", str(wrong), "--out", str(tmp_path / "out"), *promise]) == 2
        assert "0 calibration and 0 held-out samples that the large model answers rightly" in capsys.readouterr().err
        assert (pair / "generation_config.json").read_bytes() == settings
        assert not (tmp_path / "out" / "calibration.json").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--keep-accuracy", "1"), "`keep_accuracy` is 1.0: pass a fraction"),
            (("--keep-accuracy", "nan"), "`keep_accuracy` is nan: pass a fraction"),
            (("--large-call-budget", "0"), "`large_call_budget` is 0.0: pass a fraction"),
            (("--large-call-budget", "0.8", "--confidence", "95"), "`confidence` is 95.0: pass a fraction"),
            (("--large-call-budget", "0.8", "--held-out", "0"), "`held_out` is 0.0: pass a fraction"),
            (("--large-call-budget", "0.8", "--batch-size", "0"), "`batch_size` is 0"),
            (("--large-call-budget", "0.8", "--seed=-1"), "`seed` is -1"),
            (("--large-call-budget", "0.8", "--max-new-tokens", "0"), "max_new_tokens"),
            (("--large-call-budget", "0.8", "--data", "no.jsonl"), "There is no data file 'no.jsonl'"),
            (("--large-call-budget", "0.8", "--out", __file__), "is a file, but a folder is needed"),
            (("--large-call-budget", "0.01"), "There are 12 calibration and 12 held-out samples. To promise"),
            (("--keep-accuracy", "0.99"), "There are at most 12 calibration and 12 held-out samples that the large"),
        ],
    )
    def test_what_can_be_wrong_is_said_before_models_load(
        self, data, tmp_path, capsys, monkeypatch, arguments, message
    ):
        monkeypatch.setattr("transformers_sgl.opening.open_pair", None)
        out = tmp_path / "out"
        code = main(["calibrate", "org/pair", "--data", str(data), "--out", str(out), *arguments])
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, "")
        assert captured.err.startswith("transformers-sgl: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not out.exists()

    @pytest.mark.parametrize("promises", [(), ("--keep-accuracy", "0.9", "--large-call-budget", "0.5")])
    def test_there_is_one_promise(self, data, capsys, promises):
        assert main(["calibrate", "org/pair", "--data", str(data), "--out", "out", *promises]) == 2
        err = capsys.readouterr().err
        assert "--large-call-budget" in err
        assert err.count("\n") == 1


def count_batches(monkeypatch, stop_after: int | None = None) -> list[int]:
    """Notes the size of every batch that both models answer; stops like Ctrl-C where wanted."""
    batches: list[int] = []
    generate = SGLForConditionalGeneration.generate

    def counted(self, *args, **kwargs):
        if kwargs["early_exit_threshold"] > 1:  # below it is only asked whether the pair can exit at all
            if len(batches) == stop_after:
                raise KeyboardInterrupt
            batches.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(SGLForConditionalGeneration, "generate", counted)
    return batches
