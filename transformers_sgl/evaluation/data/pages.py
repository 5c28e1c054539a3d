"""Seeded pages to read: forms, receipts, charts and signs, with questions and answers.

A page has 128 x 128 pixels of dense, small text in the fonts that matplotlib ships. Questions are of the kinds that
DocVQA, ChartQA and TextVQA ask; most answers are printed on the page, from one token to fifteen, and have to be
spelled. Pruning visual tokens fails first on such pictures.

Everything is drawn from a seed: `Pages("test", seed=0)[7]` is the same page on every machine with the same Pillow and
matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from transformers_sgl.evaluation.data.page_canvas import Text
from transformers_sgl.evaluation.data.page_kinds import PAGE_KINDS, PageQuestion, draw_page
from transformers_sgl.evaluation.data.scenes import SPLITS

__all__ = ["Page", "Pages"]


@dataclass(frozen=True)
class Page:
    """A page, what stands on it, and questions about it."""

    kind: str  # one of `PAGE_KINDS`
    image: Image.Image  # the page, `(128, 128)` pixels, RGB
    texts: tuple[Text, ...]  # what is printed on it
    questions: tuple[PageQuestion, ...] = field(default=(), repr=False)  # the questions, answers included


class Pages:
    """An endless, seeded sequence of pages; `pages[i]` never changes.

    Args:
        split: `"train"`, `"calibration"` or `"test"`. Pages of different splits never share a seed.
        seed: A number that names the sequence.
        questions_per_page: The most questions to draw for each page.
        length: How many pages iterating gives.

    Raises:
        ValueError: If there is no such split.
    """

    def __init__(self, split: str = "test", seed: int = 0, *, questions_per_page: int = 8, length: int = 1000) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        self.split = split
        self.seed = seed
        self.questions_per_page = questions_per_page
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Page]:
        return (self[index] for index in range(self.length))

    def __getitem__(self, index: int) -> Page:
        return self.of_kind(PAGE_KINDS[index % len(PAGE_KINDS)], index)

    def of_kind(self, kind: str, index: int) -> Page:
        """The page of this index if it is of that kind; `pages[index]` takes the kinds in turn."""
        rng = np.random.default_rng([SPLITS[self.split], self.seed, index])
        canvas, questions = draw_page(kind, rng)
        drawn = [questions[i] for i in rng.permutation(len(questions))[: self.questions_per_page]]
        return Page(kind, canvas.image, tuple(canvas.texts), tuple(drawn))
