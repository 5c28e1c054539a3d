"""Importance and kept tokens, painted over the image that a question is about: together, or each in panels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from transformers_sgl.tokens.boxes import visual_token_boxes

__all__ = ["TokenBoxes", "importance_overlay", "importance_panels", "kept_panels", "plain_panel", "token_boxes"]

# One hue, ever more opaque: what matters glows, and the photograph below stays visible.
HEAT_COLOUR = 255, 170, 0
HEAT_OPACITY = 0.7
PANEL_GREYS = 10, 120  # black and white below the colour, so that the colour is always the lighter one
DROPPED_BRIGHTNESS = 0.4
MARGIN_PX, LEGEND_PX = 12, 54
HATCH_PERIOD_PX = 10


_Mask: TypeAlias = npt.NDArray[np.bool_]
_Values: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenBoxes:
    """Where the visual tokens of one image lie in it; a thumbnail is a coarser view beside a finer one."""

    boxes: npt.NDArray[np.float64]  # left, top, right and bottom in pixels of the image, (num_visual_tokens, 4)
    is_thumbnail: _Mask  # (num_visual_tokens,)

    def __len__(self) -> int:
        return len(self.boxes)

    @classmethod
    def from_fractions(cls, fractions: npt.ArrayLike, size: tuple[int, int]) -> TokenBoxes:
        """Boxes in pixels from fractions of width and height; the coarser of two views is the thumbnail."""
        fractions = np.asarray(fractions, dtype=np.float64)
        width, height = fractions[:, 2] - fractions[:, 0], fractions[:, 3] - fractions[:, 1]
        covered = np.cumsum(width * height)
        # A view begins in the top left corner, where the one before it has covered the image.
        begins = (width > 0) & (fractions[:, 0] < width / 2) & (fractions[:, 1] < height / 2)
        corners = np.flatnonzero(begins)[1:]
        is_thumbnail = np.zeros(len(fractions), dtype=bool)
        if len(corners) and covered[-1] > 1.5:
            second = corners[np.abs(covered[corners - 1] - 1).argmin()]
            first_view = np.arange(len(fractions)) < second
            is_thumbnail = first_view if first_view.sum() < (~first_view).sum() else ~first_view
        return cls(fractions * np.tile(size, 2), is_thumbnail)


def token_boxes(image: Image.Image, processor: Any) -> TokenBoxes:
    """Which part of an image each visual token of a processor stands for; raises `ValueError` if that is not known."""
    [boxes] = visual_token_boxes(processor, [image])
    return TokenBoxes.from_fractions(boxes.numpy(), image.size)


def importance_overlay(
    image: Image.Image, boxes: TokenBoxes, importance: npt.ArrayLike, keep_mask: npt.ArrayLike
) -> Image.Image:
    """Paints over an image which visual tokens were important (amber), and which were dropped (dark and hatched).

    `importance` (`-inf` for dropped tokens) and `keep_mask` have the shape `(num_visual_tokens,)`. An image that was
    read as tiles and a thumbnail is shown twice. The scale ends at the 99th percentile: attention has outliers.
    """
    heat = _normalized(_one_each(boxes, "importance", importance))
    kept = _one_each(boxes, "keep_mask", keep_mask).astype(bool)
    panels = _panels(image, boxes, [_at_readable_size(image.convert("RGB"))] * 2, kept, heat)
    parts = " · left: tiles, right: thumbnail" if len(panels) > 1 else ""
    legend = f"amber: important · {kept.sum()} of {len(boxes)} visual tokens kept, the rest hatched{parts}"
    return _compose(panels, legend)


def importance_panels(
    image: Image.Image, boxes: TokenBoxes, importance: npt.ArrayLike, highest: float, long_side: int = 448
) -> list[Image.Image]:
    """Paints importance alone, over the image in grey, so that all colour is importance.

    `importance` has the shape `(num_visual_tokens,)`; from `highest` on the colour is strongest. Returns the finer
    view, with a longer side of about `long_side` pixels, and, half as large, the thumbnail if there is one.
    """
    heat = np.clip(_one_each(boxes, "importance", importance) / (highest or 1.0), 0.0, 1.0)
    darkest, brightest = PANEL_GREYS
    grey = image.convert("L").point(lambda value: darkest + value * (brightest - darkest) / 255).convert("RGB")
    return _panels(image, boxes, _tiles_and_thumbnail(grey, long_side), np.ones(len(boxes), dtype=bool), heat)


def kept_panels(
    image: Image.Image, boxes: TokenBoxes, keep_mask: npt.ArrayLike, long_side: int = 448
) -> list[Image.Image]:
    """Shows what is kept, `(num_visual_tokens,)`, as it is and the rest dark and hatched; else as above."""
    kept = _one_each(boxes, "keep_mask", keep_mask).astype(bool)
    return _panels(image, boxes, _tiles_and_thumbnail(image, long_side), kept, None)


def plain_panel(image: Image.Image, long_side: int = 448) -> Image.Image:
    """The image itself, as large as the other panels of that `long_side`."""
    return _at_readable_size(image.convert("RGB"), long_side, long_side)


def _one_each(boxes: TokenBoxes, name: str, values: npt.ArrayLike) -> _Values:
    """The values as an array, if there is one for each box."""
    array = np.asarray(values, dtype=np.float32)
    if array.shape != (len(boxes),):
        raise ValueError(f"`{name}` must have the shape ({len(boxes)},), one value for each box, not {array.shape}.")
    return array


def _tiles_and_thumbnail(image: Image.Image, long_side: int) -> list[Image.Image]:
    """The image in the size of the finer view's panel, and half as large."""
    return [plain_panel(image, side) for side in (long_side, long_side // 2)]


def _pixel_boxes(boxes: TokenBoxes, image: Image.Image, base: Image.Image) -> npt.NDArray[np.int64]:
    """The boxes in pixels of the image at another size, without the seams that measured boxes have between tiles."""
    whole = np.rint(boxes.boxes)
    edges = np.where(np.abs(boxes.boxes - whole) < 0.26, whole, boxes.boxes)
    return np.rint(edges * np.tile(np.divide(base.size, image.size), 2)).astype(int)


def _panels(
    image: Image.Image, boxes: TokenBoxes, bases: list[Image.Image], keep_mask: _Mask, heat: _Values | None
) -> list[Image.Image]:
    """The finer view's tokens painted over the first base, and the thumbnail's, if there are any, over the second."""
    parts = [part for part in (~boxes.is_thumbnail, boxes.is_thumbnail) if part.any()]
    return [
        _paint(base, _pixel_boxes(boxes, image, base)[part], keep_mask[part], None if heat is None else heat[part])
        for part, base in zip(parts, bases, strict=False)
    ]


def _at_readable_size(image: Image.Image, shortest: int = 512, longest: int = 1024) -> Image.Image:
    """The image with a longer side of at least `shortest` and, if it was not enlarged, at most `longest` pixels."""
    long_side = max(image.size)
    if long_side < shortest:
        factor = math.ceil(shortest / long_side)
        # A whole factor without smoothing shows the very pixels that the model was given.
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if long_side > longest:
        width, height = (max(1, round(side * longest / long_side)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def _normalized(importance: _Values) -> _Values:
    """Maps importance to [0, 1], both of shape `(num_visual_tokens,)`; `-inf` becomes 0."""
    finite = importance[np.isfinite(importance)]
    if not finite.size:
        return np.zeros_like(importance)
    low = finite.min()
    # few tokens: the percentile can fall on the lowest value; all equal: any scale will do
    spread = (np.percentile(finite, 99) - low) or (finite.max() - low) or 1.0
    return np.clip((np.where(np.isfinite(importance), importance, low) - low) / spread, 0.0, 1.0)


def _paint(
    base: Image.Image, pixel_boxes: npt.NDArray[np.int64], keep_mask: _Mask, heat: _Values | None
) -> Image.Image:
    """Colours the boxes by heat in [0, 1], and darkens and hatches those that were dropped."""
    pixels = np.asarray(base, dtype=np.float32)
    opacity = np.zeros((*pixels.shape[:2], 1), np.float32)
    dropped = np.zeros(pixels.shape[:2], dtype=bool)
    for index, (left, top, right, bottom) in enumerate(pixel_boxes):
        if heat is not None:
            opacity[top:bottom, left:right] = HEAT_OPACITY * heat[index]
        dropped[top:bottom, left:right] = not keep_mask[index]
    painted = (1 - opacity) * pixels + opacity * np.array(HEAT_COLOUR, np.float32)

    row, column = np.indices(dropped.shape)
    hatch = dropped & ((row + column) % HATCH_PERIOD_PX == 0)
    painted[dropped] *= DROPPED_BRIGHTNESS
    painted[hatch] = painted[hatch] * 0.5 + 80
    return Image.fromarray(np.rint(painted).astype(np.uint8))


def _compose(panels: list[Image.Image], legend: str) -> Image.Image:
    """Puts the panels beside one another, and the legend below."""
    font = ImageFont.load_default(size=16)
    panels_width = sum(panel.width + MARGIN_PX for panel in panels) + MARGIN_PX
    width = max(panels_width, math.ceil(font.getlength(legend)) + 2 * MARGIN_PX)
    canvas = Image.new("RGB", (width, panels[0].height + LEGEND_PX), "white")
    x = (width - panels_width) // 2 + MARGIN_PX
    for panel in panels:
        canvas.paste(panel, (x, MARGIN_PX))
        x += panel.width + MARGIN_PX
    middle = canvas.height - (LEGEND_PX - MARGIN_PX) // 2
    ImageDraw.Draw(canvas).text((MARGIN_PX, middle), legend, fill="black", font=font, anchor="lm")
    return canvas
