"""Operations of models that no memory holds: counted from shapes, without computing anything large.

How many operations a call takes depends on the shapes of its tensors. [`weightless`] builds a published checkpoint's
shape with weights that take no memory, and within [`Uncomputed`] stock `generate`, guided or not, runs on it: what is
large is not computed, only its shape is; what is small (ids, masks, the importance of visual tokens) is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from benchmarks.random_models import random_model

__all__ = ["Uncomputed", "weightless"]

# Operations on tensors with at least so many numbers are not computed; no importance and no logits are so large.
_LARGE = 2**18


class Uncomputed(TorchDispatchMode):
    """Inside, an operation on large floating-point tensors gives a tensor of the right shape and arbitrary values.

    Args:
        at_least (`int`): How many numbers a tensor has that is large.
    """

    def __init__(self, at_least: int = _LARGE) -> None:
        super().__init__()
        self._at_least = at_least
        self._shapes: dict[Any, Any] = {}  # results on the meta device: most layers do the same

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in _flat((args, kwargs)) if isinstance(value, Tensor)]
        if not any(value.is_floating_point() and value.numel() >= self._at_least for value in given):
            return func(*args, **kwargs)
        written = [info for info in (result.alias_info for result in func._schema.returns) if info is not None]
        if any(info.is_write for info in written):
            return args[0]  # what is written to keeps its arbitrary values
        if written:  # a view
            return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:  # by a mask: as many rows as it has ones
            args = (args[0], _places(args[1]), *args[2:])
        device = next(value.device for value in given)
        key = (func, *map(_signature, _flat((args, kwargs))))
        if key not in self._shapes:
            on_meta, with_meta = tree_map_only(Tensor, _shape_of, (args, kwargs))
            if "device" in with_meta:
                with_meta["device"] = torch.device("meta")
            self._shapes[key] = func(*on_meta, **with_meta)
        found = self._shapes[key]
        if isinstance(found, Tensor):
            return self._filled(found, device)
        return tree_map_only(Tensor, lambda each: self._filled(each, device), found)

    def _filled(self, found: Tensor, device: torch.device) -> Tensor:
        """A tensor of this shape; memory that is not touched is not taken."""
        if found.numel() < self._at_least:
            return torch.full(found.shape, found.is_floating_point(), dtype=found.dtype, device=device)
        return torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device=device)


def _flat(value: Any) -> Iterator[Any]:
    """An operation's arguments; lists among them are opened."""
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _flat(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            yield from _flat(each)
    else:
        yield value


def _signature(value: Any) -> Any:
    """What of an argument decides the shape of the result."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else repr(value)


def _shape_of(value: Tensor) -> Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _places(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices in which a mask is replaced by the places of its ones."""
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return found


def weightless(name: str, shrink: int = 1) -> PreTrainedModel:
    """A model like [`random_model`]'s on the CPU, whose weights are all zero and take no memory.

    Example:
        ```python
        >>> import torch
        >>> from benchmarks.uncomputed import Uncomputed, weightless
        >>> from transformers_sgl.evaluation.cost import flop_counter

        >>> model = weightless("internvl-26b")
        >>> with Uncomputed(), flop_counter() as counter:
        ...     written = model.generate(input_ids=torch.full((1, 100), 9), max_new_tokens=1)
        >>> f"{counter.get_total_flops() / 1e12:.1f} TFLOP"
        '3.8 TFLOP'

        ```
    """
    model = random_model(name, shrink, "meta")
    for module in model.modules():
        for of, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, of, nn.Parameter(_zeros(parameter), requires_grad=False))
        for of, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, of, _zeros(buffer))
    return model


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype).expand(like.shape)
