from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_families import picture

from transformers_sgl.cli import main

QUESTION = "describe the red triangle."


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
            (("https://example.org/cat.png", QUESTION), "The image is a URL: download it"),
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

    def test_a_still_picture_is_no_video(self, capsys, example, tmp_path):
        page = tmp_path / "page.html"
        code, out, err = self.visualize(capsys, example, QUESTION, "--video", "--out", str(page))
        assert (code, out) == (2, "")
        assert err == f"transformers-sgl: {example!r} is a still picture: leave out --video.\n"
        assert not page.exists()

    def test_frames_of_several_sizes(self, capsys, tmp_path):
        for side in (20, 30):
            picture(side, side).save(tmp_path / f"{side}.png")
        code, _, err = self.visualize(capsys, "--video", str(tmp_path), "what?", "--out", str(tmp_path / "page.html"))
        assert (code, err.count("\n")) == (2, 1)
        assert "of several sizes" in err
        assert not (tmp_path / "page.html").exists()
