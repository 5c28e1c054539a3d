"""The folder of a job: answers and rejections, which survive a job that is cut off."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers_sgl.storage.files import append, write_atomically
from transformers_sgl.storage.records import check_claim, claim, not_a_record, read_lines

__all__ = ["Results"]

_ANSWERS, _REJECTED = "answers.jsonl", "rejected.jsonl"


class Results:
    """The records in a folder, which this process holds alone.

    Records are added in the order in which they come; `finish` puts them into that of the questions. A question has
    one record, whatever is added.

    Args:
        folder: The folder.
        facts: What the records depend on.
        num_questions: The number of questions, bad lines included.

    Raises:
        ValueError: If the folder holds the records of another run, or something else.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], num_questions: int) -> None:
        self.folder, self.facts = folder, facts
        self._owner: dict[str, Any] = {"records": (_ANSWERS, _REJECTED), "argument": "output"}
        check_claim(folder, facts, complete=True, **self._owner)
        self._is_claimed = False
        # The records of earlier calls, by index.
        self.records = {name: self._read(folder / name, num_questions) for name in (_ANSWERS, _REJECTED)}
        for index in self.records[_ANSWERS].keys() & self.records[_REJECTED].keys():
            del self.records[_REJECTED][index]

    @property
    def files(self) -> tuple[Path, Path]:
        """The files of answers and of rejections."""
        return self.folder / _ANSWERS, self.folder / _REJECTED

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The answers in the order of the questions."""
        return _in_order(self.records[_ANSWERS])

    @property
    def num_done(self) -> int:
        """The number of questions with a record."""
        return sum(map(len, self.records.values()))

    def has(self, index: int) -> bool:
        """Whether a question has its record."""
        return any(index in known for known in self.records.values())

    def add(self, answers: Iterable[dict[str, Any]], rejected: Iterable[dict[str, Any]]) -> int:
        """Writes records of questions that have none, and returns their number; what is written stays."""
        if not self._is_claimed:  # not before there is a record: settings that no pair accepts claim no folder
            claim(self.folder, self.facts, **self._owner)
            self._is_claimed = True
        before = self.num_done
        for name, records in ((_ANSWERS, answers), (_REJECTED, rejected)):
            fresh = {record["index"]: record for record in records if not self.has(record["index"])}
            if fresh:
                append(self.folder / name, _lines(fresh.values()))
                self.records[name].update(fresh)
        return self.num_done - before

    def finish(self) -> None:
        """Puts the records into the order of the questions."""
        for name, records in self.records.items():
            text = _lines(_in_order(records))
            file = self.folder / name
            if not file.exists() or file.read_bytes() != text.encode():
                write_atomically(file, text)

    def _read(self, file: Path, num_questions: int) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for number, record in read_lines(file):
            index = record.get("index")
            if not isinstance(index, int) or not 0 <= index < num_questions:
                raise not_a_record(file, number, ValueError(f"there is no question {index!r}"))
            found.setdefault(index, record)
        return found


def _in_order(records: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[index] for index in sorted(records)]


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
