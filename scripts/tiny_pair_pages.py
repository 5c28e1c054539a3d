"""Training data for the tiny pair that reads: cards and pages of text, each with many questions behind one picture.

Everything is computed from an index, as in `tiny_pair_data.py`. Two sources:

- `card`: a 64 x 64 picture with a few short texts, at a fifth of the cost.
- `page`: a 128 x 128 page of the built-in data set `reading`, which the processor turns into four tiles and a
  thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image
from tiny_pair_data import IGNORE, PATCH, TILE

from transformers_sgl.evaluation.data.page_canvas import Text
from transformers_sgl.evaluation.data.page_kinds import (
    CARD_KINDS,
    CHARACTERS,
    PAGE_KINDS,
    WORDS,
    PageQuestion,
    draw_card,
)
from transformers_sgl.evaluation.data.pages import Pages

# What a visual token shows: the first two characters whose middles lie in it, and the word that the first belongs to.
DENSE = {"first": len(CHARACTERS) + 1, "second": len(CHARACTERS) + 1, "words": len(WORDS) + 2}
OTHER_WORD = len(WORDS)
# What is learnt first, and what is hardest, as often as it is named.
PAGE_MIX = ("form", "form", "form", "receipt", "receipt", "chart", "sign", "sign")
HARD_MIX = ("form", "receipt", "chart", "chart", "chart", "sign", "sign", "sign")
SIDE = TILE // PATCH  # visual tokens


@dataclass(frozen=True)
class PageExample:
    """One picture with its questions and dense labels.

    Attributes:
        image: The picture.
        questions: Questions with answers.
        labels: By name, `(num_visual_tokens,)` each: the keys of `DENSE`; `IGNORE` in the thumbnail.
        places: For each text the visual token of each of its characters.
    """

    image: Image.Image
    questions: tuple[PageQuestion, ...]
    labels: dict[str, np.ndarray]
    places: tuple[tuple[int, ...], ...]

    def where_to_look(self, question: PageQuestion, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """The visual tokens that matter for each token of an answer: those where it is printed.

        Where it is printed nowhere, those of the texts that the question is about.
        """
        about = [place for index in question.about for place in self.places[index]]
        hints = []
        for start, end in spans:
            spots = [spot for spot in question.spots[start:end] if spot is not None]
            looked_at = [self.places[index][place] for index, place in spots] or about
            hints.append(np.unique(np.array(looked_at, dtype=np.int64)))
        return hints

    def where_to_look_first(self, question: PageQuestion) -> np.ndarray:
        """The visual tokens of what the question names, from where the answer is found."""
        answer = {spot[0] for spot in question.spots if spot is not None}
        named = [place for index in question.about if index not in answer for place in self.places[index]]
        return np.unique(np.array(named, dtype=np.int64))


def example(
    source: str, seed: int, index: int, num_questions: int, negation: float = 0.5, kinds: Sequence[str] = PAGE_KINDS
) -> PageExample:
    """Makes one training example; see [`tiny_pair_data.example`]. `negation` is for other data.

    `kinds` are the kinds of page, as often as they are named.
    """
    if source == "page":
        page = Pages("train", seed, questions_per_page=num_questions)
        drawn = page.of_kind(kinds[index % len(kinds)], index)
        return as_example(drawn.image, drawn.texts, drawn.questions)
    rng = np.random.default_rng([4, seed, index])
    canvas, questions = draw_card(CARD_KINDS[index % len(CARD_KINDS)], rng)
    return as_example(canvas.image, canvas.texts, questions[:num_questions])


def page_examples(split: str, seed: int, count: int) -> list[PageExample]:
    """The first pages of a split, as examples."""
    return [as_example(page.image, page.texts, page.questions) for page in Pages(split, seed, length=count)]


def tile_example(seed: int, index: int) -> PageExample:
    """Makes one tile for the tower alone, without questions: a card, or a quarter of a page."""
    number, quarter = divmod(index, 4)
    if quarter == 0:
        return replace(example("card", seed, number, 0), questions=())
    page, quarter = _page(seed, number), (number + quarter) % 4  # three quarters of each page
    left, top = quarter % 2 * TILE, quarter // 2 * TILE
    tokens = slice(quarter * SIDE**2, (quarter + 1) * SIDE**2)
    labels = {name: values[tokens] for name, values in page.labels.items()}
    return PageExample(page.image.crop((left, top, left + TILE, top + TILE)), (), labels, ())


@lru_cache(maxsize=2)
def _page(seed: int, index: int) -> PageExample:
    return example("page", seed, index, 0, kinds=PAGE_MIX)


def as_example(image: Image.Image, texts: Sequence[Text], questions: Sequence[PageQuestion]) -> PageExample:
    """A picture with its dense labels."""
    tiles = image.width // TILE  # along each side
    number = tiles**2 * SIDE**2
    labels = {name: np.full(number, size - 1) for name, size in DENSE.items()}
    places, seen = [], np.zeros(number, dtype=np.int64)
    for text in texts:
        own = tuple(visual_token(x, y, tiles) for x, y in text.centers)
        places.append(own)
        words = word_labels(text.text)
        for character, place, word in zip(text.text, own, words, strict=True):
            if character == " ":
                continue
            name = ("first", "second")[min(int(seen[place]), 1)]
            if seen[place] < 2:
                labels[name][place] = CHARACTERS.index(character)
            if seen[place] == 0:
                labels["words"][place] = word
            seen[place] += 1
    if tiles > 1:
        hidden = np.full(SIDE**2, IGNORE)
        labels = {name: np.concatenate([values, hidden]) for name, values in labels.items()}
    return PageExample(image, tuple(questions), labels, tuple(places))


def visual_token(x: float, y: float, tiles: int) -> int:
    """The index of the visual token that shows a point, in the order in which the processor makes them."""
    column, row = (min(max(int(value // PATCH), 0), tiles * SIDE - 1) for value in (x, y))
    tile = row // SIDE * tiles + column // SIDE
    return tile * SIDE**2 + row % SIDE * SIDE + column % SIDE


def word_labels(text: str) -> list[int]:
    """For each character of a text the word that it belongs to."""
    labels = []
    for word in text.split(" "):
        name = word.strip(":")
        labels += [WORDS.index(name) if name in WORDS else OTHER_WORD] * len(word) + [OTHER_WORD]
    return labels[:-1]


def corpus(seed: int, num_pages: int = 2000) -> list[str]:
    """Texts to train the tokenizer on: every wording, and the words that questions name.

    Names, codes and numbers are left out, so that they are spelled.
    """
    texts = [word for word in WORDS for _ in range(20)] + [f" {word}" for word in WORDS for _ in range(40)]
    for index in range(num_pages):
        asked = [question.question for question in example("page", seed, index, 12).questions]
        texts += [text for text in asked if not any(map(str.isdigit, text))]
    return texts + ["what costs 1.50?"] * num_pages + ["user", "assistant", "system"] * num_pages
