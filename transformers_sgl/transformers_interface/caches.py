"""The cache of keys and values: its name, and what can be read and removed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers_sgl.transformers_interface.lookup import changed, from_module

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache

__all__ = [
    "CACHE_NAMES",
    "CacheUnderBothNames",
    "cache_name",
    "cache_of",
    "can_be_cut_back",
    "held_keys",
    "held_keys_and_values",
    "is_plain_layer",
    "keep_columns",
    "next_token_output",
    "with_installed_cache_name",
]

CACHE_NAMES = ("cache", "past_key_values")
"""The argument and the output field that hold the cache, since 5.24 and before.

Assumes that no version has a third name. Without it, `generate` fails on a cache that is passed.
"""


@functools.cache
def cache_name() -> str:
    """The name that the installed version gives to the cache, in arguments and outputs.

    Assumes that `generate`'s output has a field of that name, and models an argument. Without it, `generate` does not
    understand a cache that is passed, and its output has none. Renamed in 5.24.
    """
    names = {field.name for field in fields(from_module("generation", "GenerateDecoderOnlyOutput"))}
    for name in CACHE_NAMES:
        if name in names:
            return name
    raise changed(f"cache in the output of `generate` under the names {' and '.join(CACHE_NAMES)}")


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the keyword arguments of a model, a decoder, a layer or a decoding loop, whatever its name.

    Assumes that it is passed by keyword, as a `Cache`. Without it, recorder and pruner take every decoding step for a
    new prompt.
    """
    from transformers import Cache

    return next((value for value in arguments.values() if isinstance(value, Cache)), None)


def with_installed_cache_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` or `forward`, with the cache under the installed version's name.

    Assumes what `cache_name` assumes. Without it, code written for the other side of the renaming in 5.24 fails.
    Raises `ValueError` if a cache is passed under both names.
    """
    named = {name: arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None}
    if len(named) > 1:
        raise ValueError(
            f"A cache is passed as {' and as '.join(f'`{name}`' for name in named)}, which are two names of one "
            "argument: pass it under one of them."
        )
    rest = {name: value for name, value in arguments.items() if name not in CACHE_NAMES}
    return {**rest, **{cache_name(): value for value in named.values()}}


class CacheUnderBothNames:
    """Mixin for an output whose cache can be read under both names, whichever the installed version uses.

    Assumes that an output's fields are its attributes and keys. Without it, code written for the other side of the
    renaming in 5.24 cannot read the cache.
    """

    def __getattr__(self, name: str) -> Any:  # asked for what is no attribute
        if name in CACHE_NAMES and name != cache_name():
            return getattr(self, cache_name())
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(cache_name() if key in CACHE_NAMES else key)  # type: ignore[misc]


def next_token_output(logits: Tensor, cache: Cache) -> Any:
    """What a model returns to a decoding loop: the next token's logits, `(batch, 1, vocab_size)`, and the cache.

    Assumes that a loop reads no more than these two. Without it, a step that a draft has saved cannot be handed out.
    """
    return from_module("modeling_outputs", "CausalLMOutputWithPast")(logits=logits, **{cache_name(): cache})


def can_be_cut_back(layer: Any, max_length: int) -> bool:
    """Whether a cache's layer keeps everything that lies before the tokens to be removed, up to `max_length` tokens.

    Assumes that only a `DynamicLayer` grows and shrinks freely; a sliding one until its window, `get_max_length()`, is
    full; and that a `DummyLayer` holds nothing. Without it, a draft could leave a wrong cache behind.
    """
    from transformers import DynamicLayer

    if _is_dummy(layer):
        return True
    return isinstance(layer, DynamicLayer) and (not layer.is_sliding or max_length < layer.get_max_length())


def is_plain_layer(layer: Any, max_length: int) -> bool:
    """Whether a cache's layer holds nothing but keys and values, and those of every token up to `max_length`.

    Assumes that only a `DynamicLayer` does, or a `DynamicSlidingWindowLayer` until its window, `get_max_length()`, is
    full. Without it, a small model would draft from a wrong cache.
    """
    from transformers import DynamicLayer

    plain = DynamicLayer, from_module("cache_utils", "DynamicSlidingWindowLayer")
    return _is_dummy(layer) or (type(layer) in plain and can_be_cut_back(layer, max_length))


def _is_dummy(layer: Any) -> bool:
    """Whether it stands for a layer that keeps nothing, such as one that uses another's keys; not in every version."""
    return type(layer).__name__ == "DummyLayer"


def keep_columns(cache: Cache, columns: Tensor, prompt_length: int) -> None:
    """Leaves in a cache of plain layers only some `columns`, `(batch, num_kept)`, of the first `prompt_length`.

    Assumes `cache.layers[...].keys` and `.values` of shape `(batch, heads, length, head_dim)`, and that sliding layers
    count their tokens in `cumulative_length`. Without it, a small model drafts with its whole cache.
    """
    from torch import cat

    for layer in cache.layers:
        if _is_dummy(layer) or not layer.is_initialized:
            continue
        for name in ("keys", "values"):
            whole = getattr(layer, name)
            index = columns.to(whole.device)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
            setattr(layer, name, cat([whole.gather(2, index), whole[:, :, prompt_length:]], dim=2))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = layer.keys.shape[2]


def held_keys(cache: Cache | None, index: int) -> Tensor | None:
    """The keys that a cache holds of a decoder layer.

    Assumes `cache.layers[index].keys`, and that attention is handed this very tensor. Without it, generated tokens are
    recorded at each step instead of once in the end, which is slower.
    """
    layers = getattr(cache, "layers", ())
    return getattr(layers[index], "keys", None) if index < len(layers) else None


def held_keys_and_values(cache: Cache | None, index: int) -> tuple[Tensor, Tensor] | None:
    """The keys and values that a cache holds of a decoder layer, `(batch, heads, length, head_dim)` each.

    Assumes `cache.layers[index].keys` and `.values`. Without it, a conversation is read anew at each turn.
    """
    keys = held_keys(cache, index)
    return None if cache is None or keys is None else (keys, cache.layers[index].values)
