"""Seeing what was kept: the importance map painted over the image the question was about.

Two steps, each usable alone. `token_boxes` says which part of the image every visual token stands for;
`importance_overlay` paints boxes, importance and keep mask over the image. Only Pillow and NumPy draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

__all__ = ["TokenBoxes", "importance_overlay", "token_boxes"]

# Low to high importance; dark blue to red by way of light colours, readable in grey as well.
HEAT_COLOURS = np.array([(28, 44, 140), (38, 130, 200), (120, 205, 165), (250, 215, 90), (215, 48, 39)], np.float32)
HEAT_OPACITY = 0.4
DROPPED_BRIGHTNESS = 0.4
MIN_LONG_SIDE_PX, MAX_LONG_SIDE_PX = 512, 1024
MARGIN_PX = 12
HATCH_PERIOD_PX = 10


@dataclass(frozen=True)
class TokenBoxes:
    """Where the visual tokens of one image lie in it.

    Attributes:
        boxes (`np.ndarray` of shape `(num_visual_tokens, 4)`): Left, top, right and bottom of what each token stands
            for, in pixels of the original image.
        is_thumbnail (`np.ndarray` of shape `(num_visual_tokens,)`): Whether it belongs to a thumbnail, a coarser view
            of the whole image beside a finer one.
    """

    boxes: npt.NDArray[np.float64]
    is_thumbnail: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.boxes)


def token_boxes(image: Image.Image, processor: Any) -> TokenBoxes:
    """Looks up which part of an image each visual token of any known model stands for.

    Args:
        image (`PIL.Image.Image`): The original image.
        processor (`ProcessorMixin`): The processor that prepares it.

    Returns:
        [`TokenBoxes`]: The places, with `boxes` of shape `(num_visual_tokens, 4)`. Where the model sees the image
        twice, the coarser view is the thumbnail.

    Raises:
        ValueError: If it is not known where the processor's visual tokens lie.
    """
    # Here, not above: it brings in transformers, which painting does not need.
    from transformers_sgl.visual_token_boxes import visual_token_boxes

    [boxes] = visual_token_boxes(processor, [image])
    fractions = boxes.numpy().astype(np.float64)
    covered = np.cumsum((fractions[:, 2] - fractions[:, 0]) * (fractions[:, 3] - fractions[:, 1]))
    first_view = np.arange(len(fractions)) <= np.searchsorted(covered, 0.999 * min(1.0, covered[-1]))
    is_thumbnail = np.zeros(len(fractions), dtype=bool)
    if covered[-1] > 1.5:
        is_thumbnail = first_view if first_view.sum() < (~first_view).sum() else ~first_view
    return TokenBoxes(fractions * np.tile(image.size, 2), is_thumbnail)


def importance_overlay(
    image: Image.Image,
    boxes: TokenBoxes,
    importance: npt.ArrayLike,
    keep_mask: npt.ArrayLike,
) -> Image.Image:
    """Paints over an image which of its visual tokens were important, and which were dropped.

    Heat colours show the importance; what the large model no longer saw is dark and hatched. Where the image was
    read as tiles and a thumbnail, the tiles' map is on the left and the thumbnail's on the right. Both share one
    scale, which ends at the 99th percentile because attention has outliers.

    Args:
        image (`PIL.Image.Image`): The original image.
        boxes ([`TokenBoxes`]): Where its tokens lie, for example from [`token_boxes`].
        importance (array of shape `(num_visual_tokens,)`): The importance of each token. Dropped tokens may be `-inf`.
        keep_mask (array of shape `(num_visual_tokens,)`): Whether each token was kept.

    Returns:
        `PIL.Image.Image`: A new RGB image. A small image is enlarged, a big one reduced, so that it can be looked at.

    Raises:
        ValueError: If the three do not speak of the same number of tokens.
    """
    importance = np.asarray(importance, dtype=np.float32)
    keep_mask = np.asarray(keep_mask, dtype=bool)
    for name, values in (("importance", importance), ("keep_mask", keep_mask)):
        if values.shape != (len(boxes),):
            raise ValueError(
                f"`{name}` must have the shape ({len(boxes)},), one value for each box, but has {values.shape}."
            )

    base = _at_readable_size(image.convert("RGB"))
    scale_xy = np.tile(np.divide(base.size, image.size), 2)
    pixel_boxes = np.rint(boxes.boxes * scale_xy).astype(int)
    heat = _heat_colours(_normalized(importance))
    panels = [
        _paint(base, pixel_boxes[part], heat[part], keep_mask[part])
        for part in (~boxes.is_thumbnail, boxes.is_thumbnail)
        if part.any()
    ]

    parts = " · left: tiles, right: thumbnail" if len(panels) > 1 else ""
    legend = f"{keep_mask.sum()} of {len(boxes)} visual tokens kept, the rest hatched{parts}"
    return _compose(panels, legend)


def _at_readable_size(image: Image.Image) -> Image.Image:
    long_side = max(image.size)
    if long_side < MIN_LONG_SIDE_PX:
        factor = math.ceil(MIN_LONG_SIDE_PX / long_side)
        # a whole factor without smoothing shows the very pixels the model was given
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if long_side > MAX_LONG_SIDE_PX:
        width, height = (max(1, round(side * MAX_LONG_SIDE_PX / long_side)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def _normalized(importance: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Maps importance to [0, 1], both of shape `(num_visual_tokens,)`; `-inf` becomes 0."""
    finite = importance[np.isfinite(importance)]
    if not finite.size:
        return np.zeros_like(importance)
    low = finite.min()
    # few tokens: the percentile can fall on the lowest value; all equal: any scale will do
    spread = (np.percentile(finite, 99) - low) or (finite.max() - low) or 1.0
    return np.clip((np.where(np.isfinite(importance), importance, low) - low) / spread, 0.0, 1.0)


def _heat_colours(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Turns values in [0, 1] of shape `(n,)` into RGB colours of shape `(n, 3)`."""
    stops = np.linspace(0.0, 1.0, len(HEAT_COLOURS))
    return np.stack([np.interp(values, stops, channel) for channel in HEAT_COLOURS.T], axis=-1)


def _paint(
    base: Image.Image,
    pixel_boxes: npt.NDArray[np.int64],
    colours: npt.NDArray[np.float32],
    keep_mask: npt.NDArray[np.bool_],
) -> Image.Image:
    pixels = np.asarray(base, dtype=np.float32)
    heat = pixels.copy()
    dropped = np.zeros(pixels.shape[:2], dtype=bool)
    for (left, top, right, bottom), colour, kept in zip(pixel_boxes, colours, keep_mask, strict=True):
        heat[top:bottom, left:right] = colour
        dropped[top:bottom, left:right] = not kept
    painted = (1 - HEAT_OPACITY) * pixels + HEAT_OPACITY * heat

    row, column = np.indices(dropped.shape)
    hatch = dropped & ((row + column) % HATCH_PERIOD_PX == 0)
    painted[dropped] *= DROPPED_BRIGHTNESS
    painted[hatch] = painted[hatch] * 0.5 + 80
    return Image.fromarray(np.rint(painted).astype(np.uint8))


def _compose(panels: list[Image.Image], legend: str) -> Image.Image:
    """Puts the panels beside one another, the heat scale and the legend below."""
    font = ImageFont.load_default(size=16)
    bar_width, bar_height = 80, 14
    low, high = "low", "high"
    low_width, high_width, space = font.getlength(low), font.getlength(high), font.getlength("  ")
    text_x = MARGIN_PX + low_width + space + bar_width + space + high_width + 2 * space
    panels_width = sum(panel.width + MARGIN_PX for panel in panels) + MARGIN_PX
    width = max(panels_width, math.ceil(text_x + font.getlength(legend)) + MARGIN_PX)
    height = panels[0].height + 3 * MARGIN_PX + bar_height + 4

    canvas = Image.new("RGB", (width, height), "white")
    x = (width - panels_width) // 2 + MARGIN_PX
    for panel in panels:
        canvas.paste(panel, (x, MARGIN_PX))
        x += panel.width + MARGIN_PX

    draw = ImageDraw.Draw(canvas)
    middle = height - MARGIN_PX - bar_height // 2
    bar = np.repeat(_heat_colours(np.linspace(0, 1, bar_width, dtype=np.float32))[None], bar_height, axis=0)
    bar_x = MARGIN_PX + low_width + space
    draw.text((MARGIN_PX, middle), low, fill="black", font=font, anchor="lm")
    canvas.paste(Image.fromarray(bar.astype(np.uint8)), (round(bar_x), middle - bar_height // 2))
    draw.text((bar_x + bar_width + space, middle), high, fill="black", font=font, anchor="lm")
    draw.text((text_x, middle), legend, fill="black", font=font, anchor="lm")
    return canvas
