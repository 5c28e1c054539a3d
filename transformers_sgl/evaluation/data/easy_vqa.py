"""easy-VQA: pictures of one coloured shape, with questions that have one of thirteen answers.

The `easy-vqa` package carries the data set itself (MIT licence, 64 x 64 PNG files): 4,000 pictures with 38,575
questions to train on, 1,000 with 9,673 to test on. Three quarters of the questions want a yes or a no, and most of
those can be guessed from the wording: a shape has one colour of eight. Report yes/no questions apart from the others,
with `question_only_prior` beside them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

from PIL import Image

__all__ = ["EasyVQAQuestion", "load_easy_vqa", "question_only_prior"]


@dataclass(frozen=True)
class EasyVQAQuestion:
    """A question about a picture.

    Attributes:
        question: The question, in lower case.
        answer: The right answer, one lower-case word.
        image_id: Number of the picture within its split.
        image_path: The picture's PNG file.
    """

    question: str
    answer: str
    image_id: int
    image_path: Path

    @property
    def is_yes_no(self) -> bool:
        """Whether the answer is yes or no."""
        return self.answer in ("yes", "no")

    @cached_property
    def image(self) -> Image.Image:
        """The picture, 64 x 64, RGB; read from its file when first asked for."""
        with Image.open(self.image_path) as image:
            return image.convert("RGB")


def load_easy_vqa(split: str = "test", limit: int | None = None) -> list[EasyVQAQuestion]:
    """Loads the questions of a split, in the package's order; no picture is read yet.

    Args:
        split: `"train"` or `"test"`.
        limit: The greatest number of questions, `None` for all.

    Returns:
        The questions.

    Raises:
        ValueError: If there is no such split.
        ImportError: If the package that holds the data is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; easy-VQA has train and test")
    easy_vqa = _import_easy_vqa()
    texts, answers, image_ids = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    questions = [
        EasyVQAQuestion(text, answer, image_id, Path(paths[image_id]))
        for text, answer, image_id in zip(texts, answers, image_ids, strict=True)
    ]
    return questions[:limit]


def question_only_prior(train: Sequence[EasyVQAQuestion], test: Sequence[EasyVQAQuestion]) -> dict[str, float]:
    """What is reached without looking: every question gets the answer it has most often in training."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in train:
        counts[item.question][item.answer] += 1
    overall = Counter(item.answer for item in train).most_common(1)[0][0] if train else ""
    guesses = {question: answers.most_common(1)[0][0] for question, answers in counts.items()}
    right = [(item.is_yes_no, guesses.get(item.question, overall) == item.answer) for item in test]

    def mean(values: list[bool]) -> float:
        return sum(values) / len(values) if values else 0.0

    return {
        "all": mean([hit for _, hit in right]),
        "yes_no": mean([hit for yes_no, hit in right if yes_no]),
        "other": mean([hit for yes_no, hit in right if not yes_no]),
    }


def _import_easy_vqa() -> ModuleType:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "easy-VQA's pictures and questions come in a package: run `pip install easy-vqa`."
        ) from error
    return easy_vqa
