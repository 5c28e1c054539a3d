"""Training data for the tiny pair: single tiles and tiled scenes, each with many questions behind one picture.

Everything is computed from an index: `example(source, seed, i)` never changes, so a run can stop and go on anywhere.
Three sources:

- `shape`: one 64 x 64 picture in easy-VQA's manner, with easy-VQA's own question wordings. No picture of easy-VQA
  itself is used. Its questions are mostly answered by what is likely; here half of all yes/no answers are yes.
- `mini`: a 64 x 64 scene of 2 x 2 cells, the same kinds of question as the large scenes at a fifth of the cost.
- `scene`: a 128 x 128 scene of 4 x 4 cells, which the processor turns into four tiles and a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from transformers_sgl.evaluation.data.scene_objects import (
    COLORS,
    LABELS,
    SHAPES,
    SceneObject,
    draw_shape,
    random_background,
    render,
)
from transformers_sgl.evaluation.data.scene_questions import KINDS, Question
from transformers_sgl.evaluation.data.scenes import Scenes

TILE = 64  # pixels
PATCH = 8  # pixels, one visual token
NUM_CLASSES = len(COLORS) * len(SHAPES) + 1  # colour x shape, then background
NUM_CHARACTERS = len(LABELS) + 1  # the letters, then none
DENSE = {"classes": NUM_CLASSES, "characters": NUM_CHARACTERS}
IGNORE = -100

SOURCES = {"shape": 1, "mini": 2, "scene": 3}
SCENE_KINDS = (*KINDS, "label", "color", "shape", "yes_no", "negated")
PLACE_KINDS = (*KINDS, "where", "where", "describe", "list", "list")

COLOR_QUESTIONS = ("what color is the {}?", "what is the color of the {}?")
SHAPE_QUESTIONS = ("what shape is in the image?", "what shape is present?", "what shape does the image contain?")
POSITIVE_QUESTIONS = (
    "is there a {}?",
    "is there a {} in the image?",
    "does the image contain a {}?",
    "is a {} present?",
)
NEGATIVE_QUESTIONS = (
    "is there not a {}?",
    "is there not a {} in the image?",
    "does the image not contain a {}?",
    "is no {} present?",
)


@dataclass(frozen=True)
class Example:
    """One picture with its questions and dense labels.

    Attributes:
        image: The picture.
        questions: Questions with answers.
        labels: By name, `(num_visual_tokens,)` each: `"classes"`, colour x shape of the object that a visual token
            shows, and `"characters"`, the letter on that object, `IGNORE` in the thumbnail.
        owners: `(num_visual_tokens,)` the index of that object, -1 for the background.
    """

    image: Image.Image
    questions: tuple[Question, ...]
    labels: dict[str, np.ndarray]
    owners: np.ndarray

    def where_to_look(self, question: Question, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The visual tokens that matter for an answer's first tokens: here for the first one, the objects asked for.

        `spans` tells which characters of the answer each of its tokens stands for.
        """
        return [np.flatnonzero(np.isin(self.owners, question.objects))]

    def where_to_look_first(self, question: Question) -> np.ndarray:
        """The visual tokens to look at before: here none."""
        return np.array([], dtype=np.int64)


def example(
    source: str,
    seed: int,
    index: int,
    num_questions: int,
    negation: float = 0.5,
    kinds: Sequence[str] = SCENE_KINDS,
) -> Example:
    """Makes one training example.

    Args:
        source: A key of `SOURCES`.
        seed: Seed of the run.
        index: Number of the example.
        num_questions: Questions to ask.
        negation: The fraction of yes/no questions to negate. With a half, neither what the picture shows nor the
            negation tells anything about the answer by itself; with less, there is something to start from.
        kinds: The kinds of question to ask about scenes, as often as they are named.

    Returns:
        The example.
    """
    if source == "shape":
        return shape_example(np.random.default_rng([SOURCES[source], seed, index]), num_questions, negation)
    with_negated = np.random.default_rng([SOURCES[source], seed, index]).random() < 2 * negation
    kinds = kinds if with_negated else [kind for kind in kinds if kind != "negated"]
    size = TILE if source == "mini" else 2 * TILE
    scene = Scenes("train", seed, size=size, questions_per_scene=num_questions, kinds=kinds)[index]
    return Example(scene.image, scene.questions, *dense_labels(scene.objects, scene.image.width))


def scene_examples(split: str, seed: int, count: int) -> list[Example]:
    """The first scenes of a split, as examples."""
    scenes = Scenes(split, seed, length=count)
    return [Example(scene.image, scene.questions, *dense_labels(scene.objects, scene.image.width)) for scene in scenes]


def tile_example(seed: int, index: int) -> Example:
    """Makes one tile for the tower alone, without questions: a shape, a mini scene or the thumbnail of a scene."""
    kind = index % 8
    if kind < 2:
        return shape_example(np.random.default_rng([SOURCES["shape"], seed, index]), 0)
    if kind < 7:
        scene = Scenes("train", seed, size=TILE, objects=(0, 4) if kind == 2 else (2, 4), questions_per_scene=0)[index]
        return Example(scene.image, (), *dense_labels(scene.objects, TILE))
    scene = Scenes("train", seed, questions_per_scene=0)[index]
    labels, owners = dense_labels(scene.objects, scene.image.width)
    thumbnail = scene.image.resize((TILE, TILE), Image.Resampling.BICUBIC)
    tokens = (TILE // PATCH) ** 2
    return Example(thumbnail, (), {name: label[-tokens:] for name, label in labels.items()}, owners[-tokens:])


def shape_example(rng: np.random.Generator, num_questions: int, negation: float = 0.5) -> Example:
    """Draws one shape of easy-VQA's sizes, and asks about it in easy-VQA's words."""
    shape, color = SHAPES[rng.integers(len(SHAPES))], tuple(COLORS)[rng.integers(len(COLORS))]
    width, height = rng.uniform(8.5, 34.5, 2)
    if shape == "circle":
        height = width
    elif shape == "triangle":
        height = width * 0.87
    left, top = rng.uniform(0, TILE - width), rng.uniform(0, TILE - height)
    item = SceneObject(shape, color, "", 0, 0, (left, top, left + width, top + height))
    image = render(TILE, [item], random_background(rng))
    questions = tuple(ask_about_shape(shape, color, rng, i % 3 != 2, negation) for i in range(num_questions))
    return Example(image, questions, *dense_labels([item], TILE))


def ask_about_shape(shape: str, color: str, rng: np.random.Generator, yes_no: bool, negation: float) -> Question:
    """Draws one of easy-VQA's questions; a yes/no question is as often answered yes as no."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    if yes_no:
        present, negated = rng.random() < 0.5, rng.random() < negation
        if rng.random() < 0.6:
            name = f"{color if present else pick([c for c in COLORS if c != color])} shape"
        else:
            name = shape if present else pick([s for s in SHAPES if s != shape])
        template = pick(NEGATIVE_QUESTIONS if negated else POSITIVE_QUESTIONS)
        kind, answer = "easy_negated" if negated else "easy_yes_no", "yes" if present != negated else "no"
        return Question(kind, template.format(name), answer, (0,) if present else ())
    what = int(rng.integers(3))
    if what == 0:
        return Question("easy_other", pick(COLOR_QUESTIONS).format(pick([shape, "shape"])), color, (0,))
    text = f"what is the {color} shape?" if what == 1 else pick(SHAPE_QUESTIONS)
    return Question("easy_other", text, shape, (0,))


def dense_labels(objects: Sequence[SceneObject], size: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tells what each visual token shows, in the order in which the processor makes them.

    Args:
        objects: What is in the picture.
        size: Side of the picture in pixels, 64 (one tile) or 128 (four tiles and the thumbnail).

    Returns:
        The labels by name, and the owners; `(num_visual_tokens,)` each.
    """
    colors = tuple(COLORS)
    classes = [SHAPES.index(item.shape) * len(colors) + colors.index(item.color) for item in objects]
    characters = [LABELS.index(item.label) if item.label else NUM_CHARACTERS - 1 for item in objects]
    class_of = np.array([*classes, NUM_CLASSES - 1])  # index -1 is the background
    character_of = np.array([*characters, NUM_CHARACTERS - 1])

    side = size // TILE
    patches = patch_objects(size, objects)
    tiles = patches.reshape(side, TILE // PATCH, side, TILE // PATCH).transpose(0, 2, 1, 3).reshape(-1)
    if side == 1:
        return {"classes": class_of[tiles], "characters": character_of[tiles]}, tiles
    thumbnail = patch_objects(size, objects, PATCH * side).reshape(-1)
    hidden = np.full(thumbnail.shape, IGNORE)
    labels = {
        "classes": np.concatenate([class_of[tiles], class_of[thumbnail]]),
        "characters": np.concatenate([character_of[tiles], hidden]),
    }
    return labels, np.concatenate([tiles, thumbnail])


def object_map(size: int, objects: Sequence[SceneObject]) -> np.ndarray:
    """Tells which object covers which pixel: its index, or -1 for the background."""
    canvas = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(canvas)
    for index, item in enumerate(objects):
        left, top, right, bottom = item.box
        draw_shape(draw, item.shape, (left, top, right - 1, bottom - 1), index + 1)
    return np.asarray(canvas, dtype=np.int64) - 1


def patch_objects(
    size: int, objects: Sequence[SceneObject], patch_size: int = PATCH, min_cover: float = 0.15
) -> np.ndarray:
    """Tells which object each square patch of the picture shows: the dense label of a visual token."""
    side = size // patch_size
    if not objects:
        return np.full((side, side), -1)
    patches = object_map(size, objects).reshape(side, patch_size, side, patch_size)
    cover = np.stack([(patches == index).mean(axis=(1, 3)) for index in range(len(objects))])  # (count, rows, columns)
    return np.where(cover.max(axis=0) >= min_cover, cover.argmax(axis=0), -1)


def corpus(seed: int, num_scenes: int = 2000) -> list[str]:
    """Questions and answers to train the tokenizer on, every wording among them."""
    texts = []
    for index in range(num_scenes):
        for source in ("shape", "scene"):
            for question in example(source, seed, index, 12).questions:
                texts += [question.question, question.answer]
    return texts + ["user", "assistant", "system"] * num_scenes
