"""Hooks that live in a `with` and are gone after it.

Whatever this package changes about a model, it changes inside such a context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, ExitStack
from threading import Lock, RLock
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from transformers_sgl.versions import name_versions

__all__ = ["HookContext", "one_at_a_time"]

_Context = TypeVar("_Context", bound="HookContext")

_LOCKS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


def one_at_a_time(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """The lock to hold while a model runs: hooks belong to one call, so threads that share a model take turns."""
    with _LOCKS_LOCK:
        lock: AbstractContextManager[Any] = _LOCKS.setdefault(model, RLock())
        return lock


class HookContext(ABC):
    """A context manager that registers hooks and removes them: on return, on an exception, when nested."""

    _undo: ExitStack | None = None

    @abstractmethod
    def _register(self, stack: ExitStack) -> None:
        """Registers the hooks, and tells `stack` how to undo each."""

    def __enter__(self: _Context) -> _Context:
        """Registers the hooks; if one cannot be registered, none stays."""
        if self._undo is not None:
            raise ValueError(f"This {type(self).__name__} is already active: use a new one for each `with`.")
        with ExitStack() as stack:
            self._register(stack)
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the hooks; an error that leaves the block names untested versions."""
        name_versions(error)
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()
