"""Data: questions about images whose answers are known, from wherever they come.

[`load_samples`] takes a name and gives a list of [`Sample`]:

- `easy-vqa`, `scenes`: built in, so that there is something to measure on without a download.
- `questions.jsonl`: a file of JSON objects, one a line, read by [`read_samples`].
- `org/dataset:split`, or a local folder or Parquet file: what the `datasets` library can load, without remote code.

Read top to bottom: what a sample is; the names; then one part for each kind of source. Whatever is wrong with the data
is said in one sentence that names the line or row, before any model is loaded. Only images are opened later, one by
one, because a set of them need not fit into memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from transformers_sgl.evaluation.easy_vqa import load_easy_vqa
from transformers_sgl.evaluation.metrics import choice_accuracy
from transformers_sgl.evaluation.scenes import Scenes

__all__ = ["Sample", "load_samples", "read_samples"]

_EASY_VQA_SPLITS = ("test", "train")
_SCENES_SPLITS = ("test", "calibration", "train")
_NUM_SCENES = 2000
# What a data set may call what we look for, if nothing else is said.
_DEFAULT_COLUMNS = {
    "image": ("image",),
    "question": ("question",),
    "answers": ("answers", "answer"),
    "choices": ("choices", "options"),
    "kind": ("kind",),
}
_OPTIONAL_COLUMNS = ("choices", "kind")
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Sample:
    """A question about an image, with the answers that count as right.

    Attributes:
        image: The image, its file, or a function that fetches it.
        question: The question.
        answers: The right answers; for multiple choice letters or texts of choices.
        choices: The choices in the order of their letters; empty for an open question.
        kind: The row of the tables that the question counts in, such as `"yes/no"`.
        image_id: The same for all questions about one image, as far as that can be known.
        where: Where it was read from, in the words of an error message.
    """

    image: Path | Image.Image | Callable[[], Image.Image]
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""
    image_id: str = ""
    where: str = ""

    @property
    def prompt(self) -> str:
        """The question, with the choices behind it, each on a line of its own.

        Example:
            ```python
            >>> from pathlib import Path
            >>> from transformers_sgl.evaluation.data import Sample

            >>> print(Sample(Path("zoo.png"), "what is it?", ("B",), choices=("a cat", "a dog")).prompt)
            what is it?
            A. a cat
            B. a dog

            ```
        """
        lines = (f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, self.choices, strict=False))
        return "\n".join((self.question, *lines))

    def open_image(self) -> Image.Image:
        """Fetches and decodes the image.

        Returns:
            `PIL.Image.Image`: The image, RGB.

        Raises:
            OSError: If it cannot be read.
        """
        try:
            if isinstance(self.image, Path):
                with Image.open(self.image) as image:
                    return image.convert("RGB")
            return (self.image if isinstance(self.image, Image.Image) else self.image()).convert("RGB")
        except _UNREADABLE as error:
            raise _unreadable(self.image, self.where, error) from error


def load_samples(
    name: str, *, columns: Mapping[str, str] | None = None, limit: int | None = None, seed: int = 0
) -> list[Sample]:
    """Loads questions by the name of their source.

    Args:
        name (`str`): `"easy-vqa"` (its test split) or `"easy-vqa:train"`; `"scenes"` (2,000 scenes that no training
            has seen, with one question each), `"scenes:calibration"` (as many others) or `"scenes:train"`; a file
            whose name ends in `.jsonl`, as for [`read_samples`]; `"org/dataset:split"` or `"org/dataset/config:split"`
            on the Hugging Face Hub; or `"path:split"` for a local folder or `.parquet` file that `datasets` can load,
            without the split if there is but one.
        columns (`Mapping[str, str]`, *optional*): How a data set calls its columns, by our names: `image`, `question`,
            `answers`, `choices` and `kind`. By default they are called so, or `answer` and `options`.
        limit (`int`, *optional*): The greatest number of samples, drawn at random and kept in their order; `None` for
            all.
        seed (`int`, *optional*, defaults to 0): What the draw depends on. A larger limit only adds to it.

    Returns:
        `list[Sample]`: The samples, in the order of the source.

    Raises:
        ImportError: If a package that holds or reads the data is not installed.
        OSError: If the source or an image is not there or cannot be read.
        ValueError: If an argument, a line or a row is not what it should be; the sentence names it.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.data import load_samples

        >>> sample = load_samples("easy-vqa")[0]
        >>> sample.question, sample.answers, sample.image_id
        ('what is the red shape?', ('triangle',), 'easy-vqa/test/0')

        ```
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}: pass a whole number of 1 or more, or None for all samples.")
    draw = partial(_draw, limit=limit, seed=seed)
    source, _, split = name.partition(":")
    built_in = source in ("easy-vqa", "scenes")
    if columns and (built_in or name.endswith(".jsonl")):
        raise ValueError(f"{name!r} has no columns to be named: leave `columns` out.")
    if source == "easy-vqa":
        return _easy_vqa(_known_split(source, split, _EASY_VQA_SPLITS), draw)
    if source == "scenes":
        return _scenes(_known_split(source, split, _SCENES_SPLITS), draw)
    if name.endswith(".jsonl"):
        samples = read_samples(name)
        return [samples[index] for index in draw(len(samples))]
    return _data_set(name, source, split, columns or {}, draw)


def _draw(number: int, limit: int | None, seed: int) -> list[int]:
    """Which of so many samples are taken, in their order."""
    if limit is None or limit >= number:
        return list(range(number))
    return sorted(np.random.default_rng(seed).permutation(number)[:limit].tolist())


_Draw = Callable[[int], list[int]]


# ----------------------------------------------------------------------------------------------------------- built in


def _known_split(source: str, split: str, known: Sequence[str]) -> str:
    if split and split not in known:
        raise ValueError(f"{source} has no split {split!r}: take one of {', '.join(known)}.")
    return split or known[0]


def _easy_vqa(split: str, draw: _Draw) -> list[Sample]:
    questions = load_easy_vqa(split)
    return [
        Sample(
            image=questions[index].image_path,
            question=questions[index].question,
            answers=(questions[index].answer,),
            kind="yes/no" if questions[index].is_yes_no else "other",
            image_id=f"easy-vqa/{split}/{questions[index].image_id}",
            where=f"'easy-vqa:{split}', row {index}",
        )
        for index in draw(len(questions))
    ]


def _scenes(split: str, draw: _Draw) -> list[Sample]:
    # One question a scene, so that the samples are independent. A few scenes allow no question of some kind, so a
    # spare one is drawn.
    scenes = Scenes(split, questions_per_scene=2, length=_NUM_SCENES)
    samples = []
    for index in draw(len(scenes)):
        scene = scenes[index]
        question = scene.questions[0]
        samples.append(
            Sample(
                image=scene.image,
                question=question.question,
                answers=(question.answer,),
                kind=question.kind.replace("_", "/"),
                image_id=f"scenes/{split}/{index}",
                where=f"'scenes:{split}', row {index}",
            )
        )
    return samples


# --------------------------------------------------------------------------------------------------------- JSON lines


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """Reads questions, one JSON object a line: `image`, `question`, and `answers` (a list) or `answer`.

    A multiple-choice question also has `choices`, a list of strings; `kind` names the row of the tables that the
    question counts in.

    Args:
        path (`str` or `os.PathLike`): The file. Images are named by absolute paths or from the file's folder.

    Returns:
        `list[Sample]`: The samples, in the order of the lines; blank lines are passed over.

    Raises:
        OSError: If the file or an image is not there or is no image.
        ValueError: If a line is not what it should be; the sentence names the line and the field.
    """
    path = Path(path)
    if not path.is_file():
        raise OSError(f"There is no data file {str(path)!r}: name one with a JSON object on each line.")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"The data file {str(path)!r} is not UTF-8 text ({error}): save it as such.") from error
    samples = [
        _read_sample(line, path.parent, f"{str(path)!r}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not samples:
        raise ValueError(f"The data file {str(path)!r} is empty: write a JSON object on each line.")
    wheres = {sample.image: sample.where for sample in reversed(samples) if isinstance(sample.image, Path)}
    for image, where in wheres.items():
        _check_image(image, where)
    return samples


def _read_sample(line: str, folder: Path, where: str) -> Sample:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: this is no JSON ({error}); write one JSON object on each line.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: this is no JSON object; write one with `image`, `question` and `answers`.")
    if ("answers" in fields) == ("answer" in fields):
        problem = "both `answers` and `answer` are given" if "answer" in fields else "the field `answers` is missing"
        raise ValueError(f"{where}: {problem}; give `answers`, a list of strings, or `answer`, one string.")
    answers = [_text(fields, "answer", where)] if "answer" in fields else _texts(fields, "answers", where)
    image = folder / _text(fields, "image", where)  # an absolute path stays what it is
    return _checked_choices(
        Sample(
            image=image,
            question=_text(fields, "question", where),
            answers=tuple(answers),
            choices=tuple(_texts(fields, "choices", where)) if "choices" in fields else (),
            kind=_text(fields, "kind", where) if "kind" in fields else "",
            image_id=str(image.resolve()),
            where=where,
        )
    )


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    if name not in fields:
        raise ValueError(f"{where}: the field `{name}` is missing; give it as a string.")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: `{name}` is {value!r}; give a string that is not blank.")
    return value


def _texts(fields: Mapping[str, Any], name: str, where: str) -> list[str]:
    values = fields[name]
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(f"{where}: `{name}` is {values!r}; give a list of one or more strings, none of them blank.")
    return values


def _checked_choices(sample: Sample) -> Sample:
    """The sample, if its right answers are among its choices, where it has any."""
    if sample.choices:
        try:
            choice_accuracy("", sample.answers, sample.choices)
        except ValueError as error:
            raise ValueError(f"{sample.where}: {error}") from error
    return sample


def _check_image(path: Path, where: str) -> None:
    """Finds what is missing or no image at all; only the head of the file is read."""
    if not path.is_file():
        raise OSError(
            f"{where}: `image` names {str(path)!r}, but there is no such file; give a path that is absolute or starts "
            "from the data file's folder."
        )
    try:
        with Image.open(path):
            pass
    except _UNREADABLE as error:
        raise _unreadable(path, where, error) from error


def _unreadable(image: object, where: str, error: Exception) -> OSError:
    if isinstance(image, Path):
        return OSError(
            f"{where}: `image` names {str(image)!r}, which cannot be read as an image ({error}); replace it or leave "
            "the line out."
        )
    reason = "it is none" if isinstance(error, UnidentifiedImageError) else error  # whose text names an address
    return OSError(f"{where}: the image cannot be read ({reason}); replace it or leave the row out.")


# ------------------------------------------------------------------------------------------------ the datasets library


def _data_set(name: str, source: str, split: str, columns: Mapping[str, str], draw: _Draw) -> list[Sample]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"The data set {name!r} is loaded with the library datasets ({error}): run "
            "`pip install 'transformers_sgl[evaluate]'`."
        ) from error
    rows = _open_data_set(datasets, name, source, split)
    named = _found_columns(rows, columns, name)
    indices = draw(len(rows))
    # Images stay encoded until they are asked for; whatever else a row holds is not read at all.
    rows = rows.select(indices).select_columns(sorted(set(named.values())))
    if isinstance(rows.features[named["image"]], datasets.Image):
        rows = rows.cast_column(named["image"], datasets.Image(decode=False))
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    return [_row_sample(rows, place, named, folder, f"{name!r}, row {index}") for place, index in enumerate(indices)]


def _open_data_set(datasets: Any, name: str, source: str, split: str) -> Any:
    """The rows of one split, wherever they lie."""
    path = Path(source)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            found = datasets.load_from_disk(source)
        elif path.is_file():
            # A file is the split that it is said to be.
            found = datasets.load_dataset("parquet", data_files={split or "train": source})
        elif path.is_dir():
            found = datasets.load_dataset(source)
        else:
            organisation, _, rest = source.partition("/")
            repository, _, config = rest.partition("/")
            if not repository or not split:
                raise OSError(
                    "there is no such file or folder; give org/dataset:split for a data set of the Hugging Face Hub"
                )
            return datasets.load_dataset(f"{organisation}/{repository}", config or None, split=split)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        reason = " ".join(str(error).split()).removesuffix(".")
        raise kind(f"The data set {name!r} cannot be loaded: {reason}.") from error
    if not isinstance(found, dict):
        if split:
            raise ValueError(f"The data set {source!r} has no splits: leave {split!r} out.")
        return found
    if split not in found and (split or len(found) > 1):
        wrong = f"has no split {split!r}" if split else "has several splits"
        raise ValueError(f"The data set {source!r} {wrong}: put one of {', '.join(found)} behind a colon.")
    return found[split or next(iter(found))]


def _found_columns(rows: Any, columns: Mapping[str, str], name: str) -> dict[str, str]:
    """The data set's own names of the columns that it has, by ours."""
    unknown = sorted(set(columns) - set(_DEFAULT_COLUMNS))
    if unknown:
        raise ValueError(f"`columns` names {', '.join(unknown)}: it can name {', '.join(_DEFAULT_COLUMNS)}.")
    named = {}
    for ours, defaults in _DEFAULT_COLUMNS.items():
        candidates = (columns[ours],) if ours in columns else defaults
        theirs = next((candidate for candidate in candidates if candidate in rows.column_names), None)
        if theirs is not None:
            named[ours] = theirs
        elif ours in columns or ours not in _OPTIONAL_COLUMNS:
            raise ValueError(
                f"{name!r} has no column {' or '.join(map(repr, candidates))} for `{ours}`: name one of "
                f"{', '.join(rows.column_names)} in `columns`."
            )
    return named


def _row_sample(rows: Any, place: int, named: Mapping[str, str], folder: Path, where: str) -> Sample:
    found = rows[place]
    row = {ours: found[theirs] for ours, theirs in named.items()}
    choices = _row_choices(row.get("choices"), named.get("choices", ""), where)
    image, image_id = _row_image(row["image"], named["image"], folder, where)
    return _checked_choices(
        Sample(
            image=image or partial(_fetch_image, rows, place, named["image"]),
            question=_row_question(row["question"], named["question"], where),
            answers=_row_answers(row["answers"], choices, named["answers"], where),
            choices=choices,
            kind="" if row.get("kind") is None else str(row["kind"]),
            image_id=image_id,
            where=where,
        )
    )


def _row_choices(value: Any, column: str, where: str) -> tuple[str, ...]:
    choices = [] if value is None else value
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(
            f"{where}: column `{column}` is {value!r}; `choices` must be a list of strings, none of them blank."
        )
    return tuple(choices)


def _row_question(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: column `{column}` is {value!r}; `question` must be a string that is not blank.")
    return value


def _row_answers(value: Any, choices: Sequence[str], column: str, where: str) -> tuple[str, ...]:
    """The answers as strings; where there are choices, a whole number that is none of them is the index of one."""
    answers = []
    for item in value if isinstance(value, list) else [value]:
        answer = item.get("answer") if isinstance(item, dict) else item
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        if not isinstance(answer, str):
            break
        if choices and answer.isdecimal() and answer not in choices:
            if int(answer) >= len(choices):
                raise ValueError(
                    f"{where}: column `{column}` is {value!r}, but there are {len(choices)} choices, counted from 0; "
                    "correct it or leave the row out."
                )
            answer = ascii_uppercase[int(answer)]
        answers.append(answer)
    else:
        if any(map(str.strip, answers)):  # of ten people one may have answered nothing
            return tuple(answers)
    raise ValueError(
        f"{where}: column `{column}` is {value!r}; `answers` must be a string that is not blank, a list of such "
        "strings, or a list of objects with `answer`; where there are choices also the index of one."
    )


def _row_image(value: Any, column: str, folder: Path, where: str) -> tuple[Path | None, str]:
    """The image's file, if it is one, and what tells it from other images."""
    content, path = _encoded(value)
    if content is not None:
        try:
            with Image.open(io.BytesIO(content)):
                pass
        except _UNREADABLE as error:
            raise _unreadable(content, where, error) from error
        return None, hashlib.sha256(content).hexdigest()
    if path is None:
        found = "empty" if value is None else f"of type {type(value).__name__}"
        raise ValueError(
            f"{where}: column `{column}` is {found}; `image` must be one image, its bytes, or the path of its file; "
            "name another column or leave the row out."
        )
    _check_image(folder / path, where)
    return folder / path, str((folder / path).resolve())


def _fetch_image(rows: Any, place: int, column: str) -> Image.Image:
    content, _ = _encoded(rows[place][column])
    assert content is not None  # seen when the row was read
    return Image.open(io.BytesIO(content))


def _encoded(value: Any) -> tuple[bytes | None, str | None]:
    """An image's bytes or path, from any of the forms in which a row holds it."""
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    else:
        content = path = value
    return content if isinstance(content, bytes) else None, path if isinstance(path, str) else None
