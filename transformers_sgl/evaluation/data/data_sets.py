"""Questions in a data set that the `datasets` library can load, without remote code."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from transformers_sgl.evaluation.data.samples import UNREADABLE, Sample, check_image, checked_choices, unreadable

__all__ = ["load_data_set"]

# What a data set may call what we look for, if nothing else is said.
_DEFAULT_COLUMNS = {
    "image": ("image",),
    "question": ("question",),
    "answers": ("answers", "answer"),
    "choices": ("choices", "options"),
    "kind": ("kind",),
}
_OPTIONAL_COLUMNS = ("choices", "kind")


def load_data_set(
    name: str, source: str, split: str, columns: Mapping[str, str], draw: Callable[[int], list[int]]
) -> list[Sample]:
    """Samples of the rows that `draw` chooses of all; see [`load_samples`]."""
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
    question, choices = row["question"], _row_choices(row.get("choices"), named.get("choices", ""), where)
    if not isinstance(question, str) or not question.strip():
        column = named["question"]
        raise ValueError(f"{where}: column `{column}` is {question!r}; `question` must be a string that is not blank.")
    image, image_id = _row_image(row["image"], named["image"], folder, where)
    return checked_choices(
        Sample(
            image=image or partial(_fetch_image, rows, place, named["image"]),
            question=question,
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
        except UNREADABLE as error:
            raise unreadable(content, where, error) from error
        return None, hashlib.sha256(content).hexdigest()
    if path is None:
        found = "empty" if value is None else f"of type {type(value).__name__}"
        raise ValueError(
            f"{where}: column `{column}` is {found}; `image` must be one image, its bytes, or the path of its file; "
            "name another column or leave the row out."
        )
    check_image(folder / path, where)
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
