"""The objects of a scene: where they lie, how they are drawn, and which pixels and patches they cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "CELL",
    "COLORS",
    "LABELS",
    "SHAPES",
    "SceneObject",
    "paint_object_map",
    "patch_objects",
    "place_objects",
    "random_background",
    "render",
]

SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
LABELS = tuple("ABCDEFHJKLMNPRSTUXYZ")  # no G, I, O, Q, V, W: each of the twenty is told apart at a glance
CELL = 32  # pixels; two cells make a 64-pixel tile, so no object straddles two tiles
SUPERSAMPLING = 4
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """One labelled shape."""

    shape: str  # one of `SHAPES`
    color: str  # a key of `COLORS`
    label: str  # the letter printed on it, or an empty string
    row: int  # row of its cell, from the top
    column: int  # column of its cell, from the left
    box: Box  # `(left, top, right, bottom)` of the shape in pixels


def random_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """Draws a light background colour, as easy-VQA has them."""
    red, green, blue = (int(channel) for channel in rng.integers(225, 256, 3))
    return red, green, blue


def place_objects(rng: np.random.Generator, grid: int, count: int) -> tuple[SceneObject, ...]:
    """Draws objects in distinct cells, with distinct letters, in reading order."""
    cells = sorted(rng.choice(grid * grid, count, replace=False).tolist())
    labels = rng.choice(len(LABELS), count, replace=False)
    colors = tuple(COLORS)
    objects = []
    for cell, label in zip(cells, labels, strict=True):
        row, column = divmod(cell, grid)
        shape = SHAPES[rng.integers(len(SHAPES))]
        if shape == "circle":
            width = height = rng.uniform(20, 29)
        elif shape == "rectangle":
            width, height = rng.uniform(16, 29, 2)
        else:
            width = rng.uniform(25, 30)
            height = width * rng.uniform(0.87, 1.0)
        left = column * CELL + rng.uniform(1, CELL - 1 - width)
        top = row * CELL + rng.uniform(1, CELL - 1 - height)
        box = (float(left), float(top), float(left + width), float(top + height))
        objects.append(SceneObject(shape, colors[rng.integers(len(colors))], LABELS[label], row, column, box))
    return tuple(objects)


def render(size: int, objects: Sequence[SceneObject], background: tuple[int, int, int]) -> Image.Image:
    """Draws objects on a plain background, anti-aliased."""
    scale = SUPERSAMPLING
    canvas = Image.new("RGB", (size * scale, size * scale), background)
    draw = ImageDraw.Draw(canvas)
    for item in objects:
        draw_shape(draw, item.shape, tuple(scale * edge for edge in item.box), COLORS[item.color])
        if item.label:
            left, top, right, bottom = (scale * edge for edge in item.box)
            middle = top + (bottom - top) * (0.63 if item.shape == "triangle" else 0.5)
            ink = (0, 0, 0) if luminance(COLORS[item.color]) > 100 else (255, 255, 255)
            draw.text(((left + right) / 2, middle), item.label, fill=ink, font=label_font(15 * scale), anchor="mm")
    return canvas.reduce(scale)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: Sequence[float], fill: int | tuple[int, ...]) -> None:
    """Fills one shape inside a box."""
    left, top, right, bottom = box
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=fill)
    else:
        draw.polygon(((left, bottom), ((left + right) / 2, top), (right, bottom)), fill=fill)


def luminance(color: tuple[int, int, int]) -> float:
    """How bright a colour looks, 0 to 255."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue


@cache
def label_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's built-in font, so that letters look the same everywhere."""
    return ImageFont.load_default(size)


def paint_object_map(size: int, objects: Sequence[SceneObject]) -> np.ndarray:
    """Draws the index of each object instead of its colour."""
    canvas = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(canvas)
    for index, item in enumerate(objects):
        left, top, right, bottom = item.box
        draw_shape(draw, item.shape, (left, top, right - 1, bottom - 1), index + 1)
    return np.asarray(canvas, dtype=np.int64) - 1


def patch_objects(object_map: np.ndarray, count: int, patch_size: int, min_cover: float) -> np.ndarray:
    """Reduces an object map to square patches."""
    rows, columns = object_map.shape[0] // patch_size, object_map.shape[1] // patch_size
    if not count:
        return np.full((rows, columns), -1)
    patches = object_map.reshape(rows, patch_size, columns, patch_size)
    cover = np.stack([(patches == index).mean(axis=(1, 3)) for index in range(count)])  # (count, rows, columns)
    return np.where(cover.max(axis=0) >= min_cover, cover.argmax(axis=0), -1)
