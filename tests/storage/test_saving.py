"""A save is whole or not there: with a second process, on a full disk, and after one that was killed."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_internvl
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl import SGLForConditionalGeneration, SGLProcessor
from transformers_sgl.storage.saving import staged

pytestmark = pytest.mark.mechanics


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tiny_pair(seed: int) -> SGLForConditionalGeneration:
    """A pair all of whose numbers tell its seed."""
    pair = SGLForConditionalGeneration(large=tiny_internvl(), small=tiny_internvl(2, seed=1, hidden_size=16)).eval()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.fill_(seed)
    pair.generation_config.retention_ratio = seed / 10
    return pair


def in_processes(*bodies: Callable[[], Any]) -> list[int]:
    """Runs each body in a copy of this process, all at once; returns how they ended."""
    read, write = os.pipe()
    numbers = []
    for body in bodies:
        if (number := os.fork()) == 0:
            code = 1
            try:
                os.close(write)
                os.read(read, 1)  # until all are there
                body()
                code = 0
            finally:
                os._exit(code)  # never back into the tests
        numbers.append(number)
    os.close(read)
    os.close(write)
    return [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]


def test_two_processes_that_save_into_one_folder_leave_the_pair_of_one(tmp_path: Path) -> None:
    pairs = [tiny_pair(1), tiny_pair(2)]
    for pair, name in zip(pairs, "ab", strict=True):
        pair.save_pretrained(tmp_path / name, max_shard_size="5KB")  # many files: many chances for a mix
    wanted = [contents(tmp_path / name) for name in "ab"]
    winners = set()
    for index in range(15):
        folder = tmp_path / str(index)
        saves = [partial(pair.save_pretrained, folder, max_shard_size="5KB") for pair in pairs]
        assert in_processes(*saves) == [0, 0]
        winners.add(wanted.index(contents(folder)))
    assert winners <= {0, 1}


def test_a_recipe_and_a_bundle_saved_at_once_are_one_or_the_other(embedded_pair_path: Path, tmp_path: Path) -> None:
    pair = AutoModelForImageTextToText.from_pretrained(embedded_pair_path)
    saves: list[Callable[[], Any]] = [pair.save_pretrained, pair.save_recipe]
    one_after_the_other = []
    for order in (saves, saves[::-1]):
        folder = tmp_path / str(len(one_after_the_other))
        for save in order:
            save(folder)
        one_after_the_other.append(contents(folder))
    for index in range(2, 6):
        folder = tmp_path / str(index)
        assert in_processes(*(partial(save, folder) for save in saves)) == [0, 0]
        assert contents(folder) in one_after_the_other


def test_a_save_removes_what_killed_ones_have_left(tmp_path: Path) -> None:
    pair = tiny_pair(1)
    pair.save_pretrained(tmp_path)
    before = contents(tmp_path)

    def die() -> None:
        with staged(tmp_path, "config.json") as staging:
            (staging / "large").mkdir()
            (staging / "large" / "model.safetensors").write_bytes(b"half of the wei")
            os._exit(0)

    for _ in range(3):
        in_processes(die)
        assert {name.split("/")[0].split("-")[0] for name in set(contents(tmp_path)) - set(before)} == {".saving"}
    pair.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("limit", [0, 1_000, 10_000])
def test_on_a_full_disk_the_folder_stays_as_it_was_and_is_named(
    embedded_pair_path: Path, tmp_path: Path, limit: int
) -> None:
    """A limit on the size of a file stops the same writes as a full disk."""
    processor = AutoProcessor.from_pretrained(embedded_pair_path)
    pairs = [tiny_pair(1), tiny_pair(2)]
    pairs[0].save_pretrained(tmp_path / "pair")
    processor.save_pretrained(tmp_path / "pair")
    before = contents(tmp_path / "pair")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        for folder in (tmp_path / "pair", tmp_path / "new" / "one"):
            cause = rf"'{folder}' cannot be written: File too large\. To go on, make room there"
            for save in (pairs[1].save_pretrained, processor.save_pretrained):
                with pytest.raises(OSError, match=cause):
                    save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert contents(tmp_path / "pair") == before
    assert not (tmp_path / "new").exists()
    assert all(torch.all(parameter == 2) for parameter in pairs[1].parameters())


def test_processors_of_a_save_that_was_cut_off_are_refused(embedded_pair_path: Path, tmp_path: Path) -> None:
    AutoProcessor.from_pretrained(embedded_pair_path).save_pretrained(tmp_path)
    AutoModelForImageTextToText.from_pretrained(embedded_pair_path).save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()  # it is taken away first and put in place last
    with pytest.raises(OSError, match=r"A save of the processors in .* was cut off: .* is missing; save them"):
        SGLProcessor.from_pretrained(tmp_path)


def test_a_folders_own_files_tell_that_its_parts_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later save trusts the marker of the processors, so nothing of theirs may be missing where it stands."""
    moved = []
    monkeypatch.setattr("transformers_sgl.storage.saving.os.replace", lambda _, to: moved.append(to))
    with staged(tmp_path, "config.json") as staging:
        (staging / "small").mkdir()
        for name in ("config.json", "a.json", "processor_config.json", "small/tokenizer.json"):
            (staging / name).write_text("{}")
    assert [str(path.relative_to(tmp_path)) for path in moved] == [
        "small/tokenizer.json",
        "a.json",
        "processor_config.json",
        "config.json",
    ]
