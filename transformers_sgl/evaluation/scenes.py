"""Seeded scenes: pictures of labelled shapes with questions, answers and dense labels.

A scene is a square canvas divided into 32-pixel cells. A few cells hold one object each: a coloured shape (easy-VQA's
three shapes and eight colours) with one printed letter on it. Questions ask for a letter, a colour, a shape, a place,
a count, a yes or no, a description or a whole row, so answers run from one token to a dozen, and most of them can only
be given by looking at the few visual tokens of one object. That makes scenes a small stand-in for the text and
localisation benchmarks on which pruning methods for visual tokens are compared.

Everything is drawn from a seed: `Scenes("test", seed=0)[7]` is the same scene on every machine with the same Pillow.
Scenes to train on, to set thresholds on (calibration) and to test on never share a seed.

    scenes = Scenes("test")
    scene = scenes[0]
    scene.image                        # PIL image, 128 x 128
    scene.questions[0].question        # "what is the label of the red circle?"
    scene.questions[0].answer          # "K"
    scene.questions[0].objects         # (2,): the answer is read from scene.objects[2]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["COLORS", "KINDS", "LABELS", "SHAPES", "Question", "Scene", "SceneObject", "Scenes"]

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
KINDS = ("label", "color", "shape", "where", "count", "yes_no", "negated", "describe", "list")

CELL = 32  # pixels; two cells make a 64-pixel tile, so no object straddles two tiles
ORDINALS = ("first", "second", "third", "fourth")
SUPERSAMPLING = 4
SPLITS = {"train": 0, "test": 1, "calibration": 2}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """One labelled shape.

    Attributes:
        shape: One of `SHAPES`.
        color: A key of `COLORS`.
        label: The letter printed on it, or an empty string.
        row: Row of its cell, from the top.
        column: Column of its cell, from the left.
        box: `(left, top, right, bottom)` of the shape in pixels.
    """

    shape: str
    color: str
    label: str
    row: int
    column: int
    box: Box


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: One of `KINDS`.
        question: The question, lower case except for letters that name a label.
        answer: The only correct answer.
        objects: Indices into `Scene.objects` of the objects that the question is about, empty where it is about all.
    """

    kind: str
    question: str
    answer: str
    objects: tuple[int, ...] = ()


@dataclass(frozen=True)
class Scene:
    """A picture of labelled shapes, what is in it, and questions about it.

    Attributes:
        image: The picture, `(size, size)` pixels, RGB.
        objects: The objects, in reading order.
        questions: The questions, answers included.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...] = field(default=(), repr=False)

    @property
    def grid(self) -> int:
        """Cells per side."""
        return self.image.width // CELL

    def object_map(self) -> np.ndarray:
        """Tells which object covers which pixel.

        Returns:
            `(size, size)` int64: the index of the covering object, -1 for the background.
        """
        return paint_object_map(self.image.width, self.objects)

    def patch_objects(self, patch_size: int = 8, min_cover: float = 0.15) -> np.ndarray:
        """Tells which object each square patch of the picture shows: the dense label of a visual token.

        Args:
            patch_size: Side of a patch in pixels.
            min_cover: The fraction of a patch that an object must cover to count.

        Returns:
            `(size / patch_size, size / patch_size)` int64: the object that covers most of the patch, -1 for none.
        """
        return patch_objects(self.object_map(), len(self.objects), patch_size, min_cover)


class Scenes:
    """An endless, seeded sequence of scenes; `scenes[i]` never changes.

    Args:
        split: `"train"`, `"calibration"` or `"test"`. Scenes of different splits never share a seed.
        seed: A number that names the sequence.
        size: Side of the canvas in pixels, a multiple of 32 up to 128. 128 gives a 4 x 4 grid of cells.
        objects: The least and the greatest number of objects; 3 to 6 on a 4 x 4 grid and 1 to 4 on smaller ones
            unless told.
        questions_per_scene: Questions to draw for each scene.
        kinds: The kinds of question to draw, as often as they are named.
        length: How many scenes iterating gives.

    Raises:
        ValueError: If the split, the size or a kind is not one that exists.
    """

    def __init__(
        self,
        split: str = "test",
        seed: int = 0,
        *,
        size: int = 128,
        objects: tuple[int, int] | None = None,
        questions_per_scene: int = 9,
        kinds: Sequence[str] = KINDS,
        length: int = 1000,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        if size % CELL or not CELL <= size <= len(ORDINALS) * CELL:
            raise ValueError(f"size is {size}; it must be a multiple of {CELL} up to {len(ORDINALS) * CELL}")
        unknown = sorted(set(kinds) - set(KINDS))
        if unknown or not kinds:
            raise ValueError(f"kinds has {unknown or 'nothing in it'}; it must be drawn from {', '.join(KINDS)}")
        self.split = split
        self.seed = seed
        self.size = size
        self.objects = objects or ((3, 6) if size == 4 * CELL else (1, min(4, (size // CELL) ** 2)))
        self.questions_per_scene = questions_per_scene
        self.kinds = tuple(kinds)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.length))

    def __getitem__(self, index: int) -> Scene:
        rng = np.random.default_rng([SPLITS[self.split], self.seed, self.size, index])
        objects = place_objects(rng, self.size // CELL, int(rng.integers(self.objects[0], self.objects[1] + 1)))
        image = render(self.size, objects, random_background(rng))
        kinds = [self.kinds[i] for i in rng.permutation(len(self.kinds))]
        kinds = [kinds[i % len(kinds)] for i in range(self.questions_per_scene)]
        questions = [ask(kind, objects, self.size // CELL, rng) for kind in kinds]
        return Scene(image, objects, tuple(question for question in questions if question is not None))


# Drawing


def random_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """Draws a light background colour, as easy-VQA has them."""
    red, green, blue = (int(channel) for channel in rng.integers(225, 256, 3))
    return red, green, blue


def place_objects(rng: np.random.Generator, grid: int, count: int) -> tuple[SceneObject, ...]:
    """Draws objects in distinct cells, with distinct letters, in reading order.

    Args:
        rng: Where the choices come from.
        grid: Cells per side.
        count: Number of objects.

    Returns:
        The objects, row by row, left to right.
    """
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
    """Draws objects on a plain background, anti-aliased.

    Args:
        size: Side of the picture in pixels.
        objects: What to draw; objects with an empty label get no letter.
        background: RGB.

    Returns:
        The picture.
    """
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
    """Draws the index of each object instead of its colour.

    Args:
        size: Side of the picture in pixels.
        objects: The objects.

    Returns:
        `(size, size)` int64: the index of the covering object, -1 for the background.
    """
    canvas = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(canvas)
    for index, item in enumerate(objects):
        left, top, right, bottom = item.box
        draw_shape(draw, item.shape, (left, top, right - 1, bottom - 1), index + 1)
    return np.asarray(canvas, dtype=np.int64) - 1


def patch_objects(object_map: np.ndarray, count: int, patch_size: int, min_cover: float) -> np.ndarray:
    """Reduces an object map to square patches.

    Args:
        object_map: `(height, width)`, the index of the covering object or -1.
        count: Number of objects.
        patch_size: Side of a patch in pixels.
        min_cover: The fraction of a patch that an object must cover to count.

    Returns:
        `(height / patch_size, width / patch_size)` int64: the object that covers most of the patch, -1 for none.
    """
    rows, columns = object_map.shape[0] // patch_size, object_map.shape[1] // patch_size
    if not count:
        return np.full((rows, columns), -1)
    patches = object_map.reshape(rows, patch_size, columns, patch_size)
    cover = np.stack([(patches == index).mean(axis=(1, 3)) for index in range(count)])  # (count, rows, columns)
    return np.where(cover.max(axis=0) >= min_cover, cover.argmax(axis=0), -1)


# Asking


def ask(kind: str, objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question | None:
    """Draws one question of a kind.

    Args:
        kind: One of `KINDS`.
        objects: The objects of the scene.
        grid: Cells per side.
        rng: Where the choices come from.

    Returns:
        The question with its only answer, or `None` where the scene allows no such question.
    """
    return _ASKERS[kind](objects, grid, rng)


def place_name(item: SceneObject, grid: int) -> str:
    """The quarter of the picture an object lies in, "top left" to "bottom right"."""
    return f"{'top' if 2 * item.row < grid else 'bottom'} {'left' if 2 * item.column < grid else 'right'}"


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _pick_unique(objects: Sequence[SceneObject], rng: np.random.Generator) -> int | None:
    """An object that no other shares colour and shape with."""
    names = [(item.color, item.shape) for item in objects]
    unique = [index for index, name in enumerate(names) if names.count(name) == 1]
    return unique[int(rng.integers(len(unique)))] if unique else None


def _refer(objects: Sequence[SceneObject], rng: np.random.Generator) -> tuple[int, str]:
    """An object and words that point to it and to no other: its letter, or colour and shape."""
    index = _pick_unique(objects, rng) if rng.random() < 0.5 else None
    if index is not None:
        return index, f"{objects[index].color} {objects[index].shape}"
    index = int(rng.integers(len(objects)))
    return index, f"object labelled {objects[index].label}"


def _ask_label(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question | None:
    index = _pick_unique(objects, rng)
    if index is None:
        return None
    name = f"{objects[index].color} {objects[index].shape}"
    template = _pick(rng, ("what is the label of the {}?", "what label is on the {}?", "read the label of the {}."))
    return Question("label", template.format(name), objects[index].label, (index,))


def _ask_color(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    index = int(rng.integers(len(objects)))
    template = _pick(rng, ("what color is the object labelled {}?", "what is the color of the object labelled {}?"))
    return Question("color", template.format(objects[index].label), objects[index].color, (index,))


def _ask_shape(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    index = int(rng.integers(len(objects)))
    template = _pick(rng, ("what shape is the object labelled {}?", "what is the shape of the object labelled {}?"))
    return Question("shape", template.format(objects[index].label), objects[index].shape, (index,))


def _ask_where(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    index, name = _refer(objects, rng)
    return Question("where", f"where is the {name}?", place_name(objects[index], grid), (index,))


def _ask_count(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    what = int(rng.integers(8))
    if what < 4:
        shape = _pick(rng, SHAPES)
        name, found = f"{shape}s", [index for index, item in enumerate(objects) if item.shape == shape]
    elif what < 7:
        color = _pick(rng, [item.color for item in objects] if rng.random() < 0.75 else tuple(COLORS))
        name, found = f"{color} objects", [index for index, item in enumerate(objects) if item.color == color]
    else:
        name, found = "objects", list(range(len(objects)))
    template = _pick(rng, ("how many {} are there?", "how many {} are in the image?"))
    return Question("count", template.format(name), str(len(found)), tuple(found))


def _ask_yes_no(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator, kind: str = "yes_no") -> Question:
    present = bool(rng.random() < 0.5)
    what = int(rng.integers(6))
    traits: dict[str, str]
    if what < 3:  # colour and shape; where absent, half of the time both occur, but not together
        pairs = {(item.color, item.shape) for item in objects}
        if present:
            options = sorted(pairs)
        else:
            crossed = {(color, shape) for color, _ in pairs for _, shape in pairs} - pairs
            every = {(color, shape) for color in COLORS for shape in SHAPES} - pairs
            options = sorted(crossed if crossed and rng.random() < 0.5 else every)
        color, shape = options[int(rng.integers(len(options)))]
        traits, name = {"color": color, "shape": shape}, f"{color} {shape}"
    else:
        trait, values = (("color", tuple(COLORS)), ("shape", SHAPES), ("label", LABELS))[what - 3]
        if not present and {getattr(item, trait) for item in objects} == set(values):  # no shape is absent
            trait, values = "label", LABELS
        seen = {getattr(item, trait) for item in objects}
        value = _pick(rng, [value for value in values if (value in seen) == present])
        traits = {trait: value}
        name = {"color": f"{value} shape", "shape": value, "label": f"object labelled {value}"}[trait]
    article = "an" if name.startswith("object") else "a"
    if kind == "negated":
        templates = ("is no {name} present?", "is there not {article} {name}?", "is there no {name}?")
    else:
        templates = (
            "is {article} {name} present?",
            "is there {article} {name}?",
            "is there {article} {name} in the image?",
        )
    found = [i for i, item in enumerate(objects) if all(getattr(item, key) == value for key, value in traits.items())]
    answer = "yes" if present == (kind == "yes_no") else "no"
    return Question(kind, _pick(rng, templates).format(article=article, name=name), answer, tuple(found))


def _ask_negated(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    return _ask_yes_no(objects, grid, rng, "negated")


def _ask_describe(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    index, name = _refer(objects, rng)
    item = objects[index]
    answer = f"a {item.color} {item.shape} labelled {item.label} in the {place_name(item, grid)}"
    return Question("describe", f"describe the {name}.", answer, (index,))


def _ask_list(objects: Sequence[SceneObject], grid: int, rng: np.random.Generator) -> Question:
    occupied = sorted({item.row for item in objects})
    empty = [row for row in range(grid) if row not in occupied]
    rows = empty if empty and rng.random() < 0.15 else occupied
    row = rows[int(rng.integers(len(rows)))]
    found = [index for index, item in enumerate(objects) if item.row == row]
    answer = ", ".join(f"{objects[index].color} {objects[index].shape}" for index in found) or "nothing"
    template = _pick(rng, ("list the objects in the {} row.", "what is in the {} row?"))
    return Question("list", template.format(ORDINALS[row]), answer, tuple(found))


_ASKERS: dict[str, Callable[[Sequence[SceneObject], int, np.random.Generator], Question | None]] = {
    "label": _ask_label,
    "color": _ask_color,
    "shape": _ask_shape,
    "where": _ask_where,
    "count": _ask_count,
    "yes_no": _ask_yes_no,
    "negated": _ask_negated,
    "describe": _ask_describe,
    "list": _ask_list,
}
