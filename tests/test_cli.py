from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from transformers_sgl.cli import main

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
        assert list(lines) == ["answer", "draft", "kept", "timings"]
        assert lines["answer"]
        assert lines["draft"].endswith("(the small model's answer)")
        assert "of 320 visual tokens from layer" in lines["kept"]
        assert all(f"{part} " in lines["timings"] for part in ("guidance", "large", "total"))

    def test_json_says_the_same_for_a_program(self, capsys, example):
        code, out, _ = run(capsys, example, QUESTION, "--json", "--retention", "0.25", "--prune-layer", "1")
        report = json.loads(out)
        assert code == 0
        assert set(report) == {
            "answer",
            "average_retention",
            "draft",
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


def test_module_runs_as_a_command():
    command = [sys.executable, "-m", "transformers_sgl", "run", "missing.png", QUESTION]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stderr == "transformers-sgl: There is no image file 'missing.png'.\n"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "answer a question about an image" in capsys.readouterr().out
