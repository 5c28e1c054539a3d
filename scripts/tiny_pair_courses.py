"""What the tiny pairs learn, and on which schedule: one course for each embedded pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import tiny_pair_data as shapes
import tiny_pair_descriptions as descriptions
import tiny_pair_pages as pages
import torch
from tiny_pair_data import PLACE_KINDS, SCENE_KINDS
from tiny_pair_pages import HARD_MIX, PAGE_MIX

__all__ = ["COURSES", "Course", "Phase", "Schedule"]


@dataclass(frozen=True)
class Phase:
    """A part of a schedule.

    Attributes:
        steps: How long it lasts.
        sources: How often each source of data is drawn.
        negation: The fraction of yes/no questions that are negated.
        hints: Weight of the attention hints.
        kinds: The kinds of question about scenes, as often as they are named.
    """

    steps: int
    sources: dict[str, float]
    negation: float = 0.5
    hints: float = 0.0
    kinds: tuple[str, ...] = SCENE_KINDS


@dataclass(frozen=True)
class Schedule:
    """How one stage trains.

    Attributes:
        phases: What is trained on, one after another.
        batch: Pictures per step, by source.
        questions: Questions per picture, by source.
        matrix_lr: Learning rate of Muon, which trains the weight matrices.
        other_lr: Learning rate of AdamW, which trains everything else.
        tower_rate: Learning rates of a vision tower that has been trained before, relative to the others.
        hinted_layer: Index of the decoder layer that attention hints go to; some go to the one before it.
        warmup: Steps until the full learning rate.
        decay: The fraction of steps, at the end, over which the learning rate falls to zero.
    """

    phases: tuple[Phase, ...]
    batch: dict[str, int]
    questions: dict[str, int]
    matrix_lr: float
    other_lr: float
    tower_rate: float = 1.0
    hinted_layer: int = -1
    warmup: int = 100
    decay: float = 0.25

    @property
    def steps(self) -> int:
        """All steps of the stage."""
        return sum(phase.steps for phase in self.phases)

    def factor(self, step: int) -> float:
        """The fraction of the learning rate at a step."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.decay * self.steps))

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        ends = accumulate(phase.steps for phase in self.phases)
        return next(phase for end, phase in zip(ends, self.phases, strict=True) if step < end)

    def source(self, step: int, seed: int) -> str:
        """The source of data at a step."""
        weights = self.phase(step).sources
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        index = torch.multinomial(torch.tensor(list(weights.values())), 1, generator=generator).item()
        return list(weights)[index]


@dataclass(frozen=True)
class Course:
    """The data of one embedded pair, and how it is taught.

    Attributes:
        output: Where the pair goes, by default.
        dense: How many classes each dense label has, the background last.
        vocab_size: The most entries of the tokenizer, without the special tokens.
        vision_layers: Layers of the vision tower.
        corpus: `(seed) -> texts` that the tokenizer is trained on.
        tile_example: `(seed, index) -> example` for the tower alone.
        example: `(source, seed, index, num_questions, negation, kinds) -> example`.
        held_out: `(seed) -> examples by source` for the progress checks.
        schedules: How each stage trains.
        starts_from: A pair to take the tokenizer, the processor and the first weights from, instead of starting from
            nothing. Then there is no stage for the tower alone.
        max_new_tokens: The length limit of an answer that the models say by themselves.
    """

    output: str
    dense: dict[str, int]
    vocab_size: int
    vision_layers: int
    corpus: Callable[[int], list[str]]
    tile_example: Callable[[int, int], Any]
    example: Callable[..., Any]
    held_out: Callable[[int], dict[str, Sequence[Any]]]
    schedules: dict[str, Schedule]
    starts_from: str | None = None
    max_new_tokens: int = 48


def _held_out_shapes(seed: int) -> dict[str, Sequence[Any]]:
    return {
        "shape": [shapes.example("shape", seed, index, 12) for index in range(48)],
        "mini": [shapes.example("mini", seed, index, 9) for index in range(48)],
        "scene": shapes.scene_examples("test", seed, 48),
    }


def _held_out_pages(seed: int) -> dict[str, Sequence[Any]]:
    return {
        "card": [pages.example("card", seed, index, 6) for index in range(48)],
        "page": pages.page_examples("test", seed, 64),
    }


def _held_out_descriptions(seed: int) -> dict[str, Sequence[Any]]:
    return {
        "mini": [shapes.example("mini", seed, index, 9) for index in range(24)],
        "scene": shapes.scene_examples("test", seed, 24),
        "many": descriptions.description_examples("test", seed, 32),
    }


_SHAPES = {
    "tower": Schedule(
        phases=(Phase(1350, {"tile": 1.0}),), batch={"tile": 64}, questions={}, matrix_lr=0.02, other_lr=3e-3
    ),
    "small": Schedule(
        phases=(
            Phase(400, {"shape": 0.4, "mini": 0.6}, negation=0.1, hints=0.3),
            Phase(300, {"mini": 1.0}, negation=0.1, hints=1.0),
            Phase(100, {"mini": 0.6, "scene": 0.4}, negation=0.3, hints=1.0),
            Phase(500, {"shape": 0.05, "mini": 0.55, "scene": 0.4}, negation=0.3, hints=1.0),
            Phase(400, {"mini": 0.3, "scene": 0.7}),
        ),
        batch={"shape": 24, "mini": 24, "scene": 10},
        questions={"shape": 12, "mini": 14, "scene": 18},
        matrix_lr=0.01,
        other_lr=3e-3,
        hinted_layer=2,
    ),
    "large": Schedule(
        phases=(
            Phase(200, {"shape": 0.3, "mini": 0.7}, negation=0.1, hints=0.3),
            Phase(200, {"shape": 0.2, "mini": 0.8}, negation=0.1, hints=1.0),
            Phase(300, {"shape": 0.2, "mini": 0.4, "scene": 0.4}, negation=0.3, hints=1.0),
            Phase(100, {"shape": 0.1, "mini": 0.2, "scene": 0.7}),
            Phase(800, {"shape": 0.05, "mini": 0.2, "scene": 0.75}, kinds=PLACE_KINDS),
        ),
        batch={"shape": 16, "mini": 16, "scene": 6},
        questions={"shape": 12, "mini": 14, "scene": 18},
        matrix_lr=0.01,
        other_lr=2e-3,
        hinted_layer=4,
        decay=0.5,
    ),
}


_READING = {
    "tower": Schedule(
        phases=(Phase(3000, {"tile": 1.0}),),
        batch={"tile": 64},
        questions={},
        matrix_lr=0.02,
        other_lr=3e-3,
        decay=0.4,
    ),
    "small": Schedule(
        phases=(
            Phase(200, {"card": 1.0}, hints=1.0),
            Phase(1000, {"card": 0.2, "page": 0.8}, hints=1.0, kinds=PAGE_MIX),
            Phase(400, {"card": 0.2, "page": 0.8}, hints=1.0, kinds=HARD_MIX),
            Phase(400, {"card": 0.1, "page": 0.9}, kinds=HARD_MIX),
        ),
        batch={"card": 24, "page": 10},
        questions={"card": 8, "page": 12},
        matrix_lr=0.01,
        other_lr=3e-3,
        tower_rate=0.2,
        hinted_layer=2,
        decay=0.5,
    ),
    "large": Schedule(
        phases=(
            Phase(200, {"card": 1.0}, hints=1.0),
            Phase(400, {"card": 0.1, "page": 0.9}, hints=1.0, kinds=PAGE_MIX),
            Phase(1000, {"card": 0.1, "page": 0.9}, hints=1.0, kinds=HARD_MIX),
            Phase(800, {"card": 0.05, "page": 0.95}, kinds=HARD_MIX),
        ),
        batch={"card": 16, "page": 6},
        questions={"card": 8, "page": 12},
        matrix_lr=0.008,
        other_lr=2e-3,
        tower_rate=0.2,
        hinted_layer=4,
        decay=0.6,
    ),
}

_OLD = {"shape": 0.04, "mini": 0.06, "scene": 0.1}  # what the pair knew before
_DESCRIBING = {
    "small": Schedule(
        phases=(
            Phase(150, {**_OLD, "few": 0.6, "many": 0.2}, hints=1.0),
            Phase(350, {**_OLD, "few": 0.1, "many": 0.7}, hints=1.0),
            Phase(100, {**_OLD, "many": 0.8}),
        ),
        batch={"shape": 24, "mini": 24, "scene": 10, "few": 32, "many": 10},
        questions={"shape": 12, "mini": 14, "scene": 18, "few": 1, "many": 1},
        matrix_lr=0.008,
        other_lr=2e-3,
        tower_rate=0.3,
        hinted_layer=2,
        decay=1 / 6,
    ),
    "large": Schedule(
        phases=(
            Phase(100, {**_OLD, "few": 0.6, "many": 0.2}, hints=1.0),
            Phase(800, {**_OLD, "few": 0.1, "many": 0.7}, hints=1.0),
            Phase(500, {**_OLD, "scene": 0.3, "many": 0.6}),
        ),
        batch={"shape": 16, "mini": 16, "scene": 6, "few": 24, "many": 6},
        questions={"shape": 12, "mini": 14, "scene": 18, "few": 1, "many": 1},
        matrix_lr=0.006,
        other_lr=1.5e-3,
        tower_rate=0.3,
        hinted_layer=4,
        decay=0.5,
    ),
}

COURSES = {
    "shapes": Course(
        output="model_cards/sgl-tiny",
        dense=shapes.DENSE,
        vocab_size=504,
        vision_layers=3,
        corpus=shapes.corpus,
        tile_example=shapes.tile_example,
        example=shapes.example,
        held_out=_held_out_shapes,
        schedules=_SHAPES,
    ),
    "reading": Course(
        output="model_cards/sgl-tiny-reading",
        dense=pages.DENSE,
        vocab_size=1000,
        vision_layers=4,
        corpus=pages.corpus,
        tile_example=pages.tile_example,
        example=pages.example,
        held_out=_held_out_pages,
        schedules=_READING,
    ),
    "describing": Course(
        output="model_cards/sgl-tiny-describing",
        dense=shapes.DENSE,
        vocab_size=504,
        vision_layers=3,
        corpus=shapes.corpus,
        tile_example=shapes.tile_example,
        example=descriptions.example,
        held_out=_held_out_descriptions,
        schedules=_DESCRIBING,
        starts_from="model_cards/sgl-tiny",
        max_new_tokens=160,
    ),
}
