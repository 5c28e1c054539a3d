"""Seeded scenes: pictures of labelled shapes with questions and answers.

A scene is a square canvas divided into 32-pixel cells. A few cells hold one object each: a coloured shape (easy-VQA's
three shapes and eight colours) with one printed letter on it. Questions ask for a letter, a colour, a shape, a place,
a count, a yes or no, a description or a whole row, so answers run from one token to a dozen. Most of them depend on
the few visual tokens of one object, as in the text and localisation benchmarks for pruning visual tokens.

Everything is drawn from a seed: `Scenes("test", seed=0)[7]` is the same scene on every machine with the same Pillow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from transformers_sgl.evaluation.data.scene_objects import (
    CELL,
    SceneObject,
    place_objects,
    random_background,
    render,
)
from transformers_sgl.evaluation.data.scene_questions import KINDS, ORDINALS, Question, ask

__all__ = ["Scene", "Scenes"]

SPLITS = {"train": 0, "test": 1, "calibration": 2}


@dataclass(frozen=True)
class Scene:
    """A picture of labelled shapes, what is in it, and questions about it."""

    image: Image.Image  # the picture, `(size, size)` pixels, RGB
    objects: tuple[SceneObject, ...]  # the objects, in reading order
    questions: tuple[Question, ...] = field(default=(), repr=False)  # the questions, answers included


class Scenes:
    """An endless, seeded sequence of scenes; `scenes[i]` never changes.

    Args:
        split: `"train"`, `"calibration"` or `"test"`. Scenes of different splits never share a seed.
        seed: A number that names the sequence.
        size: Side of the canvas in pixels, a multiple of 32 up to 128. 128 gives a 4 x 4 grid of cells.
        objects: The least and the most objects; by default 3 to 6 on a 4 x 4 grid, 1 to 4 on smaller ones.
        questions_per_scene: Questions to draw for each scene.
        kinds: The kinds of question to draw, as often as they are named.
        length: How many scenes iterating gives.
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
