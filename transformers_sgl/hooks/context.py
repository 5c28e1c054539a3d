"""Hooks that live in a `with`, act for the calls inside it, and are gone after it.

Whatever this package changes about a model, it changes inside such a context. Hooks lie on the model, where the calls
of all threads meet them; so each asks whether the call that it meets was made inside its own `with`, and otherwise
does nothing. What is inside, a context variable tells: other threads are outside, unless they run in a copy of the
context, as those of `asyncio.to_thread` do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock, RLock
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from transformers_sgl.versions import name_versions

__all__ = ["HookContext", "at_once", "one_at_a_time", "outside"]

_Context = TypeVar("_Context", bound="HookContext")

_LOCKS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()

# The contexts around the code that is running, outermost first.
_ENTERED: ContextVar[tuple[HookContext, ...]] = ContextVar("transformers_sgl_hooks", default=())
# Held while hooks come and go: torch numbers them without a lock, and equal numbers would lose one.
_CHANGING = RLock()


def one_at_a_time(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """The lock to hold while a pair's model runs: what a call leaves on the model is not for another thread's."""
    with _LOCKS_LOCK:
        lock: AbstractContextManager[Any] = _LOCKS.setdefault(model, RLock())
        return lock


@contextmanager
def at_once(model: PreTrainedModel) -> Iterator[bool]:
    """Holds that lock if no other thread does, and tells whether it does; it never waits."""
    lock: Any = one_at_a_time(model)
    is_free = lock.acquire(blocking=False)
    try:
        yield is_free
    finally:
        if is_free:
            lock.release()


@contextmanager
def outside() -> Iterator[None]:
    """Lets models be called as if no `with` were around: a model may be another's guide, and its own."""
    token = _ENTERED.set(())
    try:
        yield
    finally:
        _ENTERED.reset(token)


class HookContext(ABC):
    """A context manager that registers hooks and removes them: on return, on an exception, when nested."""

    _undo: ExitStack | None = None
    _has_acted = False  # in a call made inside the `with`
    _has_passed = False  # over a call made outside of it

    @abstractmethod
    def _register(self, stack: ExitStack) -> None:
        """Registers the hooks, and tells `stack` how to undo each."""

    @torch.compiler.disable
    def __enter__(self: _Context) -> _Context:
        """Registers the hooks; if one cannot be registered, none stays."""
        if self._undo is not None:
            raise ValueError(f"This {type(self).__name__} is already active: use a new one for each `with`.")
        self._has_acted = self._has_passed = False
        with _CHANGING, ExitStack() as stack:
            stack.enter_context(_NoCompiledCode())
            stack.callback(self._leave)
            _ENTERED.set((*_ENTERED.get(), self))
            self._register(stack)
            self._undo = stack.pop_all()
        return self

    @torch.compiler.disable
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the hooks; an error that leaves the block names untested versions."""
        name_versions(error)
        with _CHANGING:
            undo, self._undo = self._undo, None
            if undo is not None:
                undo.close()
        if error is None and self._has_passed and not self._has_acted:
            raise ValueError(
                f"The model ran in other threads only, where this {type(self).__name__} does not act: enter it in the "
                "thread that runs the model, or start that thread with `contextvars.copy_context().run`."
            )

    def _leave(self) -> None:
        """Ends what `__enter__` began, for the code that is running."""
        _ENTERED.set(tuple(each for each in _ENTERED.get() if each is not self))

    def is_around(self) -> bool:
        """Whether the code that is running was called inside this `with`."""
        return any(each is self for each in _ENTERED.get())

    def _add_hook(self, stack: ExitStack, register: Callable[..., Any], hook: Callable[..., Any], **how: Any) -> None:
        """Registers a hook that acts inside this `with` only; `register` is a module's method, with options `how`."""

        @torch.compiler.disable
        def act(*call: Any) -> Any:
            # Another thread may be about to run a hook that is being removed, and then leaves its arguments out.
            if self.is_around():
                self._has_acted = True
                return hook(*call)
            self._has_passed = True
            return None

        stack.callback(register(act, **how).remove)


class _NoCompiledCode:
    """Lets models run uncompiled: compiled code does not notice hooks that come later, and would leave them out."""

    _num_entered = 0
    _stance: Any = None

    def __enter__(self) -> None:
        if _NoCompiledCode._num_entered == 0:
            _NoCompiledCode._stance = torch.compiler.set_stance("force_eager")
        _NoCompiledCode._num_entered += 1

    def __exit__(self, *error: object) -> None:
        _NoCompiledCode._num_entered -= 1
        if _NoCompiledCode._num_entered == 0:
            _NoCompiledCode._stance.__exit__(None, None, None)
