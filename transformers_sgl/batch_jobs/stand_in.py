"""Stands in for the two halves of `generate` until the pair has them; only `stages` imports it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from transformers_sgl import opening

__all__ = ["Guidance", "open_pair"]

_TENSORS = ("importance", "keep_mask", "num_visual_tokens", "draft_sequences", "exited_early", "decision_score")


@dataclass(frozen=True)
class Guidance:
    """What the small model has found out about a batch; tensors whose first axis is the batch."""

    tensors: dict[str, Tensor]
    exited_early: Tensor  # (batch,)

    def select(self, chosen: Tensor) -> Guidance:
        """The guidance of some questions; `chosen` has the shape `(batch,)`."""
        return Guidance({name: value[chosen] for name, value in self.tensors.items()}, self.exited_early[chosen])

    def to_bytes(self) -> bytes:
        """Everything, to send it to another process."""
        tensors = {name: value.cpu().contiguous() for name, value in self.tensors.items()}
        return save({**tensors, "exits": self.exited_early.cpu()}, {"version": json.dumps(1)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Guidance:
        """What `to_bytes` has written."""
        tensors = load(data)
        exits = tensors.pop("exits")
        return cls(tensors, exits)


class _Pair:
    def __init__(self, pair: Any) -> None:
        self._pair = pair

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pair, name)

    def guide(self, **kwargs: Any) -> Guidance:
        output = self._pair.generate(**kwargs, return_dict_in_generate=True)
        found = {name: output[name] for name in _TENSORS if name in output}
        none = torch.zeros(len(output.sequences), dtype=torch.bool)
        return Guidance(found, none if output.exited_early is None else output.exited_early)

    def answer(self, *, guidance: Guidance, **kwargs: Any) -> Any:
        return self._pair.generate(**kwargs)


def open_pair(name: str, *, only: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Loads a pair and its processor."""
    pair, processor = opening.open_pair(name, **options)
    return _Pair(pair), processor
