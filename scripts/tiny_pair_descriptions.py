"""Training data for the tiny pair that describes: what the first pair learnt, and pictures to describe in full.

Everything is computed from an index, as in `tiny_pair_data.py`. Besides its sources (`shape`, `mini`, `scene`), from
which the old questions are drawn so that they are not forgotten, there are two:

- `few`: a 64 x 64 scene of 2 x 2 cells, to be described, at a fifth of the cost.
- `many`: a 128 x 128 scene of the built-in data set `descriptions`, which the processor turns into four tiles and a
  thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tiny_pair_data as shapes
from tiny_pair_data import SCENE_KINDS, TILE, Example, dense_labels

from transformers_sgl.evaluation.data.descriptions import Descriptions, describe
from transformers_sgl.evaluation.data.scene_objects import CELL
from transformers_sgl.evaluation.data.scene_questions import Question
from transformers_sgl.evaluation.data.scenes import Scene

SIZES = {"few": TILE, "many": 2 * TILE}


@dataclass(frozen=True)
class DescriptionExample(Example):
    """One picture to describe.

    Attributes:
        told: For each character of the description the indices of the objects that it is about.
    """

    told: tuple[tuple[int, ...], ...]

    def where_to_look(self, question: Question, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The visual tokens that matter for each token of the description: those of the objects it is about.

        At the words before the first name of a sentence these are all objects that the sentence will name.
        """
        return [np.flatnonzero(np.isin(self.owners, self.told[end - 1])) for _, end in spans]


def example(
    source: str,
    seed: int,
    index: int,
    num_questions: int,
    negation: float = 0.5,
    kinds: Sequence[str] = SCENE_KINDS,
) -> Example:
    """Makes one training example; see [`tiny_pair_data.example`]. A picture to describe has one question."""
    if source not in SIZES:
        return shapes.example(source, seed, index, num_questions, negation, kinds)
    return as_example(Descriptions("train", seed, size=SIZES[source])[index])


def description_examples(split: str, seed: int, count: int) -> list[Example]:
    """The first scenes of a split, as examples."""
    return [as_example(scene) for scene in Descriptions(split, seed, length=count)]


def as_example(scene: Scene) -> DescriptionExample:
    """A scene with its dense labels."""
    pieces = describe(scene.objects, scene.image.width // CELL)
    told = tuple(about for text, about in pieces for _ in text)
    return DescriptionExample(scene.image, scene.questions, *dense_labels(scene.objects, scene.image.width), told)
