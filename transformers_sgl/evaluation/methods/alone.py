"""The models alone, as they are in transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers_sgl.evaluation.methods.base import Answer, Batch, Method, Pair, Setting

__all__ = ["Large", "Small"]


@dataclass(frozen=True)
class Large(Method):
    """The large model alone, unpruned."""

    prunes = False
    name: ClassVar[Literal["large", "small"]] = "large"

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        model, processor = getattr(pair.model, self.name), getattr(pair.processor, f"{self.name}_processor")
        answers = pair.write(model, processor, pair.inputs(processor, batch.samples, batch.images))
        return [Answer(text, length, 1.0 if self.name == "large" else None) for text, length in answers]


@dataclass(frozen=True)
class Small(Large):
    """The small model alone."""

    name = "small"
