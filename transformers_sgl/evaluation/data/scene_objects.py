"""The objects of a scene: where they lie and how they are drawn."""

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
    "draw_shape",
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
_label_font = cache(ImageFont.load_default)  # Pillow's own, so that letters look the same everywhere


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
    red, green, blue = rng.integers(225, 256, 3).tolist()
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
            luminance = np.dot((0.299, 0.587, 0.114), COLORS[item.color])  # 0 to 255
            ink = (0, 0, 0) if luminance > 100 else (255, 255, 255)
            draw.text(((left + right) / 2, middle), item.label, fill=ink, font=_label_font(15 * scale), anchor="mm")
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
