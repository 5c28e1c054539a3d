"""The models alone, as they are in transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers_sgl.evaluation.methods.base import Answer, Batch, Method, Pair, Setting, answer_lengths

__all__ = ["Large", "Small"]


@dataclass(frozen=True)
class Large(Method):
    """The large model alone, unpruned."""

    prunes = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        return _alone(pair, "large", batch)


@dataclass(frozen=True)
class Small(Method):
    """The small model alone."""

    prunes = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        return [replace(answer, retention=None) for answer in _alone(pair, "small", batch)]


def _alone(pair: Pair, name: str, batch: Batch) -> list[Answer]:
    model, processor = getattr(pair.model, name), getattr(pair.processor, f"{name}_processor")
    written = pair.write(model, pair.inputs(processor, batch.samples, batch.images))
    texts = pair.texts(processor, written)
    return [Answer(text, length, 1.0) for text, length in zip(texts, answer_lengths(written, model), strict=True)]
