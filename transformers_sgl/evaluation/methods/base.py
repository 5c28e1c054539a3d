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
from transformers_sgl.generation_config_sgl import PAPER_PRESETS, average_retention, resolve_prune_layer
from transformers_sgl.opening import chat_inputs, user_turn

__all__ = ["VISION_POINTS", "Answer", "Batch", "Method", "Pair", "Setting"]

# What a vision method does at an average retention, in ascending order: the fraction of visual tokens that the vision
# tower encodes, and the depth from which on the decoder sees fewer still. Between two rows the values lie on a line.
VISION_POINTS = (
    # average retention, vision_retention_ratio, prune_layer
    (0.0, 0.0, 0.0),
    (1.0, 1.0, 0.0),
)
# Where the tower drops the patches of the others, as a fraction of its depth; `None`: as whole tiles.
VISION_PRUNE_LAYER: float | None = 0.0


@dataclass(frozen=True)
class Setting:
    """How many of the visual tokens the large model processes."""

    average_retention: float  # the target: visual tokens averaged over the large model's layers, as a fraction
    prune_layer: int  # the first layer that sees fewer tokens
    num_layers: int  # the large model's layers
    vision_retention_ratio: float = 1.0  # the fraction of them that the large model's vision tower encodes
    vision_prune_layer: float | None = None  # where it drops the others, as a fraction of its depth

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
        presets = [(preset["retention_ratio"], preset["prune_layer"]) for preset in PAPER_PRESETS.values()]
        points = sorted((average_retention(ratio, round(48 * depth), 48), depth) for ratio, depth in presets)
        averages, depths = zip((0.0, 0.0), *points, (1.0, 1.0), strict=True)
        depth = float(np.interp(average, averages, depths))
        layer = resolve_prune_layer(depth, num_layers)
        return cls(average, min(layer, math.ceil(average * num_layers) - 1), num_layers)

    @property
    def retention_ratio(self) -> float:
        """The fraction of tokens that the layers from `prune_layer` on keep to reach the average exactly."""
        lower, upper = self.prune_layer * self.vision_retention_ratio, self.num_layers - self.prune_layer
        # Rounded, so that a tenth of 320 tokens is 32 of them for every number of layers.
        return round((self.average_retention * self.num_layers - lower) / upper, 12)

    def from_layer(self, prune_layer: int) -> Setting:
        """The same average from another layer on."""
        return replace(self, prune_layer=prune_layer)

    def with_vision(self) -> Setting:
        """The same average, reached by leaving tokens out of the vision tower, too, as [`VISION_POINTS`] says.

        Example:
            ```python
            >>> from transformers_sgl.evaluation.methods import Setting

            >>> setting = Setting.of(0.35, num_layers=48).with_vision()
            >>> setting.vision_retention_ratio, setting.prune_layer, setting.retention_ratio
            (0.35, 0, 0.35)

            ```
        """
        averages, ratios, depths = zip(*VISION_POINTS, strict=True)
        ratio, depth = (float(np.interp(self.average_retention, averages, values)) for values in (ratios, depths))
        last = math.ceil(self.average_retention / ratio * self.num_layers) - 1  # later ones exceed the average
        layer = min(resolve_prune_layer(depth, self.num_layers), last)
        return Setting(self.average_retention, layer, self.num_layers, round(ratio, 12), VISION_PRUNE_LAYER)


@dataclass(frozen=True)
class Answer:
    """What a method says to one sample."""

    text: str  # the answer
    num_tokens: int  # its tokens, the end of sequence included
    # The visual tokens that the large model processed, averaged over its layers, as a fraction of those of the
    # full-size image; `None` where it was not called.
    retention: float | None = None
    exited_early: bool | None = None  # whether the small model's answer was returned
    draft: str | None = None  # the small model's answer, if there is one
    num_draft_tokens_accepted: int | None = None  # how many of its tokens the large model confirmed
    decision_score: float | None = None  # how trustworthy it is
    draft_complete: bool | None = None  # whether it was not cut off
    confirmation_score: float | None = None  # how probable the pruned large model finds it; 0 where it disagrees


@dataclass(frozen=True)
class Pair:
    """A pair, its processor and how it answers."""

    model: Any  # the pair ([`SGLForConditionalGeneration`])
    processor: Any  # its [`SGLProcessor`]
    max_new_tokens: int = 64  # the length limit of an answer
    seed: int = 0  # what random methods draw from

    @property
    def num_layers(self) -> int:
        """The large model's decoder layers."""
        return len(decoder_layers(self.model.large))

    def inputs(self, processor: Any, samples: Sequence[Sample], images: Sequence[Image.Image], **options: Any) -> Any:
        """Inputs for a batch of questions, with the processor of the pair or of one of its models."""
        chats = [user_turn(sample.prompt, [image]) for sample, image in zip(samples, images, strict=True)]
        return chat_inputs(self.model, processor, chats, **options)

    def write(self, model: Any, processor: Any, inputs: Any) -> list[tuple[str, int]]:
        """A model's greedy answers with its own stock `generate`, as [`read`] gives them."""
        settings = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1}
        return self.read(model, processor, model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :])

    def read(self, model: Any, processor: Any, written: Tensor) -> list[tuple[str, int]]:
        """The text and the tokens, up to and with its end, of each answer of shape `(batch, answer_length)`."""
        eos, length = model.generation_config.eos_token_id, written.shape[1]
        ends = torch.isin(written, torch.tensor([] if eos is None else eos, device=written.device).reshape(-1))
        lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, length).tolist()
        texts = processor.batch_decode(written, skip_special_tokens=True)
        return [(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]


@dataclass(frozen=True)
class Batch:
    """Samples that are answered together."""

    samples: Sequence[Sample]
    indices: Sequence[int]  # places in the data, as seeds of random methods: draws do not depend on the batch
    images: Sequence[Image.Image]


class Method(ABC):
    """A way to answer."""

    prunes: ClassVar[bool] = True  # whether it has a retention to set; if not, it runs once

    def facts(self, setting: Setting) -> dict[str, Any]:
        """What it is run with at this setting, for the record."""
        return {"average_retention": setting.average_retention} if self.prunes else {}

    @abstractmethod
    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        """Answers each sample of a batch; `setting` is how many visual tokens the large model may process."""
