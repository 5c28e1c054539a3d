"""The arguments that a decoder hands its layers, as a layer's pre-hook sees them."""

from __future__ import annotations

from functools import cache
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

__all__ = ["map_tensors", "named_arguments"]


def named_arguments(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a layer's call by their names."""
    return {**dict(zip(_parameter_names(layer.__class__.forward), args, strict=False)), **kwargs}


def map_tensors(function: Any, value: Any) -> Any:
    """Applies a function to a tensor, or to each of several."""
    return function(value) if isinstance(value, Tensor) else type(value)(function(each) for each in value)


@cache
def _parameter_names(forward: Any) -> list[str]:
    """The names of the positional arguments of a method."""
    parameters = list(signature(forward).parameters.values())[1:]
    return [each.name for each in parameters if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
