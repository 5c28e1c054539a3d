"""What the processors of a pair have in common, and whether they fit each other and their models."""

from __future__ import annotations

import json
from typing import Any

import torch
from PIL import Image
from transformers import ProcessorMixin

from transformers_sgl.tokens.boxes import has_boxes, visual_token_boxes
from transformers_sgl.transformers_interface import count_image_tokens, tells_image_tokens

__all__ = ["check_boxes", "check_image_token", "cuts_alike", "reads_the_same"]

# Heights and widths in pixels that cover every way to cut: smaller than a tile, square, wide, tall, large.
_PROBE_SIZES = [[height, width] for height in (16, 64, 448, 1500) for width in (16, 64, 448, 1500)]
# Those that show whether an image is stretched, cropped or padded.
_PLACED_PROBE_SIZES = [[96, 96], [96, 300], [300, 96]]
# How far apart two tokens' edges may lie and still be the same, as a fraction of the image.
_SAME_PLACE = 0.01


def reads_the_same(large: ProcessorMixin, small: ProcessorMixin) -> bool:
    """Whether two processors turn everything into the same inputs."""

    def facts(processor: ProcessorMixin) -> list[Any]:
        tokenizer = processor.tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        # A tokenizer's padding and truncation are those of its last call.
        rules = json.loads(backend.to_str()) if hasattr(backend, "to_str") else tokenizer.get_vocab()
        return [
            type(processor),
            {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")},
            tokenizer.padding_side,
            processor.chat_template,
            processor.to_dict(),  # image and video processor, and how many tokens an image takes
        ]

    return facts(large) == facts(small)


def cuts_alike(large: ProcessorMixin, small: ProcessorMixin) -> bool:
    """Whether two processors are known to make the same visual tokens of every image."""
    processors = (large, small)
    if type(large) is not type(small):
        return False
    if large.to_dict() == small.to_dict():
        return True
    if all(map(tells_image_tokens, processors)):
        counts = [count_image_tokens(each, _PROBE_SIZES) for each in processors]
        if counts[0] != counts[1]:
            return False
    if all(map(has_boxes, processors)):
        probes = [Image.new("RGB", (width, height)) for height, width in _PLACED_PROBE_SIZES]
        boxes = [[visual_token_boxes(each, [probe])[0] for probe in probes] for each in processors]
        return all(
            one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=_SAME_PLACE)
            for one, other in zip(*boxes, strict=True)
        )
    return True  # as far as can be told; generation compares the numbers of tokens


def check_boxes(name: str, processor: ProcessorMixin) -> None:
    """Raises if the places of one processor's visual tokens are not known."""
    try:
        visual_token_boxes(processor, [Image.new("RGB", (64, 64))])
    except ValueError as error:
        raise ValueError(
            f"The {name} model's processor does not fit the other one, which cuts images otherwise. {error}"
        ) from error


def check_image_token(name: str, processor: ProcessorMixin, config: dict[str, Any]) -> None:
    """Raises where a processor marks visual tokens otherwise than its model."""
    written, read = getattr(processor, "image_token_id", None), config.get("image_token_id")
    if written is not None and read is not None and written != read:
        raise ValueError(
            f"The {name} model and its processor do not fit each other: the processor writes visual tokens as "
            f"{written}, and the model reads them as {read}, so take both from one checkpoint."
        )
