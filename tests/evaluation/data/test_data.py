from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pytest
from evaluate_tiny_pair import scene_samples
from PIL import Image

from transformers_sgl.evaluation import Scenes
from transformers_sgl.evaluation.data import Sample, load_samples, read_samples


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "images" / "dot.png"
    path.parent.mkdir()
    Image.new("L", (8, 8), 200).save(path)
    return path


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def encoded(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(content, "PNG")
    return content.getvalue()


# ----------------------------------------------------------------------------------------------------------- built in


class TestBuiltIn:
    def test_easy_vqa(self) -> None:
        samples = load_samples("easy-vqa")
        assert len(samples) == 9673
        assert {sample.kind for sample in samples} == {"yes/no", "other"}
        assert all((sample.kind == "yes/no") == (sample.answers[0] in ("yes", "no")) for sample in samples)
        assert len({sample.image_id for sample in samples}) == len({sample.image for sample in samples}) == 1000
        assert samples[0].open_image().size == (64, 64)
        assert samples == load_samples("easy-vqa:test")
        assert not {s.image_id for s in samples} & {s.image_id for s in load_samples("easy-vqa:train", limit=999)}

    def test_scenes_are_those_of_the_embedded_pair_s_tables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers_sgl.evaluation.data.load._NUM_DRAWN", 200)
        samples = load_samples("scenes")
        for sample, theirs in zip(samples, scene_samples("test", 200, questions_per_scene=1), strict=True):
            assert (sample.question, sample.answers) == (theirs.question, theirs.answers)
            assert sample.kind == theirs.kind
            assert np.array_equal(np.asarray(sample.open_image()), np.asarray(theirs.open_image()))

    def test_there_are_two_thousand_scenes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("transformers_sgl.evaluation.data.scenes.render", lambda *_: Image.new("RGB", (128, 128)))
        samples = load_samples("scenes")
        assert [sample.image_id for sample in samples] == [f"scenes/test/{index}" for index in range(2000)]
        assert {"yes/no", "negated", "label"} <= {sample.kind for sample in samples}

    def test_thresholds_are_set_on_other_scenes(self) -> None:
        objects = {split: {Scenes(split)[index].objects for index in range(50)} for split in ("test", "calibration")}
        assert not objects["test"] & objects["calibration"]
        [sample] = load_samples("scenes:calibration", limit=1)
        assert sample.image_id.startswith("scenes/calibration/")

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            ("easy-vqa:val", {}, "easy-vqa has no split 'val': take one of test, train"),
            ("scenes:val", {}, "scenes has no split 'val': take one of test, calibration, train"),
            ("scenes", {"columns": {"image": "picture"}}, "'scenes' has no columns to be named"),
            ("easy-vqa", {"limit": 0}, "`limit` is 0: pass a whole number of 1 or more"),
        ],
    )
    def test_what_there_is_not(self, name: str, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_samples(name, **arguments)

    def test_a_limit_draws_at_random_and_keeps_the_order(self) -> None:
        whole = [sample.where for sample in load_samples("easy-vqa")]
        some = [sample.where for sample in load_samples("easy-vqa", limit=100)]
        assert some == sorted(some, key=whole.index)
        assert some[-1] in whole[5000:]
        assert set(some) <= {sample.where for sample in load_samples("easy-vqa", limit=200)}
        assert set(some) != {sample.where for sample in load_samples("easy-vqa", limit=100, seed=1)}
        assert len(load_samples("easy-vqa", limit=10_000)) == 9673


# --------------------------------------------------------------------------------------------------------- JSON lines


class TestLines:
    good: ClassVar = {"image": "images/dot.png", "question": "what is it?", "answer": "a dot"}

    def test_paths_start_from_the_file_or_are_absolute(self, tmp_path: Path, picture: Path) -> None:
        several = {"image": str(picture), "question": "wo?\u2028", "answers": ["hier", "da"]}
        path = write_lines(tmp_path / "data.jsonl", self.good, "", several)
        first, second = read_samples(path)
        assert first.image == second.image == picture
        assert (first.question, first.answers) == ("what is it?", ("a dot",))
        assert (second.question, second.answers) == ("wo?\u2028", ("hier", "da"))
        assert second.where == f"'{path}', line 3"
        assert (first.choices, first.kind, first.prompt) == ((), "", first.question)
        assert load_samples(str(path)) == [first, second]
        assert load_samples(str(path), limit=1)[0] in (first, second)

    def test_one_image_has_one_id(self, tmp_path: Path, picture: Path) -> None:
        (tmp_path / "link.png").symlink_to(picture)
        lines = [{**self.good, "image": name} for name in ("images/../images/dot.png", "link.png", str(picture))]
        samples = read_samples(write_lines(tmp_path / "data.jsonl", *lines))
        assert {sample.image_id for sample in samples} == {str(picture)}

    def test_choices_stand_behind_the_question(self, tmp_path: Path, picture: Path) -> None:
        line = {**self.good, "answer": "B", "choices": ["a line", "a dot"], "kind": "shape"}
        (sample,) = read_samples(write_lines(tmp_path / "data.jsonl", line))
        assert sample.prompt == "what is it?\nA. a line\nB. a dot"
        assert (sample.answers, sample.choices, sample.kind) == (("B",), ("a line", "a dot"), "shape")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "this is no JSON"),
            ('["image"]', "this is no JSON object"),
            ({"question": "?", "answer": "a"}, "the field `image` is missing"),
            ({**good, "image": 3}, "`image` is 3; give a string"),
            ({"image": "images/dot.png", "answer": "a"}, "the field `question` is missing"),
            ({**good, "question": " "}, "`question` is ' '; give a string"),
            ({"image": "images/dot.png", "question": "?"}, "the field `answers` is missing"),
            ({**good, "answers": ["a"]}, "both `answers` and `answer` are given"),
            ({**good, "answer": ["a"]}, r"`answer` is \['a'\]; give a string"),
            ({"image": "images/dot.png", "question": "?", "answers": []}, r"`answers` is \[\]; give a list"),
            ({"image": "images/dot.png", "question": "?", "answers": "a"}, "`answers` is 'a'; give a list"),
            ({"image": "images/dot.png", "question": "?", "answers": ["a", 1]}, r"`answers` is \['a', 1\]"),
            ({**good, "choices": "a line"}, "`choices` is 'a line'; give a list"),
            ({**good, "choices": ["a line", "C"]}, r"The right answers \['a dot'\] are not all among the choices"),
            ({**good, "choices": ["a dot"] * 27}, "27 are given"),
            ({**good, "kind": ""}, "`kind` is ''; give a string"),
        ],
    )
    def test_a_malformed_line_is_named(self, tmp_path: Path, picture: Path, line: Any, message: str) -> None:
        path = write_lines(tmp_path / "data.jsonl", self.good, line)
        with pytest.raises(ValueError, match=f"data.jsonl', line 2: .*{message}"):
            read_samples(path)

    def test_a_missing_image_is_named(self, tmp_path: Path, picture: Path) -> None:
        path = write_lines(tmp_path / "data.jsonl", self.good, {**self.good, "image": "no.png"})
        with pytest.raises(OSError, match="data.jsonl', line 2: `image` names .*no.png', but there is no such file"):
            read_samples(path)

    def test_what_is_no_image_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("no picture")
        path = write_lines(tmp_path / "data.jsonl", {**self.good, "image": "text.png"})
        with pytest.raises(OSError, match="data.jsonl', line 1: .* which cannot be read as an image"):
            read_samples(path)

    def test_an_image_is_opened_as_rgb_and_named_if_it_is_damaged(self, tmp_path: Path, picture: Path) -> None:
        (sample,) = read_samples(write_lines(tmp_path / "data.jsonl", self.good))
        assert sample.open_image().mode == "RGB"
        picture.write_bytes(picture.read_bytes()[:40])
        with pytest.raises(OSError, match="data.jsonl', line 1: `image` names .*dot.png', which cannot be read"):
            sample.open_image()

    def test_there_must_be_data(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="There is no data file"):
            read_samples(tmp_path / "data.jsonl")
        with pytest.raises(ValueError, match="is empty"):
            read_samples(write_lines(tmp_path / "data.jsonl", ""))
        (tmp_path / "data.jsonl").write_bytes(b"\xff\xfe{")
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            read_samples(tmp_path / "data.jsonl")


# ------------------------------------------------------------------------------------------------ the datasets library


class TestDatasets:
    def saved(self, path: Path, **columns: list[Any]) -> str:
        datasets.Dataset.from_dict(columns).save_to_disk(str(path / "set"))
        return str(path / "set")

    def one(self, path: Path, **columns: Any) -> Sample:
        """The only sample of a set whose image and question are right."""
        row = {"image": encoded(1), "question": "?", "answer": "a", **columns}
        (sample,) = load_samples(self.saved(path, **{name: [value] for name, value in row.items()}))
        return sample

    @pytest.mark.parametrize("form", ["features", "bytes", "paths", "structs"])
    def test_images_come_in_several_forms(self, tmp_path: Path, form: str) -> None:
        contents = [encoded(shade) for shade in (10, 20, 10)]
        paths = [f"{index}.png" for index in range(3)]
        for path, content in zip(paths, contents, strict=True):
            (tmp_path / path).write_bytes(content)
        images: list[Any] = {
            "features": [Image.open(io.BytesIO(content)) for content in contents],
            "bytes": contents,
            "paths": [str(tmp_path / path) for path in paths],
            "structs": [{"bytes": content, "path": "lost.png"} for content in contents],
        }[form]
        name = self.saved(tmp_path, image=images, question=["a?", "b?", "c?"], answer=["x", "y", "z"])
        samples = load_samples(name)
        assert [sample.open_image().getpixel((0, 0)) for sample in samples] == [(10, 0, 0), (20, 0, 0), (10, 0, 0)]
        assert [(s.question, s.answers) for s in samples] == [("a?", ("x",)), ("b?", ("y",)), ("c?", ("z",))]
        assert samples[1].where == f"'{name}', row 1"
        if form == "paths":
            assert [sample.image_id for sample in samples] == [str((tmp_path / path).resolve()) for path in paths]
        elif form != "features":  # a new encoding has bytes of its own
            assert [sample.image_id for sample in samples] == [hashlib.sha256(c).hexdigest() for c in contents]
        assert (samples[0].image_id == samples[2].image_id) == (form != "paths")
        assert samples[0].image_id != samples[1].image_id
        (one,) = load_samples(name, limit=1)
        original = samples[int(one.where[-1])]
        assert (one.where, one.question) == (original.where, original.question)
        assert one.open_image().tobytes() == original.open_image().tobytes()

    @pytest.mark.parametrize(
        ("value", "choices", "answers"),
        [
            ("red", None, ("red",)),
            (3, None, ("3",)),
            (["red", "", "dark red"], None, ("red", "", "dark red")),
            ([{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}], None, ("red", "blue")),
            (1, ["x", "y"], ("B",)),
            ("1", ["x", "y"], ("B",)),
            ("1", ["3", "2", "1"], ("1",)),
            ("y", ["x", "y"], ("y",)),
            ("A", ["x", "y"], ("A",)),
            ([0, 1], ["x", "y"], ("A", "B")),
            ("red", [], ("red",)),
        ],
    )
    def test_answers_come_in_several_forms(
        self, tmp_path: Path, value: Any, choices: list[str] | None, answers: tuple[str, ...]
    ) -> None:
        sample = self.one(tmp_path, answer=value, options=choices)
        assert (sample.answers, sample.choices) == (answers, tuple(choices or ()))

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"answer": None}, "column `answer` is None; `answers` must be a string that is not blank"),
            ({"answer": " "}, "column `answer` is ' '; `answers` must be"),
            ({"answer": True}, "column `answer` is True; `answers` must be"),
            ({"answer": [{"text": "red"}]}, "`answers` must be a string .* a list of objects with `answer`"),
            ({"answer": ["a", None]}, r"column `answer` is \['a', None\]; `answers` must be"),
            ({"answer": 2, "choices": ["x", "y"]}, "is 2, but there are 2 choices, counted from 0; correct it or"),
            ({"answer": -1, "choices": ["x", "y"]}, r"The right answers \['-1'\] are not all among the choices"),
            ({"answer": "z", "choices": ["x", "y"]}, r"The right answers \['z'\] are not all among the choices"),
            ({"choices": ["x", " "]}, r"column `choices` is \['x', ' '\]; `choices` must be a list of strings"),
            ({"choices": "x"}, "column `choices` is 'x'; `choices` must be a list of strings"),
            ({"question": 5}, "column `question` is 5; `question` must be a string that is not blank"),
            ({"image": None}, "column `image` is empty; `image` must be one image, its bytes, or the path"),
            ({"image": [encoded(1)]}, "column `image` is of type list; `image` must be one image"),
        ],
    )
    def test_a_malformed_row_is_named(self, tmp_path: Path, columns: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=f"set', row 0: .*{message}"):
            self.one(tmp_path, **columns)

    def test_what_is_no_image_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(
            OSError, match="set', row 0: the image cannot be read .it is none.; replace it or leave the"
        ):
            self.one(tmp_path, image=b"no picture")
        with pytest.raises(OSError, match="set', row 0: `image` names .*no.png', but there is no such file"):
            self.one(tmp_path / "other", image="no.png")
        sample = self.one(tmp_path / "third", image=encoded(1)[:45])
        with pytest.raises(OSError, match="set', row 0: the image cannot be read"):
            sample.open_image()

    def test_columns_are_named(self, tmp_path: Path) -> None:
        rows = {"picture": [encoded(1)], "query": ["?"], "label": ["a"], "group": [7], "image": [None], "answer": [""]}
        name = self.saved(tmp_path, **rows)
        named = {"image": "picture", "question": "query", "answers": "label", "kind": "group"}
        (sample,) = load_samples(name, columns=named)
        assert (sample.question, sample.answers, sample.kind) == ("?", ("a",), "7")
        with pytest.raises(ValueError, match="no column 'question' for `question`: name one of picture, query, label"):
            load_samples(name)
        with pytest.raises(ValueError, match="no column 'options' for `choices`"):
            load_samples(name, columns={**named, "choices": "options"})
        with pytest.raises(ValueError, match="`columns` names picture: it can name image, question, answers, choices"):
            load_samples(name, columns={"picture": "image"})

    def test_a_split_is_named_where_there_are_several(self, tmp_path: Path) -> None:
        parts = {
            split: datasets.Dataset.from_dict({"image": [encoded(1)], "question": [split], "answer": ["a"]})
            for split in ("train", "test")
        }
        name = str(tmp_path / "sets")
        datasets.DatasetDict(parts).save_to_disk(name)
        assert load_samples(f"{name}:test")[0].question == "test"
        with pytest.raises(ValueError, match="sets' has several splits: put one of train, test behind a colon"):
            load_samples(name)
        with pytest.raises(ValueError, match="sets' has no split 'val': put one of train, test behind a colon"):
            load_samples(f"{name}:val")
        with pytest.raises(ValueError, match="set' has no splits: leave 'test' out"):
            load_samples(self.saved(tmp_path, question=["?"]) + ":test")

    def test_parquet_files_and_folders(self, tmp_path: Path) -> None:
        rows = {"image": [Image.new("RGB", (8, 8), (30, 0, 0))], "question": ["?"], "answers": [["a", "b"]]}
        (tmp_path / "folder").mkdir()
        file = tmp_path / "folder" / "test.parquet"
        datasets.Dataset.from_dict(rows).to_parquet(str(file))
        for name in (str(file), f"{file}:val", f"{file.parent}:test", str(file.parent)):
            (sample,) = load_samples(name)
            assert sample.answers == ("a", "b")
            assert sample.open_image().getpixel((0, 0)) == (30, 0, 0)
        file.write_bytes(b"no parquet")
        with pytest.raises((OSError, ValueError), match=f"The data set '{file}' cannot be loaded: "):
            load_samples(str(file))

    def test_what_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="'no/set' cannot be loaded: there is no such file or folder; give org/data"):
            load_samples("no/set")
        with pytest.raises(OSError, match="'no/set:test' cannot be loaded: "):
            load_samples("no/set:test")

    def test_a_config_is_named_behind_the_data_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = datasets.Dataset.from_dict({"image": [encoded(1)], "question": ["?"], "answer": ["a"]})
        asked = []

        def load_dataset(*arguments: Any, **named: Any) -> datasets.Dataset:
            asked.append((*arguments, named))
            return rows

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert len(load_samples("org/set:test")) == len(load_samples("org/set/small:test[:10]")) == 1
        assert asked == [("org/set", None, {"split": "test"}), ("org/set", "small", {"split": "test[:10]"})]

    def test_it_says_what_it_needs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"'org/set:test' is loaded .*`pip install 'transformers_sgl\[evaluate"):
            load_samples("org/set:test")
