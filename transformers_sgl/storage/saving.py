"""What every save of a pair has in common: nothing half-written, and the few lines that find this package again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["AUTO_MAP", "PROCESSOR_AUTO_MAP", "REMOTE_CODE", "REMOTE_CODE_FILE", "staged", "write_remote_code"]

REMOTE_CODE_FILE = "modeling_sgl.py"

# With `trust_remote_code=True` the Auto classes import this file from the saved folder. It holds no code of its own:
# what runs is the installed package, so a pair never grows old beside it.
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

# The names that transformers gives to weights: whole, one of several, and the list of several.
_WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>[^.-]+))?(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index(?:\.(?P<of_index>[^.]+))?\.json)?"
)


def write_remote_code(folder: Path) -> None:
    """Writes the few lines that the `auto_map` of a saved pair points to.

    Args:
        folder (`Path`): The pair's folder.

    Raises:
        OSError: If the folder cannot be written.
    """
    (folder / REMOTE_CODE_FILE).write_text(REMOTE_CODE, encoding="utf-8")


@contextlib.contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write into, whose files go to their place together at the end.

    Where the body raises, the folder is what it was before. A process that is killed while it writes leaves the folder
    as it was too, but for a hidden one; killed in the moment in which the files are moved, it leaves a folder without
    the file that comes last, which is not taken for a finished save.

    Args:
        folder (`Path`): Where the files belong; made if it does not exist.
        last (`str`): The file that makes the save complete: taken away first and put in place last.

    Yields:
        `Path`: An empty folder on the same disk.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            yield staging
            _move_into_place(staging, folder, last)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # somebody else may have put something there meanwhile
                path.rmdir()
        raise


def _move_into_place(staging: Path, folder: Path, last: str) -> None:
    names = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
    (folder / last).unlink(missing_ok=True)
    for stale in _stale_weights(names, folder):
        stale.unlink()
    for name in sorted(names, key=lambda name: name == Path(last)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, folder / name)


def _stale_weights(names: list[Path], folder: Path) -> list[Path]:
    """Weights of an earlier save that lie beside the new ones and would be loaded in their place."""

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
