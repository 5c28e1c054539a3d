"""Finding what transformers defines, and saying what is missing."""

from __future__ import annotations

import importlib
from typing import Any

from transformers_sgl.versions import TESTED

__all__ = ["changed", "from_module"]


def from_module(module: str, name: str) -> Any:
    """A name in a module below `transformers`; raises `OSError` if the installed version lacks it."""
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name)
    except (AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("transformers"):
            raise  # a package that transformers itself needs
        raise changed(f"`{module}.{name}`") from error


def changed(what: str) -> OSError:
    """The error for something that the installed transformers lacks; names installed and tested versions."""
    import transformers

    return OSError(
        f"transformers {transformers.__version__} has no {what}, on which transformers_sgl relies: install "
        f"transformers{TESTED['transformers']}."
    )
