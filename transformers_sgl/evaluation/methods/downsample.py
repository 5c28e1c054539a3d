"""A smaller image: the large model alone, on fewer visual tokens."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.evaluation.methods.base import Answer, Batch, Method, Pair, Setting
from transformers_sgl.transformers_interface import count_image_tokens, tells_image_tokens

__all__ = ["Downsample"]


@dataclass(frozen=True)
class Downsample(Method):
    """The large model alone on a smaller image that has no more visual tokens than the average retention allows.

    The finest size that fits is taken. Models that cut images into tiles get fewer tiles, and smaller ones where that
    is not enough (their vision encoder interpolates its positions); others get a smaller image.
    """

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        large, processor = pair.model.large, pair.processor.large_processor
        answers: dict[int, Answer] = {}
        groups: dict[_Size, list[int]] = {}
        for place, image in enumerate(batch.images):
            groups.setdefault(_fitting_size(processor, image.size, setting.average_retention), []).append(place)
        for size, places in groups.items():
            smaller, options = size.apply(processor)
            images = [size.resize(batch.images[place]) for place in places]
            inputs = pair.inputs(smaller, [batch.samples[place] for place in places], images, **options)
            written = pair.write(large, smaller, inputs)
            counts = visual_tokens_of(large.config, inputs).counts.tolist()
            for place, (text, length), number in zip(places, written, counts, strict=True):
                answers[place] = Answer(text, length, number / size.num_tokens_before)
        return [answers[place] for place in range(len(batch.images))]


@dataclass(frozen=True)
class _Size:
    """A smaller size of an image."""

    scale: float  # the factor of the image's sides
    num_tokens_before: int  # the visual tokens at full size
    tile_px: int | None = None  # the side of a tile, for models that cut images into tiles
    max_tiles: int | None = None  # the most tiles

    def resize(self, image: Image.Image) -> Image.Image:
        """The image at this size."""
        if self.scale == 1:
            return image
        width, height = (max(1, round(side * self.scale)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def apply(self, processor: Any) -> tuple[Any, dict[str, Any]]:
        """A processor for this size, and its arguments."""
        if self.tile_px is None:
            return processor, {}
        smaller = copy.copy(processor)
        tokens = math.isqrt(processor.image_seq_length) * self.tile_px // processor.image_processor.size["height"]
        smaller.image_seq_length = tokens**2
        size = {"height": self.tile_px, "width": self.tile_px}
        return smaller, {"size": size, "min_patches": 1, "max_patches": self.max_tiles}


def _fitting_size(processor: Any, image_size: tuple[int, int], retention: float) -> _Size:
    """The finest size of an image, `(width, height)`, with at most this fraction of its visual tokens."""
    width, height = image_size
    image_processor = processor.image_processor
    if getattr(processor, "image_seq_length", None) and hasattr(image_processor, "get_number_of_image_patches"):
        per_side, native_px = math.isqrt(processor.image_seq_length), image_processor.size["height"]

        def num_tiles(tile_px: int, **options: int) -> int:
            tile = {"height": tile_px, "width": tile_px}  # the counter's name for what is otherwise called `size`
            return int(image_processor.get_number_of_image_patches(height, width, {"patch_size": tile, **options}))

        before = num_tiles(native_px) * processor.image_seq_length
        fitting = []
        for tokens in range(1, per_side + 1):
            tile_px = tokens * native_px // per_side
            for max_tiles in range(1, image_processor.max_patches + 1):
                tiles = num_tiles(tile_px, min_patches=1, max_patches=max_tiles)
                shown = max(1, tiles - 1)  # one of several is a thumbnail
                if tiles * tokens**2 <= max(1, retention * before):
                    fitting.append((shown * tile_px**2, -tiles, -max_tiles, tile_px))
        _, _, max_tiles, tile_px = max(fitting)
        return _Size(1.0, before, tile_px, -max_tiles)

    def num_tokens(scale: float) -> int:
        sizes = [(max(1, round(height * scale)), max(1, round(width * scale)))]
        return count_image_tokens(processor, sizes)[0]

    if not tells_image_tokens(processor):
        raise ValueError(
            f"{type(processor).__name__} does not tell how many tokens images have: leave downsample out of `methods`."
        )
    before = num_tokens(1.0)
    scales = [0.98**step for step in range(230)]
    scale = next((scale for scale in scales if num_tokens(scale) <= retention * before), None)
    # Some processors enlarge small images, or know only one number of tokens: then the nearest number is taken.
    return _Size(min(scales, key=num_tokens) if scale is None else scale, before)
