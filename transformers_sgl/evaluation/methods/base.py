"""What a method is given, and what it gives back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.generation_config_sgl import PRESETS, average_retention, resolve_prune_layer
from transformers_sgl.opening import chat_inputs, user_turn

__all__ = ["Answer", "Batch", "Method", "Pair", "Setting", "answer_lengths"]


@dataclass(frozen=True)
class Setting:
    """How many of the visual tokens the large model processes.

    Attributes:
        average_retention: The target: visual tokens averaged over the large model's layers, as a fraction.
        prune_layer: The first layer that sees fewer tokens.
        num_layers: The large model's layers.
    """

    average_retention: float
    prune_layer: int
    num_layers: int

    @classmethod
    def of(cls, average: float, num_layers: int) -> Setting:
        """The setting for an average retention, interpolated between the paper's three operating points.

        Example:
            ```python
            >>> from transformers_sgl.evaluation.methods import Setting

            >>> setting = Setting.of(0.35, num_layers=48)
            >>> setting.prune_layer, round(setting.retention_ratio, 3)
            (9, 0.2)

            ```
        """
        if not 0 < average < 1:
            raise ValueError(f"The average retention is {average}: pass a fraction above 0 and below 1.")
        points = sorted(
            (
                average_retention(preset["retention_ratio"], round(48 * preset["prune_layer"]), 48),
                preset["prune_layer"],
            )
            for preset in PRESETS.values()
        )
        averages, depths = zip((0.0, 0.0), *points, (1.0, 1.0), strict=True)
        depth = float(np.interp(average, averages, depths))
        layer = resolve_prune_layer(depth, num_layers)
        return cls(average, min(layer, math.ceil(average * num_layers) - 1), num_layers)

    @property
    def retention_ratio(self) -> float:
        """The fraction of tokens that the layers from `prune_layer` on keep to reach the average exactly."""
        upper = self.num_layers - self.prune_layer
        # Rounded, so that a tenth of 320 tokens is 32 of them for every number of layers.
        return round((self.average_retention * self.num_layers - self.prune_layer) / upper, 12)

    def from_layer(self, prune_layer: int) -> Setting:
        """The same average from another layer on."""
        return replace(self, prune_layer=prune_layer)


@dataclass(frozen=True)
class Answer:
    """What a method says to one sample.

    Attributes:
        text: The answer.
        num_tokens: Its tokens, the end of sequence included.
        retention: The visual tokens that the large model processed, averaged over its layers, as a fraction of those
            of the full-size image; `None` where it was not called.
        exited_early: Whether the small model's answer was returned.
        draft: The small model's answer, if there is one.
        num_draft_tokens_accepted: How many of its tokens the large model confirmed.
        decision_score: How trustworthy the draft is.
        draft_complete: Whether the draft was not cut off.
    """

    text: str
    num_tokens: int
    retention: float | None = None
    exited_early: bool | None = None
    draft: str | None = None
    num_draft_tokens_accepted: int | None = None
    decision_score: float | None = None
    draft_complete: bool | None = None


@dataclass(frozen=True)
class Pair:
    """A pair, its processor and how it answers.

    Attributes:
        model: The pair ([`SGLForConditionalGeneration`]).
        processor: Its [`SGLProcessor`].
        max_new_tokens: The length limit of an answer.
        seed: What random methods draw from.
    """

    model: Any
    processor: Any
    max_new_tokens: int = 64
    seed: int = 0

    @property
    def num_layers(self) -> int:
        """The large model's decoder layers."""
        return len(decoder_layers(self.model.large))

    def inputs(self, processor: Any, samples: Sequence[Sample], images: Sequence[Image.Image], **options: Any) -> Any:
        """Inputs for a batch of questions, with the processor of the pair or of one of its models."""
        chats = [user_turn(sample.prompt, [image]) for sample, image in zip(samples, images, strict=True)]
        return chat_inputs(self.model, processor, chats, **options)

    def write(self, model: Any, inputs: Any) -> Tensor:
        """A model's greedy answers with its own stock `generate`; `(batch, answer_length)`."""
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]

    def texts(self, processor: Any, answers: Tensor) -> list[str]:
        """Answers of shape `(batch, answer_length)` as text."""
        return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


@dataclass(frozen=True)
class Batch:
    """Samples that are answered together."""

    samples: Sequence[Sample]
    indices: Sequence[int]  # places in the data, as seeds of random methods: draws do not depend on the batch
    images: Sequence[Image.Image]


class Method(ABC):
    """A way to answer.

    Attributes:
        prunes: Whether it has a retention to set; if not, it runs once.
    """

    prunes: ClassVar[bool] = True

    @abstractmethod
    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """Answers each sample of a batch; `setting` is how many visual tokens the large model may process."""


def answer_lengths(written: Tensor, model: Any) -> list[int]:
    """The tokens of each answer of shape `(batch, answer_length)`, up to and with its end."""
    eos = model.generation_config.eos_token_id
    ends = torch.isin(written, torch.tensor([] if eos is None else eos, device=written.device).reshape(-1))
    length = written.shape[1]
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, length).tolist()
