"""The tested versions of the main dependencies.

Inside these ranges every promise is tested. Outside them the package still runs, but warns once at import and says so
in every error.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

__all__ = ["TESTED", "is_inside", "name_versions", "names_versions", "untested", "warn_if_untested"]

# Packages whose new releases may break this one. The same ranges stand in `setup.cfg`.
TESTED = {
    "transformers": ">=5.17,<5.25",
    "torch": ">=2.11,<2.16",
    "huggingface-hub": ">=1.33,<2.5",
}


@functools.cache
def untested() -> str:
    """One sentence that names every installed version outside the tested range; empty if there is none."""
    outside = []
    for package, bounds in TESTED.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if not is_inside(installed, bounds):
            outside.append(f"{package} {installed} (tested: {bounds})")
    if not outside:
        return ""
    return f"transformers_sgl was not tested with {' and '.join(outside)}: if a call fails, install a tested version."


def warn_if_untested() -> None:
    """Warns once if an installed version is outside the tested range."""
    sentence = untested()
    if sentence:
        warnings.warn(sentence, stacklevel=3)


def name_versions(error: BaseException | None) -> None:
    """Adds to an error's message that an installed version was not tested, because that may be its cause."""
    sentence = untested()
    if sentence and isinstance(error, Exception) and error.args and isinstance(error.args[0], str):
        message = error.args[0]
        if sentence not in message:
            error.args = (f"{message} {sentence}", *error.args[1:])


@contextmanager
def names_versions() -> Iterator[None]:
    """Adds the sentence about untested versions to every error that leaves the block."""
    try:
        yield
    except Exception as error:
        name_versions(error)
        raise


def is_inside(version: str, bounds: str) -> bool:
    """Whether a version satisfies bounds of the forms `>=1.2` and `<1.5`."""
    for bound in bounds.split(","):
        operator, limit = re.match(r"(>=|<)?(.*)", bound.strip()).groups()  # type: ignore[union-attr]
        if (operator == ">=" and _release(version) < _release(limit)) or (
            operator == "<" and _release(version) >= _release(limit)
        ):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version without suffixes, so that `5.25.0.dev0` counts as 5.25."""
    return tuple(int(number) for number in re.findall(r"\d+", re.match(r"[\d.]*", version)[0]))  # type: ignore[index]
