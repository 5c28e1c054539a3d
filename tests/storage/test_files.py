"""Files are whole or not there, folders belong to one process at a time, and a refusal names the place."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transformers_sgl.storage import files
from transformers_sgl.storage.files import append, locked, write_atomically, writing

pytestmark = pytest.mark.mechanics

FULL = OSError(errno.ENOSPC, "No space left on device")


def in_another_process(body: Callable[[], Any]) -> int:
    """Starts the body in a copy of this process and returns its number."""
    number = os.fork()
    if number == 0:
        try:
            body()
        finally:
            os._exit(1)  # never back into the tests
    return number


def held_by_another_process(folder: Path) -> int:
    """Starts a process that holds the folder, and returns its number."""
    read, write = os.pipe()

    def hold() -> None:
        with locked(folder):
            (folder / ".saving-half").mkdir()
            os.write(write, b"!")
            time.sleep(60)

    number = in_another_process(hold)
    os.read(read, 1)
    return number


def killed(number: int) -> None:
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)


class TestLocked:
    def test_only_one_at_a_time(self, tmp_path: Path) -> None:
        inside, most = [], []

        def enter(name: int) -> None:
            for _ in range(5):
                with locked(tmp_path / "new"):
                    inside.append(name)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.remove(name)

        threads = [threading.Thread(target=enter, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1] * 20
        assert list((tmp_path / "new").iterdir()) == []

    def test_a_busy_folder_is_refused_and_left_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "_PATIENCE_S", 0.1)
        holder = held_by_another_process(tmp_path)
        try:
            with pytest.raises(OSError, match="come later"), locked(tmp_path, busy="come later"):
                raise AssertionError("two are inside")
            assert (tmp_path / ".saving-half").is_dir()
        finally:
            killed(holder)

    def test_what_a_killed_process_left_is_removed_by_the_next(self, tmp_path: Path) -> None:
        killed(held_by_another_process(tmp_path))
        assert {path.name for path in tmp_path.iterdir()} == {".saving-half", ".saving-lock"}
        with locked(tmp_path, busy="come later"):
            assert {path.name for path in tmp_path.iterdir()} == {".saving-lock"}
        assert list(tmp_path.iterdir()) == []

    def test_the_second_waits_for_the_end_of_the_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "_PATIENCE_S", 0.1)
        holder = held_by_another_process(tmp_path)
        timer = threading.Timer(0.4, killed, [holder])
        timer.start()
        start = time.monotonic()
        with locked(tmp_path):
            assert time.monotonic() - start > 0.3
        timer.join()

    def test_where_the_first_fails_the_second_makes_the_folder_anew(self, tmp_path: Path) -> None:
        folder, first_is_inside = tmp_path / "new", threading.Event()

        def fail() -> None:
            with pytest.raises(KeyError), locked(folder):
                first_is_inside.set()
                time.sleep(0.1)
                raise KeyError

        thread = threading.Thread(target=fail)
        thread.start()
        first_is_inside.wait()
        with locked(folder):
            (folder / "file").write_text("whole")
        thread.join()
        assert [path.name for path in folder.iterdir()] == ["file"]

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match=r"'.*file/in' cannot be written: Not a directory\. To go on, name another"):
            locked(tmp_path / "file" / "in").__enter__()


class TestWriting:
    @pytest.mark.parametrize(
        ("number", "cure"),
        [
            (errno.ENOSPC, "make room there, or name another place"),
            (errno.EROFS, "change its permissions, or name another place"),
            (errno.EIO, "name another place"),
        ],
    )
    def test_what_the_system_says_is_told_with_the_place_and_a_cure(
        self, tmp_path: Path, number: int, cure: str
    ) -> None:
        with (
            pytest.raises(OSError, match=r"pair' cannot be written: .*\. To go on, ") as caught,
            writing(Path("pair")),
        ):
            raise OSError(number, os.strerror(number))
        assert str(caught.value) == f"'pair' cannot be written: {os.strerror(number)}. To go on, {cure}."

    @pytest.mark.parametrize("before", ["", "Error while serializing: I/O error: "])
    def test_what_rust_says_is_the_systems_too(self, before: str) -> None:
        with pytest.raises(OSError, match=r"'x' cannot be written: No space left .* make room"), writing(Path("x")):
            raise Exception(f"{before}No space left on device (os error 28)")

    @pytest.mark.parametrize("error", [ValueError("no"), OSError("a sentence"), KeyboardInterrupt()], ids=repr)
    def test_everything_else_passes(self, error: BaseException) -> None:
        with pytest.raises(type(error)) as caught, writing(Path("x")):
            raise error
        assert caught.value is error


def test_a_line_that_does_not_fit_is_told_with_its_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    with pytest.raises(OSError, match=r"'/dev/full' cannot be written: No space left on device\."):
        append(Path("/dev/full"), "a line\n")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_does_not_fit_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*args: Any) -> None:
        raise FULL

    file = tmp_path / "settings.json"
    file.write_text("old")
    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OSError, match=r"settings\.json' cannot be written: No space left on device\. To go on, make"):
        write_atomically(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("settings.json", "old")]
