"""Seeded scenes to be described in full: the answers are long, 30 to 120 tokens of the embedded pair.

A picture is drawn as those of [`Scenes`] are, but holds more objects. The answer names every object with its colour,
shape and letter, quarter by quarter (top left, top right, bottom left, bottom right) and in reading order within a
quarter. Which sentences it has depends on how many objects a quarter holds:

    in the top left there are a red circle labelled A, a blue triangle labelled B and a gray circle labelled K.
    there is a teal rectangle labelled C in the bottom right.

So there is one right answer to the letter, and each object is a fact of its own that
[`metrics.described_facts`][transformers_sgl.evaluation.metrics.described_facts] can count.

Everything is drawn from a seed: `Descriptions("test", seed=0)[7]` is the same scene on every machine with the same
Pillow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from transformers_sgl.evaluation.data.scene_objects import CELL, SceneObject, place_objects, random_background, render
from transformers_sgl.evaluation.data.scene_questions import Question, place_name
from transformers_sgl.evaluation.data.scenes import SPLITS, Scene

__all__ = ["Descriptions", "describe", "described_kind"]

WORDINGS = ("describe the image.", "describe the picture.", "describe all objects.")
NUM_OBJECTS = (4, 15)
_KINDS = ((4, 7), (8, 11), (12, 15))  # the least and the most objects of each row of the tables
_PLACES = ("top left", "top right", "bottom left", "bottom right")


class Descriptions:
    """An endless, seeded sequence of scenes to be described, one question each; `descriptions[i]` never changes.

    Args:
        split: `"train"`, `"calibration"` or `"test"`. Scenes of different splits never share a seed.
        seed: A number that names the sequence.
        size: Side of the canvas in pixels: 64 or 128, which gives a 2 x 2 or a 4 x 4 grid of cells.
        objects: The least and the most objects; by default 4 to 15 on a 4 x 4 grid, 1 to 4 on the smaller one.
        length: How many scenes iterating gives.

    Raises:
        ValueError: If there is no such split, or no such size.
    """

    def __init__(
        self,
        split: str = "test",
        seed: int = 0,
        *,
        size: int = 4 * CELL,
        objects: tuple[int, int] | None = None,
        length: int = 1000,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        if size not in (2 * CELL, 4 * CELL):
            raise ValueError(f"size is {size}; it must be {2 * CELL} or {4 * CELL}")
        self.split = split
        self.seed = seed
        self.size = size
        self.objects = objects or (NUM_OBJECTS if size == 4 * CELL else (1, 4))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Scene]:
        return (self[index] for index in range(self.length))

    def __getitem__(self, index: int) -> Scene:
        # The last number sets these pictures apart from those of `Scenes`.
        rng = np.random.default_rng([SPLITS[self.split], self.seed, self.size, index, 1])
        grid = self.size // CELL
        objects = place_objects(rng, grid, int(rng.integers(self.objects[0], self.objects[1] + 1)))
        image = render(self.size, objects, random_background(rng))
        wording = WORDINGS[int(rng.integers(len(WORDINGS)))]
        answer = "".join(text for text, _ in describe(objects, grid))
        question = Question(described_kind(len(objects)), wording, answer, tuple(range(len(objects))))
        return Scene(image, objects, (question,))


def describe(objects: Sequence[SceneObject], grid: int) -> list[tuple[str, tuple[int, ...]]]:
    """The description of a scene, in pieces.

    Args:
        objects: What is in the scene, in reading order.
        grid: How many cells a side of the scene has.

    Returns:
        The pieces, which make the description when joined, each with the indices of the objects that it is about.
    """
    pieces: list[tuple[str, tuple[int, ...]]] = []
    for place in _PLACES:
        found = tuple(index for index, item in enumerate(objects) if place_name(item, grid) == place)
        space = " " if pieces and found else ""
        if len(found) == 1:
            pieces.append((f"{space}there is {_name(objects[found[0]])} in the {place}.", found))
        elif found:
            pieces.append((f"{space}in the {place} there are", found))
            for index in found:
                joint = "" if index == found[0] else " and" if index == found[-1] else ","
                stop = "." if index == found[-1] else ""
                pieces.append((f"{joint} {_name(objects[index])}{stop}", (index,)))
    return pieces


def _name(item: SceneObject) -> str:
    return f"a {item.color} {item.shape} labelled {item.label}"


def described_kind(num_objects: int) -> str:
    """The row of the tables in which a scene with so many objects counts."""
    low, high = next((kind for kind in _KINDS if num_objects <= kind[1]), _KINDS[-1])
    return f"{low} to {high} objects"
