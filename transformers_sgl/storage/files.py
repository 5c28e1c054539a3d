"""Files that are written whole or not at all, and the folders they go to: one process at a time writes into one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

__all__ = ["TEMPORARY", "append", "check_writable_folder", "locked", "write_atomically", "writing"]

# Below transformers' own logger, so that its verbosity holds here too.
logger = logging.get_logger(f"transformers.{__name__}")

# How everything begins that is there only while something is written. Whoever holds a folder's lock may remove what a
# process that was killed has left of it.
TEMPORARY = ".saving-"
_LOCK = f"{TEMPORARY}lock"
_PATIENCE_S = 1.0
_POLL_S = 0.05

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# How safetensors and tokenizers, written in Rust, tell what the system told them.
_RUST_ERROR = re.compile(r"(?P<reason>[^:]+) \(os error (?P<number>\d+)\)$")


@contextlib.contextmanager
def locked(folder: Path, *, busy: str | None = None) -> Iterator[None]:
    """Makes a folder, and keeps other processes that ask for it out until the body ends or the process dies.

    A folder that was made is removed again if the body raises and nothing is in it.

    Args:
        folder (`Path`): The folder.
        busy (`str`, *optional*): The `OSError` where another process holds it; by default its end is waited for.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(folder):
            lock = _acquired(folder, busy)
        try:
            with writing(folder):
                _remove_what_is_left(folder)
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes it when it is released
                os.unlink(lock.lock_file)
            lock.release()
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # another process may have put something there
                path.rmdir()
        raise


def _acquired(folder: Path, busy: str | None) -> FileLock:
    """The folder's lock, held."""
    patience = _PATIENCE_S
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(timeout=patience, poll_interval=_POLL_S)
        except FileNotFoundError:
            continue  # who had made the folder has failed, and removed it
        except Timeout as error:
            if busy is not None:
                raise OSError(busy) from error
            if patience > 0:
                logger.warning(f"Another process is saving into {str(folder)!r}: its end is waited for.")
            patience = -1
        else:
            return lock


def _remove_what_is_left(folder: Path) -> None:
    """Removes what processes that were killed have left: of a living one, we would not hold the lock."""
    for left in folder.glob(f"{TEMPORARY}*"):
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != _LOCK:
            left.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises one `OSError` with cause and cure where the system refuses to write; `path` is what the user named."""
    try:
        yield
    except Exception as error:
        reason, number = _what_the_system_said(error)
        if number is None:
            raise
        if number in _FULL:
            cure = "make room there, or name another place"
        elif number in _FORBIDDEN:
            cure = "change its permissions, or name another place"
        else:
            cure = "name another place"
        raise OSError(f"{str(path)!r} cannot be written: {reason}. To go on, {cure}.") from error


def _what_the_system_said(error: Exception) -> tuple[str, int | None]:
    """The system's reason and its number; `None` if the error is not the system's."""
    if isinstance(error, OSError):
        return error.strerror or str(error), error.errno
    told = _RUST_ERROR.search(str(error))
    return (told["reason"].strip(), int(told["number"])) if told else (str(error), None)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, or replaces it, such that nobody ever sees half of it.

    Raises `OSError` if it cannot be written; an old file then stays.
    """
    beside = path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with beside.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """Adds to a file what the next process shall find, even if this one is killed; raises `OSError` if it cannot."""
    with writing(path), path.open("ab", buffering=0) as file:  # a buffer would be written again when it is closed
        rest = memoryview(text.encode())
        while rest:
            rest = rest[file.write(rest) :]


def check_writable_folder(path: Path | None) -> None:
    """Raises `OSError` unless the folder can be written or created; `None` passes."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise OSError(f"{str(path)!r} is a file, but a folder is needed: give another name.")
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise OSError(
            f"Nothing can be written into {str(path)!r}: change its permissions, or copy it or name another."
        )
