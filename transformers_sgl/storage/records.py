"""Records: files that survive a run that is cut off.

A run owns a folder. `run.json` says what its records depend on, so that those of another run are never mixed in; the
records are JSON lines, each written whole or not at all, so that a run goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers_sgl.storage.files import write_atomically

__all__ = ["check_claim", "claim", "not_a_record", "read_lines"]

_RECORDS = ("samples.jsonl",)
_ARGUMENT = "out"


def claim(
    folder: Path, facts: dict[str, Any], *, records: Sequence[str] = _RECORDS, argument: str = _ARGUMENT
) -> None:
    """Makes the folder this run's, or raises if it is another's; nothing is touched then."""
    check_claim(folder, facts, complete=True, records=records, argument=argument)
    if not (folder / "run.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "run.json", json.dumps(facts, indent=2) + "\n")


def check_claim(
    folder: Path,
    facts: dict[str, Any],
    *,
    complete: bool = False,
    records: Sequence[str] = _RECORDS,
    argument: str = _ARGUMENT,
) -> None:
    """Raises if the folder is another run's, as far as that is known; nothing is touched.

    Args:
        folder (`Path`): The folder.
        facts (`dict`): What the records depend on.
        complete (`bool`, defaults to `False`): Whether these are all facts, so that one more is a difference.
        records (`Sequence[str]`): Files that only a run has written.
        argument (`str`): The argument that names the folder, for the error's cure.
    """
    cure = f"give another `{argument}`, or delete the folder {str(folder)!r}"
    file = folder / "run.json"
    if not file.exists():
        if any((folder / name).exists() for name in records):
            raise ValueError(f"{str(folder)!r} holds records, but no run.json that says what they are of: {cure}.")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {**found, **facts} if complete else facts
        different = [name for name in names if found.get(name) != facts.get(name)]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as the record of a run: {cure}.") from error
    if different:
        raise ValueError(
            f"{str(folder)!r} holds the records of another run, which differs in {' and '.join(different)}: {cure}."
        )


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of an earlier call. A last line that was cut off is taken away; its sample is run again."""
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            raise not_a_record(file, number, error) from error
        yield number, fields


def not_a_record(file: Path, number: int, error: Exception) -> ValueError:
    """What to raise where a line is not what the run writes."""
    return ValueError(
        f"{str(file)!r}, line {number}: this is no record of a sample ({error}); delete the folder "
        f"{str(file.parent)!r} to run all samples again."
    )
