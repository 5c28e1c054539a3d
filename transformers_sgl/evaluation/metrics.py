"""Metrics: how right an answer is, by the definitions that published benchmarks use.

A metric takes an answer, the right answers and the choices that were offered, and gives a score from 0 to 1. What a
benchmark reports is the mean over its questions. [`METRICS`] holds them by name:

- `exact_match`: easy-VQA, scenes, GQA.
- `vqa_accuracy`: VQAv2, TextVQA, OK-VQA, VizWiz; ten people answered each question.
- `anls`: DocVQA, InfographicVQA, ST-VQA.
- `relaxed_accuracy`: ChartQA.
- `choice_accuracy`: multiple choice.
- `described_facts`: descriptions, where each object that is named rightly is a fact.

An answer is taken as the model wrote it. Answers are not extracted from a longer text: ask for a short answer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from string import ascii_uppercase, punctuation

__all__ = [
    "METRICS",
    "Metric",
    "anls",
    "choice_accuracy",
    "described",
    "described_facts",
    "exact_match",
    "metric",
    "relaxed_accuracy",
    "vqa_accuracy",
]

Metric = Callable[[str, Sequence[str], Sequence[str]], float]


def metric(name: str) -> Metric:
    """Looks a metric up.

    Args:
        name (`str`): A key of [`METRICS`].

    Returns:
        `Metric`: The function `(answer, answers, choices) -> score`.

    Raises:
        ValueError: If there is no metric of that name.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.metrics import metric

        >>> metric("relaxed_accuracy")("96", ["100"], [])
        1.0

        ```
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}: take one of {', '.join(METRICS)}.")
    return METRICS[name]


def exact_match(answer: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether an answer is one of the right ones, whatever its case, white space and final full stop."""
    return float(_normalised(answer) in map(_normalised, answers))


def _normalised(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def vqa_accuracy(answer: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """How many of the people who were asked gave this answer: the accuracy of VQAv2 and TextVQA.

    Three people who agree are enough: `min(matches / 3, 1)`, averaged over leaving out each person in turn (Antol et
    al. 2015, arXiv 1505.00468; visualqa.org/evaluation.html). With ten people one match gives 0.3, two 0.6, three 0.9,
    four 1. At least four answers are needed.

    Both sides are normalised as in the challenge's evaluation: lower case; no punctuation except apostrophes, colons
    and decimal points; number words up to ten as digits; no articles; apostrophes where contractions lack them. The
    published code does not normalise articles and number words in people's answers, whose data has none; this does.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.metrics import vqa_accuracy

        >>> people = ["2", "2", "3"] + ["4"] * 7
        >>> [round(vqa_accuracy(answer, people), 3) for answer in ("Three.", "two", "four", "five")]
        [0.3, 0.6, 1.0, 0.0]

        ```
    """
    if len(answers) < 4:
        raise ValueError(
            f"VQA accuracy compares with what ten people answered, at least four, but {len(answers)} answers are "
            "given: give all of them, repetitions included, or take the metric exact_match."
        )
    given = _vqa_normalised(answer)
    matches = [_vqa_normalised(other) == given for other in answers]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches)


_VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
} | {"none": "0"}
_VQA_ARTICLES = ("a", "an", "the")
_DIGIT_COMMA = re.compile(r"\d,\d")
_NO_DECIMAL_POINT = re.compile(r"\.(?!\d)")


def _contractions() -> dict[str, str]:
    """Contractions that lack one apostrophe, with their right spelling, as in the challenge's evaluation.

    Words that have another meaning without it, such as "its" and "well", are not among them.
    """
    stems = {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
        "'ve": "could might must not should they we what where who would you",
        "'d": "he how it somebody someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
        "n't've": "could had might should would",
        "'d've": "he it she somebody someone something there they we who you",
    }
    whole = [stem + ending for ending, words in stems.items() for stem in words.split()]
    whole += ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've", "'ow's'at"]
    return {word[:i] + word[i + 1 :]: word for word in whole for i in range(len(word)) if word[i] == "'"}


_CONTRACTIONS = _contractions()


def _vqa_normalised(text: str) -> str:
    text = " ".join(text.split())
    # A mark becomes a space, unless there is one beside it; where commas group digits, it is deleted.
    grouped = _DIGIT_COMMA.search(text) is not None
    text = text.translate(
        {ord(mark): "" if grouped or f" {mark}" in text or f"{mark} " in text else " " for mark in _VQA_PUNCTUATION}
    )
    words = [_VQA_NUMBERS.get(word, word) for word in _NO_DECIMAL_POINT.sub("", text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _VQA_ARTICLES)


def anls(answer: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """How close an answer is to the nearest right one: the average normalised Levenshtein similarity.

    The similarity is `1 - distance / length of the longer one`; below one half it counts as 0 (Biten et al. 2019,
    arXiv 1905.13648). Exactly one half counts, as in the evaluation code of the DocVQA challenge, unlike in the
    paper's equation. Case and the amount of white space do not matter.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError(
            f"The metric anls needs rapidfuzz ({error}): run `pip install 'transformers_sgl[evaluate]'`."
        ) from error

    given = " ".join(answer.lower().split())
    right = (" ".join(other.lower().split()) for other in answers)
    return max((Levenshtein.normalized_similarity(given, other, score_cutoff=0.5) for other in right), default=0.0)


def relaxed_accuracy(answer: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether a number is within 5 % of the right one, or a text the right one: the accuracy of ChartQA.

    See Methani et al. 2020; Masry et al. 2022, arXiv 2203.10244, section 5.1. A percent sign divides by 100, so 96%
    and 0.96 are the same. What is not a number as a whole has to match as in [`exact_match`].
    """
    return float(any(_relaxed_match(_normalised(answer), _normalised(right)) for right in answers))


def _relaxed_match(given: str, right: str) -> bool:
    numbers = _number(given), _number(right)
    if numbers[0] is None or numbers[1] is None:
        return given == right
    return abs(numbers[0] - numbers[1]) <= 0.05 * abs(numbers[1])


def _number(text: str) -> float | None:
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def choice_accuracy(answer: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the right one of several choices was made.

    A choice is made by its letter, alone (`B`, `(B)`, `b.`) or before a text (`B. a dog`); by its text; or by either
    of them after the last of the words answer, option or choice (`The answer is (B).`, `Answer: a dog`). A leading
    `A` that may be an article does not count (`A dog`), nor do two letters (`A or B`) or a choice within a sentence.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.metrics import choice_accuracy

        >>> animals = ["a cat", "a dog", "a cow"]
        >>> [choice_accuracy(answer, ["B"], animals) for answer in ("(B)", "Answer: b", "A dog.", "A")]
        [1.0, 1.0, 1.0, 0.0]

        ```
    """
    if not 0 < len(choices) <= len(ascii_uppercase):
        raise ValueError(
            f"Choice accuracy needs 1 to {len(ascii_uppercase)} choices, but {len(choices)} are given: name the "
            "column that holds them, or take the metric exact_match."
        )
    texts = [_normalised(choice) for choice in choices]
    right = {_alone(other, texts) for other in answers}
    if None in right:
        raise ValueError(
            f"The right answers {list(answers)!r} are not all among the choices {list(choices)!r}: give the letter or "
            "the text of a choice."
        )
    return float(_chosen(answer, texts) in right)


_DECLARATION = re.compile(r"\b(?:answer|option|choice)\b(?:\s+is)?[\s:=>\"']*", re.IGNORECASE)
# A letter with brackets or without, and what may follow: the end, a mark, or another word. It is an article or a
# pronoun that may be followed by another word and mean something else.
_LETTER = re.compile(
    r"\(?\b([A-Z])(?:(?=\W*$)|\)?[.:)](?=\s|$)|\)|(?=[<,;\n])|(?=\s+(?:because|is|as|since)\b))", re.I
)
_LETTER_THEN_WORD = re.compile(r"([B-HJ-Z])(?=\s)", re.IGNORECASE)
_ANOTHER_LETTER = re.compile(r"[).:]*\s*(?:/|,|&|\bor\b|\band\b)\s*\(?[A-Z]\b(?!')", re.IGNORECASE)


def _chosen(answer: str, texts: Sequence[str]) -> int | None:
    """Which choice was made, as an index; `None` for none."""
    index = _alone(answer, texts)
    if index is not None:
        return index
    answer = re.sub(r"[*`]", "", answer).strip()  # Markdown's emphasis
    for declaration in reversed([*_DECLARATION.finditer(answer)]):
        rest = answer[declaration.end() :]
        index = _leading(rest, texts, _LETTER, _LETTER_THEN_WORD)
        if index is None:
            index = _alone(rest.partition("\n")[0], texts)
        if index is not None:
            return index
    return _leading(answer, texts, _LETTER)


def _alone(answer: str, texts: Sequence[str]) -> int | None:
    """The choice whose letter or text is the whole answer."""
    answer = _normalised(answer)
    letter = answer.strip(punctuation + " ").upper()
    # Marks belong to a letter only if they make no text, as in C++.
    if len(letter) == 1 and letter in ascii_uppercase[: len(texts)] and (len(answer) == 1 or answer not in texts):
        return ascii_uppercase.index(letter)
    return texts.index(answer) if answer in texts else None


def _leading(answer: str, texts: Sequence[str], *patterns: re.Pattern[str]) -> int | None:
    """The choice whose letter the answer begins with."""
    for pattern in patterns:
        found = pattern.match(answer)
        if found is not None and not _ANOTHER_LETTER.match(answer[found.end() :]):
            index = ascii_uppercase.index(found[1].upper())
            return index if index < len(texts) else None
    return None


def described_facts(answer: str, answers: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Which share of the objects a description tells rightly: colour, shape, label and place, all four.

    These are the facts that the answer and the right one share, divided by the number of facts of the longer of the
    two, so what is left out and what is made up both count. The order does not matter, nor does the wording around
    the objects; see [`described`]. A right answer without such facts has to match as in [`exact_match`].

    Example:
        ```python
        >>> from transformers_sgl.evaluation.metrics import described_facts

        >>> right = "in the top left there are a red circle labelled A and a blue circle labelled B."
        >>> described_facts("there is a red circle labelled A in the top left.", [right])
        0.5

        ```
    """
    given = described(answer)
    shares = [exact_match(answer, answers)]
    for right in answers:
        facts = described(right)
        shares.append((given & facts).total() / max(given.total(), facts.total(), 1))
    return max(shares)


_PLACE = r" in the (top|bottom) (left|right)\b"
_DESCRIBED = re.compile(rf"\ba (\w+) (\w+) labelled (\w+)(?:{_PLACE})?")
_PLACE_FIRST = re.compile(rf"^{_PLACE}")

Fact = tuple[str, str, str, str]


def described(text: str) -> Counter[Fact]:
    """The objects that a description names: colour, shape, label and place of each, in lower case.

    The place is named right behind the object, or else at the beginning of the sentence for all that follow; where
    there is none, the fact's place is empty.
    """
    facts: Counter[Fact] = Counter()
    for sentence in " ".join(text.lower().split()).split("."):
        first = _PLACE_FIRST.match(f" {sentence.strip()}")
        for found in _DESCRIBED.finditer(sentence):
            color, shape, label, *own = found.groups()
            place = own if own[0] else first.groups() if first else ()
            facts[color, shape, label, " ".join(place)] += 1
    return facts


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "choice_accuracy": choice_accuracy,
    "described_facts": described_facts,
}
