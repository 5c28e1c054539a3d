"""Files that are written whole or not at all, and the folders they go to."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["check_writable_folder", "write_atomically"]


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, or replaces it, such that nobody ever sees half of it.

    Raises `OSError` if it cannot be written; an old file then stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
