"""A square painted on a photograph is found in the tokens whose boxes cover it, and in no others.

What a token shows is cut out of the processor's own output, in the order in which the model reads it; where it comes
from follows from the paint alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from tiny_processors import idefics3, internvl, llava, qwen2_vl, square
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from transformers_sgl.visual_token_boxes import visual_token_boxes

pytestmark = pytest.mark.mechanics

# Width and height, left and top on the photograph; the squares' left, top, right and bottom in pixels.
PHOTOGRAPHS: dict[str, tuple[str, tuple[int, int, int, int], list[tuple[int, int, int, int]]]] = {
    "portrait": ("chelsea", (110, 230, 100, 30), [(70, 20, 104, 61), (12, 150, 40, 190)]),
    "landscape": ("coffee", (300, 170, 200, 100), [(205, 14, 262, 55), (20, 90, 75, 160)]),
    "square": ("astronaut", (224, 224, 110, 0), [(150, 20, 205, 70), (14, 120, 60, 190)]),
    "tiny": ("astronaut", (23, 17, 200, 100), [(14, 2, 20, 7), (2, 9, 8, 15)]),
}

Token = Tensor | None  # pixels of any shape that starts with the channels; `None` for a token without a place


@functools.cache
def photograph(name: str) -> Image.Image:
    """A part of a photograph, darkened."""
    picture, (width, height, left, top), _ = PHOTOGRAPHS[name]
    pixels = getattr(skimage.data, picture)()[top : top + height, left : left + width, :3]
    return Image.fromarray((pixels * 0.4).astype(np.uint8))


def painted(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    image = image.copy()
    image.paste((255, 255, 255), box)
    return image


def tiles(side: int) -> Callable[[ProcessorMixin, BatchFeature], Iterator[Token]]:
    """Tiles in the order of `pixel_values`, each of so many rows and columns of tokens."""

    def tokens(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
        pixels = inputs["pixel_values"].float()
        for tile in pixels.reshape(-1, *pixels.shape[-3:]):
            size = tile.shape[-1] // side
            for row in tile.split(size, dim=1):
                yield from row.split(size, dim=2)

    return tokens


def packed(processor: ProcessorMixin, inputs: BatchFeature) -> Iterator[Token]:
    """Patches already cut, those of a token behind each other."""
    merged = processor.image_processor.merge_size**2
    for token in inputs["pixel_values"].split(merged):
        yield token.reshape(merged, 3, -1).transpose(0, 1)


# Name: the processor with its settings, and what its tokens show.
CASES: dict[str, tuple[Callable[..., ProcessorMixin], dict[str, Any], Any]] = {
    "internvl": (internvl, {}, tiles(4)),
    "internvl-one-tile": (internvl, {"crop_to_patches": False}, tiles(4)),
    "llava": (llava, {}, tiles(6)),
    "llava-squashed": (llava, {"size": square(48), "do_center_crop": False}, tiles(6)),
    "qwen2_vl": (qwen2_vl, {}, packed),
    "idefics3": (idefics3, {}, tiles(4)),
    "idefics3-one-tile": (idefics3, {"do_image_splitting": False}, tiles(4)),
}


def run(processor: ProcessorMixin, image: Image.Image) -> BatchFeature:
    return processor(images=[image], text=[processor.image_token], return_tensors="pt")


def covered(tokens: Any, processor: ProcessorMixin, image: Image.Image, box: tuple[int, int, int, int]) -> list[float]:
    """How much of what a token shows of the image is painted; -1 where it shows none of it."""
    before, after, white = (
        list(tokens(processor, run(processor, each)))
        for each in (image, painted(image, box), painted(image, (0, 0, *image.size)))
    )
    shares = []
    for dark, bright, brightest in zip(before, after, white, strict=True):
        if dark is None:
            shares.append(-1.0)
            continue
        contrast = (brightest.float() - dark.float()).sum(dim=0)
        shown = contrast > 0.5 * contrast.max()
        change = ((bright.float() - dark.float()).sum(dim=0) / contrast)[shown]
        shares.append(float(change.clamp(0, 1).mean()) if contrast.max() > 0.2 else -1.0)
    return shares


def overlaps(boxes: Tensor, image: Image.Image, box: tuple[int, int, int, int]) -> list[float]:
    """How much of a token's box is painted; -1 where the box is empty."""
    (left, top, right, bottom), (width, height) = box, image.size
    shares = []
    for token in boxes.tolist():
        area = (token[2] - token[0]) * (token[3] - token[1])
        across = max(0.0, min(token[2], right / width) - max(token[0], left / width))
        down = max(0.0, min(token[3], bottom / height) - max(token[1], top / height))
        shares.append(across * down / area if area else -1.0)
    return shares


@pytest.mark.parametrize("shape", PHOTOGRAPHS)
@pytest.mark.parametrize("case", CASES)
def test_the_tokens_that_show_a_square_are_those_whose_boxes_cover_it(case: str, shape: str) -> None:
    build, settings, tokens = CASES[case]
    processor, image = build(**settings), photograph(shape)
    [boxes] = visual_token_boxes(processor, [image])
    assert boxes.dtype == torch.float32
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    most = []
    for square_box in PHOTOGRAPHS[shape][2]:
        seen = covered(tokens, processor, image, square_box)
        expected = overlaps(boxes, image, square_box)
        assert [share < 0 for share in seen] == [share < 0 for share in expected]
        np.testing.assert_allclose(seen, expected, atol=0.1)
        # The brightest tokens are those that the boxes tell, and the other way round.
        for one, other in ((seen, expected), (expected, seen)):
            assert {i for i, s in enumerate(one) if s > 0.2} <= {i for i, s in enumerate(other) if s > 0.1}
        most.append(max(seen))
    assert max(most) > 0.2
