"""Seeing what was kept: the importance map painted over the image the question was about.

Two steps, each usable alone. `token_boxes` says which part of the image every visual token stands for;
`importance_overlay` paints boxes, importance and keep mask over the image, while `importance_panels` and `kept_panels`
paint the one or the other alone, for a page that shows many. Only Pillow and NumPy draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "HEAT_COLOURS",
    "TokenBoxes",
    "importance_overlay",
    "importance_panels",
    "kept_panels",
    "plain_panel",
    "token_boxes",
]

# Low to high importance, ever lighter, so that it can be read in grey and by the colour-blind: every eighth of the
# scale "viridis" of matplotlib (https://bids.github.io/colormap), rounded.
HEAT_COLOURS = np.array(
    [
        *[(68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140)],
        *[(40, 174, 128), (94, 201, 98), (173, 220, 48), (253, 231, 37)],
    ],
    np.float32,
)
HEAT_OPACITY = 0.4
PANEL_HEAT_OPACITY = 0.7
PANEL_GREYS = 40, 170  # of black and of white below the colours, which pure ones would distort
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

    @classmethod
    def from_fractions(cls, fractions: npt.ArrayLike, size: tuple[int, int]) -> TokenBoxes:
        """The boxes as `visual_token_boxes` has them, in pixels, with the thumbnail told from the rest.

        Args:
            fractions (array of shape `(num_visual_tokens, 4)`): Left, top, right and bottom of each token's box, as
                fractions of the image's width and height.
            size (`tuple` of `int`): The image's width and height.

        Returns:
            [`TokenBoxes`]: Where the model sees the image twice, the coarser view is the thumbnail.
        """
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
    from transformers_sgl.tokens.boxes import visual_token_boxes

    [boxes] = visual_token_boxes(processor, [image])
    return TokenBoxes.from_fractions(boxes.numpy(), image.size)


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
    importance, keep_mask = _one_each(boxes, importance=importance, keep_mask=keep_mask)
    keep_mask = keep_mask.astype(bool)
    base = _at_readable_size(image.convert("RGB"))
    pixel_boxes = _pixel_boxes(boxes, image, base)
    heat = _heat_colours(_normalized(importance))
    panels = [_paint(base, pixel_boxes[part], keep_mask[part], heat[part]) for part in _parts(boxes)]

    parts = " · left: tiles, right: thumbnail" if len(panels) > 1 else ""
    legend = f"{keep_mask.sum()} of {len(boxes)} visual tokens kept, the rest hatched{parts}"
    return _compose(panels, legend)


def importance_panels(
    image: Image.Image, boxes: TokenBoxes, importance: npt.ArrayLike, highest: float, long_side: int = 448
) -> list[Image.Image]:
    """Paints the importance alone, over the image in grey, so that all colour is importance.

    Args:
        image (`PIL.Image.Image`): The original image.
        boxes ([`TokenBoxes`]): Where its tokens lie.
        importance (array of shape `(num_visual_tokens,)`): The importance of each token.
        highest (`float`): The importance that gets the last colour of the scale, as all above it do; the first colour
            is that of 0.
        long_side (`int`, *optional*, defaults to 448): The longer side of the picture in pixels, about.

    Returns:
        `list` of `PIL.Image.Image`: A picture of the finer view and, half as large, one of the thumbnail if there is
        one.

    Raises:
        ValueError: If there is not one value for each box.

    Example:
        ```python
        >>> from PIL import Image
        >>> from transformers_sgl.explanation.panels import TokenBoxes, importance_panels

        >>> halves = TokenBoxes.from_fractions([(0, 0, 0.5, 1), (0.5, 0, 1, 1)], (64, 32))
        >>> [panel] = importance_panels(Image.new("RGB", (64, 32)), halves, [1, 3], highest=3)
        >>> panel.size
        (448, 224)

        ```
    """
    (importance,) = _one_each(boxes, importance=importance)
    heat = _heat_colours(np.clip(importance / (highest or 1.0), 0.0, 1.0))
    darkest, brightest = PANEL_GREYS
    grey = image.convert("L").point(lambda value: darkest + value * (brightest - darkest) / 255).convert("RGB")
    return _panels(grey, boxes, np.ones(len(boxes), dtype=bool), heat, long_side)


def kept_panels(
    image: Image.Image, boxes: TokenBoxes, keep_mask: npt.ArrayLike, long_side: int = 448
) -> list[Image.Image]:
    """Shows what is kept of an image as it is; the rest is dark and hatched.

    Args:
        image (`PIL.Image.Image`): The original image.
        boxes ([`TokenBoxes`]): Where its tokens lie.
        keep_mask (array of shape `(num_visual_tokens,)`): Whether each token was kept.
        long_side (`int`, *optional*, defaults to 448): The longer side of the picture in pixels, about.

    Returns:
        `list` of `PIL.Image.Image`: As from [`importance_panels`].

    Raises:
        ValueError: If there is not one value for each box.
    """
    (keep_mask,) = _one_each(boxes, keep_mask=keep_mask)
    return _panels(image.convert("RGB"), boxes, keep_mask.astype(bool), None, long_side)


def plain_panel(image: Image.Image, long_side: int = 448) -> Image.Image:
    """The image itself in the size of the other panels.

    Args:
        image (`PIL.Image.Image`): The original image.
        long_side (`int`, *optional*, defaults to 448): The longer side of the picture in pixels, about.

    Returns:
        `PIL.Image.Image`: A new RGB image.
    """
    return _at_readable_size(image.convert("RGB"), long_side, long_side)


def _one_each(boxes: TokenBoxes, **named: npt.ArrayLike) -> list[npt.NDArray[np.float32]]:
    """The values as arrays, if there is one for each box."""
    arrays = [np.asarray(values, dtype=np.float32) for values in named.values()]
    for name, values in zip(named, arrays, strict=True):
        if values.shape != (len(boxes),):
            raise ValueError(
                f"`{name}` must have the shape ({len(boxes)},), one value for each box, but has {values.shape}."
            )
    return arrays


def _parts(boxes: TokenBoxes) -> list[npt.NDArray[np.bool_]]:
    """Which tokens belong to the finer view, and which to the thumbnail, if there are any."""
    return [part for part in (~boxes.is_thumbnail, boxes.is_thumbnail) if part.any()]


def _pixel_boxes(boxes: TokenBoxes, image: Image.Image, base: Image.Image) -> npt.NDArray[np.int64]:
    """The boxes in pixels of the image at another size."""
    return np.rint(boxes.boxes * np.tile(np.divide(base.size, image.size), 2)).astype(int)


def _panels(
    image: Image.Image,
    boxes: TokenBoxes,
    keep_mask: npt.NDArray[np.bool_],
    heat: npt.NDArray[np.float32] | None,
    long_side: int,
) -> list[Image.Image]:
    panels = []
    for part, side in zip(_parts(boxes), (long_side, long_side // 2), strict=False):
        base = plain_panel(image, side)
        colours = None if heat is None else heat[part]
        panels.append(
            _paint(base, _pixel_boxes(boxes, image, base)[part], keep_mask[part], colours, PANEL_HEAT_OPACITY)
        )
    return panels


def _at_readable_size(
    image: Image.Image, shortest: int = MIN_LONG_SIDE_PX, longest: int = MAX_LONG_SIDE_PX
) -> Image.Image:
    """The image with a longer side of at least `shortest` and, if it was not enlarged, at most `longest` pixels."""
    long_side = max(image.size)
    if long_side < shortest:
        factor = math.ceil(shortest / long_side)
        # a whole factor without smoothing shows the very pixels the model was given
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if long_side > longest:
        width, height = (max(1, round(side * longest / long_side)) for side in image.size)
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
    keep_mask: npt.NDArray[np.bool_],
    colours: npt.NDArray[np.float32] | None,
    opacity: float = HEAT_OPACITY,
) -> Image.Image:
    """Colours the boxes where there are colours, and darkens and hatches those that were dropped."""
    pixels = np.asarray(base, dtype=np.float32)
    heat = pixels.copy()
    dropped = np.zeros(pixels.shape[:2], dtype=bool)
    for index, (left, top, right, bottom) in enumerate(pixel_boxes):
        if colours is not None:
            heat[top:bottom, left:right] = colours[index]
        dropped[top:bottom, left:right] = not keep_mask[index]
    painted = (1 - opacity) * pixels + opacity * heat

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
