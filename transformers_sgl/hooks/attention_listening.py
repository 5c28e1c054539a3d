"""Hears the queries and keys of attention modules, beside the model's own attention kernel.

While a listener is there, the attention function of a model is its own (`sdpa`, `flash_attention_2`, `eager`, ...)
wrapped in `_listened_attention`, which hands on what it is called with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import copy
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedConfig

from transformers_sgl.hooks.attention_rows import AttentionScores
from transformers_sgl.transformers_interface import (
    attention_function,
    attention_name,
    register_attention,
    set_attention_name,
)

__all__ = ["AttentionListener", "listen"]

_PREFIX = "sgl_recording_"


class AttentionListener(Protocol):
    """Who hears the attention of modules."""

    def is_around(self) -> bool:
        """Whether the call that is running is one to hear."""

    def record(self, module: nn.Module, query: Tensor, key: Tensor, scores: Callable[[], AttentionScores]) -> None:
        """Hears one call of a module; `scores` returns how queries and keys become attention.

        `query` has the shape `(batch, heads, query_length, head_dim)`, `key`
        `(batch, key_value_heads, key_length, head_dim)`, both rotated.
        """


# The listeners of each attention module. Attention functions know nothing but the module that called them.
_LISTENERS: WeakKeyDictionary[nn.Module, tuple[AttentionListener, ...]] = WeakKeyDictionary()


def listen(
    stack: ExitStack,
    listener: AttentionListener,
    modules: Iterable[nn.Module],
    all_modules: Iterable[nn.Module],
    config: PreTrainedConfig,
) -> None:
    """Lets a listener hear attention modules until `stack` ends.

    `config` is the configuration of all modules whose attention function changes meanwhile.
    """
    all_modules = list(all_modules)

    def restore() -> None:
        """Restores the model's own attention function, unless another listener still needs the listened one."""
        if not any(_LISTENERS.get(module) for module in all_modules):
            set_attention_name(config, attention_name(config).removeprefix(_PREFIX))

    stack.callback(restore)  # runs last, after the listener is gone
    for module in modules:
        stack.callback(_add(module, listener))
    set_attention_name(config, _listened_implementation(attention_name(config)))


def _add(module: nn.Module, listener: AttentionListener) -> Callable[[], None]:
    """Adds a listener to an attention module, and returns a function that removes it."""
    _LISTENERS[module] = (*_LISTENERS.get(module, ()), listener)

    def stop() -> None:
        left = tuple(each for each in _LISTENERS.get(module, ()) if each is not listener)
        if left:
            _LISTENERS[module] = left
        else:
            _LISTENERS.pop(module, None)

    return stop


def _listened_implementation(implementation: str) -> str:
    """The name of the attention function that also calls listeners; registered with transformers when new."""
    if implementation.startswith(_PREFIX):  # nested listeners share one wrapper
        return implementation
    name = _PREFIX + implementation
    register_attention(name, functools.partial(_listened_attention, implementation), like=implementation)
    return name


def _listened_attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function `implementation` of transformers, which also calls the listeners."""
    forward = attention_function(implementation, module)
    listeners = [listener for listener in _LISTENERS.get(module, ()) if listener.is_around()]
    if listeners:
        if kwargs.get("position_bias") is not None:
            raise ValueError(
                "Attention cannot be recorded, because this model adds a bias for positions to it: use a small model "
                "with plain softmax attention."
            )
        scores = functools.partial(AttentionScores, module, query.shape[-1], attention_mask, implementation, kwargs)
        for listener in listeners:
            listener.record(module, query, key, scores)
    if implementation in ("sdpa", "eager"):
        return forward(module, query, key, value, attention_mask, *args, **kwargs)
    # Flash attention looks its kernel up by the name on the configuration; the real one belongs to all threads.
    module = copy(module)
    module.config = copy(module.config)
    set_attention_name(module.config, implementation)
    return forward(module, query, key, value, attention_mask, *args, **kwargs)
