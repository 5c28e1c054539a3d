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

_HEADER_LENGTH = 8
_TENSORS = ("importance", "keep_mask", "num_visual_tokens", "draft_sequences", "exited_early", "decision_score")


@dataclass(frozen=True)
class Guidance:
    """What the small model has found out about a batch; tensors whose first axis is the batch."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def exited_early(self) -> Tensor:
        """Where the small model's answer is the answer."""
        return self.tensors.get("exited_early", torch.zeros_like(self.num_visual_tokens, dtype=torch.bool))

    @property
    def num_visual_tokens(self) -> Tensor:
        """The number of each prompt's visual tokens."""
        return self.tensors["num_visual_tokens"]

    @property
    def decision_score(self) -> Tensor | None:
        """The scores of the answers."""
        return self.tensors.get("decision_score")

    @property
    def draft(self) -> Tensor:
        """The small model's answers."""
        return self.tensors["draft_sequences"]

    @property
    def draft_mask(self) -> Tensor:
        """Where they are not padding."""
        return self.tensors["draft_mask"]

    def select(self, chosen: Tensor) -> Guidance:
        """The guidance of some questions; `chosen` has the shape `(batch,)`."""
        return Guidance({name: value[chosen] for name, value in self.tensors.items()}, self.settings)

    def to_bytes(self) -> bytes:
        """Everything, to send it to another process."""
        tensors = {name: value.cpu().contiguous() for name, value in self.tensors.items()}
        return save(tensors, {"settings": json.dumps(self.settings)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Guidance:
        """What `to_bytes` has written."""
        length = int.from_bytes(data[:_HEADER_LENGTH], "little")
        header = json.loads(data[_HEADER_LENGTH : _HEADER_LENGTH + length])
        return cls(load(data), json.loads(header["__metadata__"]["settings"]))


class _Pair:
    def __init__(self, pair: Any) -> None:
        self._pair = pair

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pair, name)

    def guide(self, **kwargs: Any) -> Guidance:
        output = self._pair.generate(**kwargs, return_dict_in_generate=True)
        settings = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
        tensors = {name: output[name] for name in _TENSORS if name in output}
        tensors["draft_mask"] = output.draft_sequences != self._pair.generation_config.pad_token_id
        return Guidance(tensors, settings)

    def answer(self, *, guidance: Guidance, **kwargs: Any) -> Any:
        return self._pair.generate(**kwargs, **guidance.settings)


def open_pair(name: str, *, only: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Loads a pair and its processor."""
    pair, processor = opening.open_pair(name, **options)
    return _Pair(pair), processor
