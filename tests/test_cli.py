from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_families import picture, tiny_family_pair
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.cli import main
from transformers_sgl.evaluation import Scenes, calibration
from transformers_sgl.evaluation.calibration_run import _inputs
from transformers_sgl.evaluation.data import read_samples
from transformers_sgl.hub import embedded_pair

QUESTION = "describe the red triangle."


@pytest.fixture(scope="module")
def example(embedded_pair_path) -> str:
    return str(embedded_pair_path / "example.png")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Asks for a short answer in this process; returns exit code, standard output and standard error."""
    code = main(["run", "--max-new-tokens", "8", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class TestRun:
    def test_prints_answer_draft_tokens_and_timings(self, capsys, example):
        code, out, _ = run(capsys, example, QUESTION)
        assert code == 0
        lines = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert list(lines) == ["answer", "draft", "kept", "large", "timings"]
        assert lines["answer"]
        assert "(the small model's answer, score 0." in lines["draft"]
        assert "forward pass" in lines["large"]
        assert "of 320 visual tokens from layer" in lines["kept"]
        assert all(f"{part} " in lines["timings"] for part in ("guidance", "large", "total"))

    def test_nothing_is_said_beside_the_answer(self, example, tmp_path):
        """No deprecation of a dependency, and none that transformers would print once for a process."""
        command = [
            sys.executable,
            "-m",
            "transformers_sgl",
            "run",
            example,
            QUESTION,
            "--show",
            str(tmp_path / "o.png"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert result.stderr == ""

    def test_json_says_the_same_for_a_program(self, capsys, example):
        code, out, _ = run(capsys, example, QUESTION, "--json", "--retention", "0.25", "--prune-layer", "1")
        report = json.loads(out)
        assert code == 0
        assert set(report) == {
            "answer",
            "average_retention",
            "decision_score",
            "draft",
            "exited_early",
            "num_large_forward_passes",
            "num_layers",
            "num_visual_tokens",
            "num_visual_tokens_kept",
            "prune_layer",
            "timings_ms",
        }
        assert (report["num_visual_tokens"], report["num_visual_tokens_kept"], report["prune_layer"]) == (320, 80, 1)
        depth = report["num_layers"]
        assert report["average_retention"] == pytest.approx((1 + (depth - 1) * 0.25) / depth, abs=1e-4)
        assert report["timings_ms"]["total"] >= report["timings_ms"]["guidance"] > 0
        assert 0 < report["decision_score"] < 1
        assert report["exited_early"] is False

    def test_an_empty_question_is_refused(self, capsys, example):
        code, _, err = run(capsys, example, " ")
        assert (code, err) == (2, "transformers-sgl: The question is empty: ask something about the image.\n")

    def test_a_draft_that_is_trusted_is_the_answer(self, capsys, example, tmp_path):
        show = tmp_path / "overlay.png"
        options = (example, QUESTION, "--early-exit-threshold", "0")
        code, out, _ = run(capsys, *options, "--show", str(show))
        assert code == 0
        lines = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert list(lines) == ["answer", "draft", "large", "timings", "overlay"]
        assert lines["large"].startswith("not called")
        assert lines["draft"].startswith(lines["answer"])
        assert Image.open(show).size[0] > 0
        report = json.loads(run(capsys, *options, "--json")[1])
        assert (report["exited_early"], report["num_large_forward_passes"]) == (True, 0)
        assert report["num_visual_tokens_kept"] is None

    def test_presets_keep_less_and_less(self, capsys, example):
        kept = []
        for preset in ("quality", "balanced", "fast"):
            code, out, _ = run(capsys, example, QUESTION, "--preset", preset, "--json")
            assert code == 0
            kept.append(json.loads(out)["num_visual_tokens_kept"])
        assert kept == [128, 64, 16]

    def test_retention_wins_over_the_preset(self, capsys, example):
        _, out, _ = run(capsys, example, QUESTION, "--preset", "fast", "--retention", "0.5", "--json")
        assert json.loads(out)["num_visual_tokens_kept"] == 160

    def test_nothing_is_pruned_at_full_retention(self, capsys, example):
        code, out, _ = run(capsys, example, QUESTION, "--retention", "1.0")
        assert code == 0
        assert "320 of 320 visual tokens in all" in out
        assert "average retention 100%" in out

    def test_overlay_is_written(self, capsys, example, tmp_path):
        overlay = tmp_path / "overlay.png"
        code, out, _ = run(capsys, example, QUESTION, "--show", str(overlay))
        assert code == 0
        assert str(overlay) in out
        # the image, and the thumbnail's map beside it
        assert Image.open(overlay).width > 2 * 512

    def test_a_named_pair_is_loaded(self, capsys, example, embedded_pair_path):
        arguments = (example, QUESTION, "--model", str(embedded_pair_path), "--dtype", "float32", "--device", "cpu")
        assert run(capsys, *arguments)[0] == 0

    def test_a_guide_that_cuts_the_image_otherwise(self, capsys, example, regridded_pair_path, tmp_path):
        overlay = tmp_path / "overlay.png"
        options = ("--model", str(regridded_pair_path), "--show", str(overlay), "--max-new-tokens", "16", "--json")
        code, out, _ = run(capsys, example, QUESTION, *options)
        report = json.loads(out)
        assert code == 0
        assert report["answer"] == "a red triangle labelled B in the bottom left"
        assert (report["num_visual_tokens"], report["num_visual_tokens_kept"]) == (320, 64)
        assert Image.open(overlay).width > 2 * 512

    def test_overlay_of_a_model_of_another_family(self, capsys, example, tmp_path):
        overlay = tmp_path / "overlay.png"
        for part in tiny_family_pair("qwen2_vl", "internvl"):
            part.save_pretrained(tmp_path / "pair")
        code, out, _ = run(capsys, example, QUESTION, "--model", str(tmp_path / "pair"), "--show", str(overlay))
        assert code == 0
        assert "of 25 visual tokens" in out
        assert Image.open(overlay).size[0] > 0


class TestErrors:
    """Each is one sentence on standard error, without a traceback, and exit code 2."""

    def check(self, capsys, expected: str, *arguments: str) -> None:
        code, out, err = run(capsys, *arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("transformers-sgl: ")
        assert expected in err
        assert err.count("\n") == 1

    def test_no_such_image(self, capsys):
        self.check(capsys, "There is no image file 'missing.png'.", "missing.png", QUESTION)

    def test_a_folder_is_no_image(self, capsys, tmp_path):
        self.check(capsys, "There is no image file", str(tmp_path), QUESTION)

    def test_no_image_at_all(self, capsys, tmp_path):
        path = tmp_path / "text.png"
        path.write_text("no picture")
        self.check(capsys, "cannot be read as an image", str(path), QUESTION)

    def test_truncated_image(self, capsys, tmp_path, example):
        path = tmp_path / "half.png"
        with open(example, "rb") as file:
            data = file.read()
        path.write_bytes(data[: len(data) // 2])
        self.check(capsys, "cannot be read as an image", str(path), QUESTION)

    @pytest.mark.parametrize("ratio", ["0", "1.5", "-0.1", "nan"])
    def test_retention_out_of_range(self, capsys, example, ratio):
        self.check(capsys, "`retention_ratio` is", example, QUESTION, f"--retention={ratio}")

    @pytest.mark.parametrize("layer", ["-1", "1.0", "1.5"])
    def test_prune_layer_that_no_model_has(self, capsys, example, layer):
        self.check(capsys, "`prune_layer` is", example, QUESTION, f"--prune-layer={layer}")

    def test_prune_layer_past_the_depth(self, capsys, example):
        self.check(capsys, "decoder layers", example, QUESTION, "--prune-layer", "1000")

    def test_no_new_tokens(self, capsys, example):
        self.check(capsys, "max_new_tokens", example, QUESTION, "--max-new-tokens", "0")

    @pytest.mark.parametrize("model", ["no-such-folder", "no-such-organisation/no-such-pair"])
    def test_unknown_model(self, capsys, example, model):
        self.check(capsys, f"No pair can be loaded from '{model}'", example, QUESTION, "--model", model)

    @pytest.mark.parametrize("model", ["/no/such/folder", "./no/such/folder", "no/such/folder"])
    def test_a_folder_that_is_not_there(self, capsys, example, model):
        self.check(capsys, f"There is no folder '{model}': name a saved pair", example, QUESTION, "--model", model)

    def test_a_folder_without_a_model(self, capsys, example, tmp_path):
        self.check(capsys, "it is not a folder with a config.json", example, QUESTION, "--model", str(tmp_path))

    def test_a_single_model_is_no_pair(self, capsys, example, embedded_pair_path):
        large = str(embedded_pair_path / "large")
        self.check(capsys, "is a single model of type 'internvl', not a pair", example, QUESTION, "--model", large)

    def test_unknown_device(self, capsys, example):
        self.check(capsys, "There is no kind of device 'abacus'", example, QUESTION, "--device", "abacus")
        self.check(capsys, "There is no device 'cuda:99'", example, QUESTION, "--device", "cuda:99")

    def test_overlay_of_an_unknown_kind(self, capsys, example, tmp_path):
        self.check(capsys, "name a file such as overlay.png", example, QUESTION, "--show", str(tmp_path / "overlay"))

    def test_overlay_in_a_missing_folder(self, capsys, example):
        self.check(capsys, "there is no folder", example, QUESTION, "--show", "no/such/folder/overlay.png")

    def test_overlay_does_not_replace_the_image(self, capsys, example):
        self.check(capsys, "would replace the image", example, QUESTION, "--show", example)

    def test_overlay_without_pruning_comes_after_the_answer(self, capsys, example, tmp_path):
        overlay = tmp_path / "overlay.png"
        code, out, err = run(capsys, example, QUESTION, "--retention", "1", "--show", str(overlay))
        assert code == 2
        assert out.startswith("answer")
        assert "nothing is pruned" in err
        assert not overlay.exists()

    @pytest.mark.parametrize("layer", ["middle", "0,5"])
    def test_prune_layer_that_is_no_number(self, capsys, example, layer):
        with pytest.raises(SystemExit) as stopped:
            main(["run", example, QUESTION, "--prune-layer", layer])
        assert stopped.value.code == 2
        assert "is neither a layer's index nor a fraction of the depth" in capsys.readouterr().err


class TestVisualize:
    @staticmethod
    def visualize(capsys, *arguments: str) -> tuple[int, str, str]:
        code = main(["visualize", "--max-new-tokens", "16", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    def test_the_page_is_written(self, capsys, example, tmp_path):
        page = tmp_path / "page.html"
        code, out, _ = self.visualize(capsys, example, QUESTION, "--out", str(page))
        lines = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert code == 0
        assert list(lines) == ["large", "small", "quality", "balanced", "fast", "written"]
        assert lines["written"] == str(page)
        assert "128 of 320 visual tokens, 64% average retention" in lines["quality"]
        text = page.read_text(encoding="utf-8")
        assert text.count("a red triangle labelled B in the bottom left") >= 5
        assert QUESTION in text
        assert len(list(tmp_path.iterdir())) == 1

    def test_the_page_has_a_name_where_none_is_given(self, capsys, example, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, out, _ = self.visualize(capsys, example, QUESTION, "--json")
        report = json.loads(out)
        assert (code, report["written"]) == (0, ["explanation.html"])
        assert [guided["preset"] for guided in report["guided"]] == ["quality", "balanced", "fast"]
        assert Path("explanation.html").stat().st_size > 10_000
        assert [path.name for path in tmp_path.iterdir()] == ["explanation.html"]

    def test_a_guide_that_cuts_the_image_otherwise(self, capsys, example, regridded_pair_path, tmp_path):
        page = tmp_path / "page.html"
        options = ("--model", str(regridded_pair_path), "--out", str(page), "--json")
        code, out, _ = self.visualize(capsys, example, QUESTION, *options)
        assert (code, json.loads(out)["importance_transfer"]) == (0, "resampling")
        assert "carried over" in page.read_text(encoding="utf-8")

    @pytest.mark.parametrize("kind", ["folder", "gif"])
    def test_frames_of_a_video(self, capsys, tmp_path, kind):
        frames = [picture(60, 40, seed=seed) for seed in range(6)]
        video = tmp_path / f"video.{kind}"
        if kind == "folder":
            video.mkdir()
            for index, frame in enumerate(frames):
                frame.save(video / f"{index}.png")
            (video / "notes.txt").write_text("no frame")
        else:
            frames[0].save(video, save_all=True, append_images=frames[1:])
        page = tmp_path / "page.html"
        code, out, _ = self.visualize(
            capsys, "--video", str(video), "what?", "--frames", "4", "--out", str(page), "--json"
        )
        assert (code, json.loads(out)["num_visual_tokens"]) == (0, 4 * 64)
        assert "From frame 1 to frame 4" in page.read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("missing.png", QUESTION), "There is no image file 'missing.png'"),
            ((__file__, QUESTION), "cannot be read as an image"),
            (("EXAMPLE", " "), "The question is empty"),
            (("EXAMPLE", QUESTION, "--out", "page.txt"), "name a file such as page.html"),
            (("EXAMPLE", QUESTION, "--out", "no/such/page.html"), "there is no folder 'no/such'"),
            (("EXAMPLE", QUESTION, "--frames", "0"), "`frames` is 0"),
            (("EXAMPLE", QUESTION, "--max-new-tokens", "0"), "max_new_tokens"),
            (("EXAMPLE", QUESTION, "--model", "/no/such/pair"), "There is no folder '/no/such/pair'"),
            (("missing.mp4", QUESTION, "--video"), "There is no video 'missing.mp4'"),
            ((str(Path(__file__).parent), QUESTION, "--video"), "There are no images in"),
        ],
    )
    def test_what_is_wrong_is_one_sentence_and_nothing_is_written(
        self, capsys, example, tmp_path, monkeypatch, arguments, message
    ):
        monkeypatch.chdir(tmp_path)
        code, out, err = self.visualize(capsys, *(example if each == "EXAMPLE" else each for each in arguments))
        assert (code, out) == (2, "")
        assert err.startswith("transformers-sgl: ")
        assert message in err
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_the_page_does_not_replace_the_image(self, capsys, example, tmp_path):
        image = str(shutil.copy(example, tmp_path / "image.html"))
        code, out, err = self.visualize(capsys, image, QUESTION, "--out", image)
        assert (code, out) == (2, "")
        assert "would replace the image" in err
        assert Path(image).read_bytes() == Path(example).read_bytes()

    @pytest.mark.parametrize("decoder", [None, "av"])
    def test_a_video_that_nothing_decodes(self, capsys, tmp_path, monkeypatch, decoder):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == decoder else None)
        video = tmp_path / "clip.mp4"
        video.write_bytes(b"no video")
        code, _, err = self.visualize(capsys, "--video", str(video), "what?", "--out", str(tmp_path / "page.html"))
        assert code == 2
        assert ("can decode" if decoder is None else "cannot be read as a video") in err
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == [video]

    def test_frames_of_several_sizes(self, capsys, tmp_path):
        for side in (20, 30):
            picture(side, side).save(tmp_path / f"{side}.png")
        code, _, err = self.visualize(capsys, "--video", str(tmp_path), "what?", "--out", str(tmp_path / "page.html"))
        assert (code, err.count("\n")) == (2, 1)
        assert "of several sizes" in err
        assert not (tmp_path / "page.html").exists()


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
        output = model.generate(**_inputs(model, processor, samples), max_new_tokens=24, return_dict_in_generate=True)
        exits = [record["decision_score"] >= report["threshold"] for record in records]
        assert output.exited_early.tolist() == exits[:8]
        assert 0 < sum(exits) < len(exits) == 24
        assert [r["index"] for r in records] == list(range(24))

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
        monkeypatch.setattr("transformers_sgl.evaluation.calibration.write_results", lambda *arguments: [])
        assert main([*arguments, "--seed", "5", "--held-out", "0.4", "--batch-size", "3"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert (again["seed"], again["num_held_out"]) == (5, 10)
        assert batches == []

    def test_a_promise_that_is_not_kept_is_not_put_into_the_pair(
        self, calibrated, data, capsys, monkeypatch, tmp_path
    ):
        pair, out, _ = calibrated
        out = shutil.copytree(out, tmp_path / "out")
        before, found = (pair / "generation_config.json").read_bytes(), calibration.calibrate
        monkeypatch.setattr(
            calibration,
            "calibrate",
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
        assert "another run, which differs in max_new_tokens: give another --out" in capsys.readouterr().err
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
            "transformers-sgl: Stopped after 16 of 24 samples; the same command goes on from there.\n"
        )
        assert (pair / "generation_config.json").read_bytes() == settings
        assert sorted(path.name for path in out.iterdir()) == ["run.json", "samples.jsonl"]

        batches = count_batches(monkeypatch)
        assert main(arguments) == 0
        assert batches == [8]
        whole = calibrated[1]
        assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
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
        with pytest.raises(SystemExit) as stopped:
            main(["calibrate", "org/pair", "--data", str(data), "--out", "out", *promises])
        assert stopped.value.code == 2
        assert "--large-call-budget" in capsys.readouterr().err


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


def test_ctrl_c_is_one_sentence(capsys, example, monkeypatch):
    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_sgl.opening.open_pair", stopped)
    assert run(capsys, example, QUESTION) == (130, "", "transformers-sgl: Stopped.\n")


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "transformers_sgl", "run", "missing.png", QUESTION]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stderr == "transformers-sgl: There is no image file 'missing.png'.\n"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "answer a question about an image" in out
    assert "choose the early-exit threshold" in out
