"""Which versions of its main dependencies this package was tested with.

Floor 0. The ranges stand once, in `setup.cfg`, and are read here from the installed package's metadata. Inside them
every promise is tested. Outside them the package goes on, says so once when it is imported, and again in every error.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

__all__ = ["name_versions", "names_versions", "tested_range", "untested", "warn_if_untested"]

# The packages whose new releases have broken this one, or may.
PACKAGES = ("transformers", "torch", "huggingface-hub")


def tested_range(package: str) -> str | None:
    """The versions that this package was tested with.

    Args:
        package (`str`): The name of a dependency, as in `setup.cfg`.

    Returns:
        `str`, *optional*: Such as `">=5.17,<5.25"`; `None` in a checkout that is not installed.
    """
    try:
        requirements = metadata.requires("transformers_sgl") or []
    except metadata.PackageNotFoundError:
        return None
    found = (re.fullmatch(r"([\w.-]+)\s*\(?([^;()]*)\)?", requirement) for requirement in requirements)
    ranges = {match[1].replace("_", "-"): match[2].strip() for match in found if match}
    bounds = sorted(ranges.get(package, "").split(","), key=lambda bound: not bound.startswith(">="))
    return ",".join(bounds) or None


@functools.cache
def untested() -> str:
    """One sentence that names every installed version outside the tested range; empty if all are inside."""
    outside = []
    for package in PACKAGES:
        bounds = tested_range(package)
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if bounds is not None and not _is_inside(installed, bounds):
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
    """Adds to an error that an installed version was not tested, because that may be its cause.

    Args:
        error (`BaseException`, *optional*): The error; unchanged if its message is not its first argument.
    """
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


def _is_inside(version: str, bounds: str) -> bool:
    """Whether a version satisfies bounds of the forms `>=1.2` and `<1.5`."""
    for bound in bounds.split(","):
        operator, limit = re.match(r"(>=|<)?(.*)", bound.strip()).groups()  # type: ignore[union-attr]
        if (operator == ">=" and _release(version) < _release(limit)) or (
            operator == "<" and _release(version) >= _release(limit)
        ):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what follows them: `5.25.0.dev0` is the first of what 5.25 may bring."""
    return tuple(int(number) for number in re.findall(r"\d+", re.match(r"[\d.]*", version)[0]))  # type: ignore[index]
