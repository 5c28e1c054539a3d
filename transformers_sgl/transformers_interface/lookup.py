"""Finding what transformers defines, and saying what is missing."""

from __future__ import annotations

import importlib
from typing import Any

from transformers_sgl.versions import TESTED

__all__ = ["changed", "from_module"]


def from_module(module: str, name: str) -> Any:
    """What a module of transformers defines.

    Args:
        module (`str`): The module's path below `transformers`.
        name (`str`): The name in it.

    Returns:
        `Any`: Its value.

    Raises:
        OSError: If the installed version has no such module or name.
    """
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    except (AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("transformers"):
            raise  # a package that transformers itself needs
        raise changed(f"`{module}.{name}`") from error


def changed(what: str) -> OSError:
    """The error to raise where the installed version of transformers lacks something.

    Args:
        what (`str`): What is missing.

    Returns:
        `OSError`: Its sentence names the installed and the tested versions.
    """
    import transformers

    return OSError(
        f"transformers {transformers.__version__} has no {what}, on which transformers_sgl relies: install "
        f"transformers{TESTED['transformers']}."
    )
