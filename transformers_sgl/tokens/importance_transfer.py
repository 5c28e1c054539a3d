"""Handing importance over from the small model's visual tokens to the large model's.

Models of one family that cut an image alike have the same visual tokens, and importance passes token by token. Others
must be told each token's place on the image; then importance is resampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from transformers_sgl.tokens.importance_resampling import resample_features, resample_importance
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.transformers_interface import processor_name

__all__ = ["BOX_INPUTS", "ImportanceTransfer", "importance_transfer", "split_boxes"]

# The places of both models' visual tokens on the images: inputs of the pair, and of neither model.
BOX_INPUTS = ("visual_token_boxes", "small_visual_token_boxes")


@dataclass(frozen=True)
class ImportanceTransfer:
    """How importance passes between the models for one batch of prompts.

    Attributes:
        boxes (`tuple` of two `Tensor`, *optional*): The large model's boxes, `(batch, num_visual_tokens, 5)`, and the
            small model's, with its own number of tokens; `None` where both have the same visual tokens.
    """

    boxes: tuple[Tensor, Tensor] | None = None

    @classmethod
    def between(
        cls,
        large: PreTrainedConfig,
        small: PreTrainedConfig,
        visual_tokens: VisualTokens,
        small_tokens: VisualTokens,
        boxes: tuple[Tensor, Tensor] | None,
    ) -> ImportanceTransfer:
        """Through the boxes if the inputs have them, else token by token.

        Raises:
            ValueError: If the visual tokens differ and nothing tells their places, or the boxes are those of other
                tokens.
        """
        if boxes is not None:
            counts = visual_tokens.counts, small_tokens.counts
            large_boxes, small_boxes = map(_aligned, BOX_INPUTS, boxes, counts)
            return cls((large_boxes, small_boxes))
        if importance_transfer(large, small) != "identity":
            raise ValueError(
                f"Importance passes from a {small.model_type!r} model to a {large.model_type!r} model through image "
                "coordinates, but the inputs do not say where their visual tokens lie: prepare them with the pair's "
                "own `SGLProcessor`, which adds `visual_token_boxes` and `small_visual_token_boxes`."
            )
        numbers = [tokens.counts.tolist() for tokens in (visual_tokens, small_tokens)]
        if numbers[0] != numbers[1]:
            raise ValueError(
                f"The large model's prompts have {numbers[0]} visual tokens, but the small model's have {numbers[1]}: "
                "prepare their inputs with the pair's own `SGLProcessor`, which says where on the images both models' "
                "tokens lie."
            )
        return cls()

    @property
    def kind(self) -> str:
        """`"identity"` or `"resampling"`."""
        return "identity" if self.boxes is None else "resampling"

    def __call__(self, importance: Tensor) -> Tensor:
        """The small model's importance, `(batch, num_small_tokens)`, as the large model's."""
        if self.boxes is None:
            return importance
        large_boxes, small_boxes = (boxes.to(importance.device) for boxes in self.boxes)
        return resample_importance(importance, small_boxes, large_boxes)

    def features(self, features: Tensor) -> Tensor:
        """The features of the small model's tokens, `(batch, num_small_tokens, width)`, as the large model's."""
        if self.boxes is None:
            return features
        large_boxes, small_boxes = (boxes.to(features.device) for boxes in self.boxes)
        return resample_features(features, small_boxes, large_boxes)


def importance_transfer(large: PreTrainedConfig, small: PreTrainedConfig) -> str:
    """How importance passes between two models without boxes: `"identity"` or `"resampling"`.

    Models that share a class of processor may cut an image alike, if the processors' settings agree too. Models of
    different families never count as alike, even with equally many visual tokens.
    """
    families = [processor_name(config.model_type) for config in (large, small)]
    return "identity" if large.model_type == small.model_type or families[0] == families[1] else "resampling"


def split_boxes(inputs: dict[str, Any]) -> tuple[dict[str, Any], tuple[Tensor, Tensor] | None]:
    """The models' inputs, and the large and the small model's boxes, which neither model reads; `None` without boxes.

    Raises `ValueError` if there is only one of the two.
    """
    boxes = [inputs.get(name) for name in BOX_INPUTS]
    missing = [name for name, value in zip(BOX_INPUTS, boxes, strict=True) if value is None]
    if len(missing) == 1:
        raise ValueError(
            f"Importance is carried over from the small model's boxes to the large model's, but `{missing[0]}` is "
            "missing: pass both, as the pair's own processor makes them, or neither."
        )
    large_boxes, small_boxes = boxes
    inputs = {name: value for name, value in inputs.items() if name not in BOX_INPUTS}
    return inputs, None if missing else (torch.as_tensor(large_boxes), torch.as_tensor(small_boxes))


def _aligned(name: str, boxes: Tensor, counts: Tensor) -> Tensor:
    """The boxes `(batch, num_visual_tokens, 5)` with all padding behind them, if there is one for each visual token.

    Code that joins inputs to a batch without knowing boxes, like a pipeline, pads with zeros on either side.
    """
    if boxes.shape[::2] != (len(counts), 5):
        raise ValueError(
            f"`{name}` has the shape {tuple(boxes.shape)}, but there are {len(counts)} prompts: pass boxes of the "
            "shape (batch, num_visual_tokens, 5), as the pair's own processor makes them."
        )
    rows = []
    for row, count in zip(boxes.to(counts.device, torch.float32), counts.tolist(), strict=True):
        described = row[row[:, 0] >= 0]
        surplus = max(0, len(described) - count)
        described = described[surplus:] if not described[:surplus].any() else described
        if len(described) < count or described[count:].any():
            raise ValueError(
                f"`{name}` describes other visual tokens than the {counts.tolist()} of the prompts: prepare both in "
                "one call of the pair's own processor."
            )
        rows.append(described[:count])
    filled = boxes.new_full((len(rows), int(counts.max()), 5), -1.0, dtype=torch.float32)
    for row, described in zip(filled, rows, strict=True):
        row[: len(described)] = described
    return filled.to(counts.device)
