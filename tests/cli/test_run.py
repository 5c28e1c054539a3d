from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_families import tiny_family_pair
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLForConditionalGeneration
from transformers_sgl.cli import main
from transformers_sgl.opening import chat_inputs, user_turn

QUESTION = "describe the red triangle."


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Asks for a short answer in this process; returns exit code, standard output and standard error."""
    code = main(["run", "--max-new-tokens", "8", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class TestRun:
    def test_prints_answer_draft_and_tokens(self, capsys, example):
        code, out, _ = run(capsys, example, QUESTION)
        assert code == 0
        lines = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert list(lines) == ["answer", "draft", "kept", "large"]
        assert lines["answer"]
        assert "(the small model's answer, score 0." in lines["draft"]
        assert "forward pass" in lines["large"]
        assert "of 320 visual tokens from layer" in lines["kept"]
        assert " ms" not in out  # a first call warms up, so its times would mislead

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
            "vision_share",
            "draft_confirmed",
            "answer",
            "average_retention",
            "decision_score",
            "draft",
            "exited_early",
            "first_call_timings",
            "num_large_forward_passes",
            "num_layers",
            "num_visual_tokens",
            "num_visual_tokens_kept",
            "prune_layer",
        }
        assert (report["num_visual_tokens"], report["num_visual_tokens_kept"], report["prune_layer"]) == (320, 80, 1)
        depth = report["num_layers"]
        assert report["average_retention"] == pytest.approx((1 + (depth - 1) * 0.25) / depth, abs=1e-4)
        timings = report["first_call_timings"]
        assert timings["total_ms"] >= timings["guidance_ms"] > 0
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
        assert list(lines) == ["answer", "draft", "large", "overlay"]
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
        assert kept == [128, 112, 16]

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
        assert (report["num_visual_tokens"], report["num_visual_tokens_kept"]) == (320, 112)
        assert Image.open(overlay).width > 2 * 512

    def test_overlay_of_a_model_of_another_family(self, capsys, example, tmp_path):
        overlay = tmp_path / "overlay.png"
        for part in tiny_family_pair("qwen2_vl", "internvl"):
            part.save_pretrained(tmp_path / "pair")
        code, out, _ = run(capsys, example, QUESTION, "--model", str(tmp_path / "pair"), "--show", str(overlay))
        assert code == 0
        assert "of 25 visual tokens" in out
        assert Image.open(overlay).size[0] > 0


class TestCompare:
    def test_the_large_model_alone_answers_in_turns(self, capsys, example, monkeypatch):
        asked = []
        generate = SGLForConditionalGeneration.generate

        def noted(self, **kwargs):
            output = generate(self, **{**kwargs, "return_dict_in_generate": True})
            asked.append("large alone" if output.draft_sequences is None else "pair")
            return output if kwargs.get("return_dict_in_generate") else output.sequences

        monkeypatch.setattr(SGLForConditionalGeneration, "generate", noted)
        code, out, _ = run(capsys, example, QUESTION, "--preset", "fast", "--compare", "--json")
        compared = json.loads(out)["compare"]
        assert code == 0
        assert asked == ["pair", *["pair", "large alone"] * 6]  # the first call, a round to warm up, five that count
        assert compared["rounds"] == 5
        assert compared["speedup"] == pytest.approx(compared["large_alone_ms"] / compared["pair_ms"], rel=0.01)
        assert compared["same_answer"] is (json.loads(out)["answer"] == compared["large_alone_answer"])

    @pytest.mark.parametrize("own", [{}, {"early_exit_threshold": 0.0}, {"verify_draft": True, "score_draft": True}])
    def test_the_small_model_has_no_part_in_the_large_models_time(
        self, capsys, example, monkeypatch, tmp_path, embedded_pair_path, own
    ):
        """Whatever the pair's own settings: neither its draft nor its vision encoder, and nothing of it is timed."""
        pair = Path(shutil.copytree(embedded_pair_path, tmp_path / "pair"))
        settings = pair / "generation_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **own}))
        generate, calls, alone = SGLForConditionalGeneration.generate, [], []

        def noted(self, **kwargs):
            calls.clear()
            with self.small.register_forward_pre_hook(lambda *_: calls.append(True)):
                output = generate(self, **{**kwargs, "return_dict_in_generate": True})
            if kwargs.get("retention_ratio") == 1.0:
                alone.append((len(calls), output.timings["guidance_ms"], output.draft_sequences))
            return output if kwargs.get("return_dict_in_generate") else output.sequences

        monkeypatch.setattr(SGLForConditionalGeneration, "generate", noted)
        assert run(capsys, example, QUESTION, "--compare", "--preset", "fast", "--model", str(pair))[0] == 0
        assert alone == [(0, 0.0, None)] * 6

    def test_it_is_two_more_lines(self, capsys, example):
        code, out, _ = run(capsys, example, QUESTION, "--compare", "--early-exit-threshold", "0")
        assert code == 0
        lines = dict(line.split(maxsplit=1) for line in out.splitlines())
        assert list(lines) == ["answer", "draft", "large", "alone", "speed"]
        same = "the same answer" if lines["alone"].startswith(f"{lines['answer']} (") else "another answer"
        assert lines["alone"].endswith(f"(the large model without the small one: {same})")
        assert "times that of the large model alone: " in lines["speed"]
        assert "medians of 5 rounds" in lines["speed"]

    def test_the_large_model_alone_is_stock(self, capsys, example, embedded_pair_path):
        """Its answer is what the large checkpoint gives without us."""
        _, out, _ = run(capsys, example, QUESTION, "--compare", "--json", "--retention", "0.01", "--prune-layer", "0")
        processor = AutoProcessor.from_pretrained(embedded_pair_path / "large")
        large = AutoModelForImageTextToText.from_pretrained(embedded_pair_path / "large")
        inputs = chat_inputs(large, processor, [user_turn(QUESTION, [Image.open(example)])])
        answer = large.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert json.loads(out)["compare"]["large_alone_answer"] == processor.decode(answer, skip_special_tokens=True)


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
        self.check(
            capsys, f"{str(tmp_path)!r} is a folder, not an image: name an image file.", str(tmp_path), QUESTION
        )

    @pytest.mark.parametrize(
        "url", ["https://example.org/cat.png", "HTTP://example.org/cat.png", "data:image/png;base64,"]
    )
    def test_a_url_is_no_image_file(self, capsys, url):
        self.check(capsys, "The image is a URL: download it, and name the file.", url, QUESTION)

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

    def test_overlay_that_is_a_folder(self, capsys, example, tmp_path):
        (tmp_path / "overlay.png").mkdir()
        self.check(capsys, "is a folder", example, QUESTION, "--show", str(tmp_path / "overlay.png"))

    @pytest.mark.parametrize("what", ["folder", "file"])
    def test_overlay_that_cannot_be_written(self, capsys, example, tmp_path, monkeypatch, what):
        overlay = tmp_path / "overlay.png"
        overlay.touch()
        closed = tmp_path if what == "folder" else overlay
        monkeypatch.setattr("os.access", lambda path, mode: mode == os.R_OK or path != closed)  # root may all
        sentence = f"The overlay cannot be written: nothing can be written into {str(closed)!r}."
        self.check(capsys, sentence, example, QUESTION, "--show", str(overlay), "--model", "/no/such/pair")

    def test_overlay_of_a_kind_that_can_only_be_read(self, capsys, example, tmp_path):
        self.check(capsys, "name a file such as overlay.png", example, QUESTION, "--show", str(tmp_path / "o.psd"))

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
        sentence = "is neither a layer's index nor a fraction of the depth"
        self.check(capsys, sentence, example, QUESTION, "--prune-layer", layer)
