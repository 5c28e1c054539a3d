"""Saves a pair whole or not at all, with the few lines that find this package again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transformers_sgl.storage.files import TEMPORARY, locked, writing

__all__ = ["AUTO_MAP", "PROCESSOR_AUTO_MAP", "REMOTE_CODE", "REMOTE_CODE_FILE", "staged", "write_remote_code"]

REMOTE_CODE_FILE = "modeling_sgl.py"

# With `trust_remote_code=True` the Auto classes import this file from the saved folder. It only imports the installed
# package, so a saved pair holds no code that could go out of date.
REMOTE_CODE = '''"""The classes of this pair, from the installed package; read with trust_remote_code=True."""

try:
    from transformers_sgl import SGLConfig, SGLForConditionalGeneration, SGLProcessor
except ModuleNotFoundError as error:
    if error.name != "transformers_sgl":
        raise
    raise ImportError("This model needs a package: pip install transformers_sgl") from error

__all__ = ["SGLConfig", "SGLForConditionalGeneration", "SGLProcessor"]
'''

_MODULE = Path(REMOTE_CODE_FILE).stem
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.SGLConfig",
    "AutoModel": f"{_MODULE}.SGLForConditionalGeneration",
    "AutoModelForImageTextToText": f"{_MODULE}.SGLForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{_MODULE}.SGLForConditionalGeneration",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": f"{_MODULE}.SGLProcessor"}

# transformers' names for weights: whole, one of several, and the list of several.
_WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>[^.-]+))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<of_index>[^.]+))?\.json)?"
)


def write_remote_code(folder: Path) -> None:
    """Writes the few lines to which the `auto_map` of a saved pair points."""
    (folder / REMOTE_CODE_FILE).write_text(REMOTE_CODE, encoding="utf-8")


@contextlib.contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into, whose files are moved to their place together at the end.

    Another process that saves into the folder waits until this one is done. Where the body raises, the folder is what
    it was before. A process that is killed while it writes leaves it unchanged too, except for what is hidden, which
    the next save removes; killed while the files are moved, it leaves the folder without the file that comes last,
    which does not pass for a finished save. Raises `OSError` if the folder cannot be made or written.

    Args:
        folder (`Path`): Where the files belong; made if it does not exist.
        last (`str`): The file that makes the save complete: removed first and put in place last.
    """
    with locked(folder), writing(folder):
        staging = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        try:
            yield staging
            _move_into_place(staging, folder, last)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, folder: Path, last: str) -> None:
    names = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    (folder / last).unlink(missing_ok=True)
    for stale in _stale_weights(names, folder):
        stale.unlink()
    # A folder's own files follow those of its parts: they tell that the parts are there.
    for name in sorted(names, key=lambda name: (name == Path(last), len(name.parts) == 1)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)


def _stale_weights(names: list[Path], folder: Path) -> list[Path]:
    """Weights of an earlier save that lie beside the new ones and would be loaded instead."""

    def variant(name: str) -> tuple[str | None] | None:
        found = _WEIGHTS.fullmatch(name)
        return (found["variant"] or found["of_index"],) if found else None

    replaced = {(name.parent, variant(name.name)) for name in names if variant(name.name)}
    return [
        path
        for parent in {parent for parent, _ in replaced}
        for path in (folder / parent).glob("model*")
        if (parent, variant(path.name)) in replaced and parent / path.name not in names
    ]
