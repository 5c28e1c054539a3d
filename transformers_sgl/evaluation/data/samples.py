"""Samples: questions about images, with the answers that count as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from PIL import Image, UnidentifiedImageError

from transformers_sgl.evaluation.metrics import choice_accuracy

__all__ = ["UNREADABLE", "Sample", "check_image", "checked_choices", "unreadable"]

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Sample:
    """A question about an image, with the answers that count as right.

    Attributes:
        image: The image, its file, or a function that fetches it.
        question: The question.
        answers: The right answers; for multiple choice letters or texts of choices.
        choices: The choices in the order of their letters; empty for an open question.
        kind: The row of the tables that the question counts in, such as `"yes/no"`.
        image_id: The same for all questions about one image, as far as known.
        where: Where it was read from, for error messages.
    """

    image: Path | Image.Image | Callable[[], Image.Image]
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    kind: str = ""
    image_id: str = ""
    where: str = ""

    @property
    def prompt(self) -> str:
        """The question, followed by the choices, each on its own line.

        Example:
            ```python
            >>> from pathlib import Path
            >>> from transformers_sgl.evaluation.data import Sample

            >>> print(Sample(Path("zoo.png"), "what is it?", ("B",), choices=("a cat", "a dog")).prompt)
            what is it?
            A. a cat
            B. a dog

            ```
        """
        lines = (f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, self.choices, strict=False))
        return "\n".join((self.question, *lines))

    def open_image(self) -> Image.Image:
        """Fetches and decodes the image."""
        try:
            if isinstance(self.image, Path):
                with Image.open(self.image) as image:
                    return image.convert("RGB")
            return (self.image if isinstance(self.image, Image.Image) else self.image()).convert("RGB")
        except UNREADABLE as error:
            raise unreadable(self.image, self.where, error) from error


def checked_choices(sample: Sample) -> Sample:
    """The sample; raises if its right answers are not among its choices."""
    if sample.choices:
        try:
            choice_accuracy("", sample.answers, sample.choices)
        except ValueError as error:
            raise ValueError(f"{sample.where}: {error}") from error
    return sample


def check_image(path: Path, where: str) -> None:
    """Raises if a file is missing or is no image; only its header is read."""
    if not path.is_file():
        raise OSError(
            f"{where}: `image` names {str(path)!r}, but there is no such file; give a path that is absolute or starts "
            "from the data file's folder."
        )
    try:
        with Image.open(path):
            pass
    except UNREADABLE as error:
        raise unreadable(path, where, error) from error


def unreadable(image: object, where: str, error: Exception) -> OSError:
    """The error for an image that cannot be read, with its cure."""
    if isinstance(image, Path):
        return OSError(
            f"{where}: `image` names {str(image)!r}, which cannot be read as an image ({error}); replace it or leave "
            "the line out."
        )
    reason = "it is none" if isinstance(error, UnidentifiedImageError) else error  # whose text names an address
    return OSError(f"{where}: the image cannot be read ({reason}); replace it or leave the row out.")
