"""Tells transformers' Auto classes of the model type "sgl", without importing the pair's classes.

transformers imports its Auto classes where they are first used. Each is told right after that, or at once if it has
been imported already, so the order of imports does not matter. Importing the model's class at that point, in the
middle of transformers' own imports, would be slow and could be circular. So the Auto classes get a stand-in that
imports the class when it is first used; the class's own file then replaces it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import wrapt

from transformers_sgl.transformers_interface import AUTO_MODULES, auto_mappings

__all__ = ["register_when_imported"]


def register_when_imported() -> None:
    """Registers the model type "sgl" with each Auto class as soon as that is imported, or now if it has been."""
    for kind, register in (
        ("configuration", _register_configuration),
        ("modeling", _register_model),
        ("processing", _register_processor),
    ):
        wrapt.register_post_import_hook(register, AUTO_MODULES[kind])


# The hooks import what they need and ignore the module that they are handed: if another thread is still importing it,
# they wait for it.


def _register_configuration(_: Any) -> None:
    # Registers itself at its end. No name is read from it, because it may be what imports the Auto classes.
    importlib.import_module("transformers_sgl.configuration_sgl")


def _register_model(_: Any) -> None:
    model = _LazyClass("modeling_sgl", "SGLForConditionalGeneration")
    for mapping in auto_mappings("modeling"):
        mapping.register(_own("configuration_sgl", "SGLConfig"), model, exist_ok=True)


def _register_processor(_: Any) -> None:
    processor = _LazyClass("processing_sgl", "SGLProcessor")
    for mapping in auto_mappings("processing"):
        mapping.register(_own("configuration_sgl", "SGLConfig"), processor, exist_ok=True)


def _own(file: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers_sgl.{file}"), name)


class _LazyClass(wrapt.LazyObjectProxy):
    """The stand-in: in all but identity the class, which is imported at the first access."""

    def __new__(cls, file: str, name: str) -> _LazyClass:
        return super().__new__(cls, interface=type)

    def __init__(self, file: str, name: str) -> None:
        super().__init__(lambda: _own(file, name), interface=type)

    # Copying and pickling give the class itself, as with any class.

    def __copy__(self) -> type:
        return self.__wrapped__

    def __deepcopy__(self, memo: dict[int, Any]) -> type:
        return self.__wrapped__

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[type], type], tuple[type]]:
        return _itself, (self.__wrapped__,)


def _itself(value: type) -> type:
    return value
