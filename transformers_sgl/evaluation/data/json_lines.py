"""Questions in a file, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers_sgl.evaluation.data.samples import Sample, check_image, checked_choices

__all__ = ["read_samples"]


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
        check_image(image, where)
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
    return checked_choices(
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
