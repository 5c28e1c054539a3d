"""Questions in a file, one JSON object a line; a line that cannot be used is set aside and stops nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["Question", "open_image", "read_questions", "rejection"]

_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Question:
    """A question about one image or several.

    Attributes:
        index: Its place among the questions of the file, from 0 on.
        line: The number of its line in the file, from 1 on.
        id: What the file calls it; its index if it has no name there.
        images: The image files.
        question: The question.
    """

    index: int
    line: int
    id: str | int
    images: tuple[str, ...]
    question: str


def read_questions(data: bytes, folder: Path) -> tuple[list[Question], list[dict[str, Any]]]:
    """Reads questions: `image` (a path) or `images` (a list of paths), `question`, and perhaps `id`.

    Args:
        data (`bytes`): The content of the file.
        folder (`Path`): The folder from which relative paths start.

    Returns:
        The questions, and a record of each line that is none and why. Blank lines are passed over; all others count,
        so that an index does not change when a line is mended.
    """
    questions: list[Question] = []
    rejected: list[dict[str, Any]] = []
    index = 0
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        name: str | int = index
        try:
            fields = _fields(line)
            name = _name(fields, index)
            questions.append(Question(index, number, name, _images(fields, folder), _text(fields, "question")))
        except ValueError as error:
            rejected.append({"id": name, "index": index, "line": number, "reason": str(error)})
        index += 1
    return questions, rejected


def rejection(question: Question, reason: str) -> dict[str, Any]:
    """The record of a question that gets no answer."""
    return {"id": question.id, "index": question.index, "line": question.line, "reason": " ".join(reason.split())}


def open_image(path: str) -> Image.Image:
    """Reads an image file, or raises `OSError` with one sentence."""
    if not Path(path).is_file():
        raise OSError(
            f"There is no image file {path!r}: give a path that is absolute or starts from the data file's folder."
        )
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except _UNREADABLE as error:
        raise OSError(f"The file {path!r} cannot be read as an image: {error}.") from error


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"This is no JSON ({error}): write one JSON object on each line.") from error
    if not isinstance(fields, dict):
        raise ValueError("This is no JSON object: write one with `image` and `question`.")
    return fields


def _name(fields: dict[str, Any], index: int) -> str | int:
    name = fields.get("id")
    if name is None:
        return index
    if isinstance(name, bool) or not isinstance(name, (str, int)) or not _is_encodable(name):
        raise ValueError(f"`id` is {name!r}: give a string or a whole number, or leave it out.")
    return name


def _images(fields: dict[str, Any], folder: Path) -> tuple[str, ...]:
    if ("image" in fields) == ("images" in fields):
        problem = "Both `image` and `images` are given" if "image" in fields else "The field `image` is missing"
        raise ValueError(f"{problem}: give `image`, one path, or `images`, a list of paths.")
    if "image" in fields:
        return (str(folder / _text(fields, "image")),)  # an absolute path stays what it is
    paths = fields["images"]
    if not isinstance(paths, list) or not paths or not all(_is_text(path) for path in paths):
        raise ValueError(f"`images` is {paths!r}: give a list of one path or more.")
    return tuple(str(folder / path) for path in paths)


def _text(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        raise ValueError(f"The field `{name}` is missing: give it as a string.")
    if not _is_text(fields[name]):
        raise ValueError(f"`{name}` is {fields[name]!r}: give a string that is not blank.")
    return str(fields[name])


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value and _is_encodable(value)


def _is_encodable(value: str | int) -> bool:
    """Whether a value can be written as UTF-8: JSON can spell halves of characters."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True
