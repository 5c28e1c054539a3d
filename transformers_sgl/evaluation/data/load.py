"""Loads questions by the name of their source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from transformers_sgl.evaluation.data.data_sets import load_data_set
from transformers_sgl.evaluation.data.descriptions import Descriptions
from transformers_sgl.evaluation.data.easy_vqa import load_easy_vqa
from transformers_sgl.evaluation.data.json_lines import read_samples
from transformers_sgl.evaluation.data.pages import Pages
from transformers_sgl.evaluation.data.samples import Sample
from transformers_sgl.evaluation.data.scenes import Scenes

__all__ = ["load_samples"]

_EASY_VQA_SPLITS = ("test", "train")
_DRAWN_SPLITS = ("test", "calibration", "train")
_NUM_DRAWN = 2000


def load_samples(
    name: str, *, columns: Mapping[str, str] | None = None, limit: int | None = None, seed: int = 0
) -> list[Sample]:
    """Loads questions by the name of their source.

    Args:
        name (`str`): `"easy-vqa"` (its test split) or `"easy-vqa:train"`; `"scenes"` (2,000 scenes that no training
            has seen, with one question each), `"scenes:calibration"` (as many others) or `"scenes:train"`;
            `"reading"`, pages of text, and `"descriptions"`, scenes to be described in full, with the same splits; a
            file whose name ends in `.jsonl`, as for [`read_samples`]; `"org/dataset:split"` or
            `"org/dataset/config:split"` on the Hugging Face Hub; or `"path:split"` for a local folder or `.parquet`
            file that `datasets` can load, without the split if there is but one.
        columns (`Mapping[str, str]`, *optional*): How a data set calls its columns, by our names: `image`, `question`,
            `answers`, `choices` and `kind`. By default they are called so, or `answer` and `options`.
        limit (`int`, *optional*): The greatest number of samples, drawn at random and kept in their order; `None` for
            all.
        seed (`int`, *optional*, defaults to 0): What the draw depends on. A larger limit only adds to it.

    Returns:
        `list[Sample]`: The samples, in the order of the source.

    Raises:
        ImportError: If a package that holds or reads the data is not installed.
        OSError: If the source or an image is not there or cannot be read.
        ValueError: If an argument, a line or a row is not what it should be; the sentence names it.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.data import load_samples

        >>> sample = load_samples("easy-vqa")[0]
        >>> sample.question, sample.answers, sample.image_id
        ('what is the red shape?', ('triangle',), 'easy-vqa/test/0')

        ```
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}: pass a whole number of 1 or more, or None for all samples.")
    draw = partial(_draw, limit=limit, seed=seed)
    source, _, split = name.partition(":")
    built_in = source in ("easy-vqa", *_DRAWN)
    if columns and (built_in or name.endswith(".jsonl")):
        raise ValueError(f"{name!r} has no columns to be named: leave `columns` out.")
    if source in _DRAWN:
        return _drawn(source, _known_split(source, split, _DRAWN_SPLITS), draw)
    if source == "easy-vqa":
        samples = load_easy_vqa(_known_split(source, split, _EASY_VQA_SPLITS))
    elif name.endswith(".jsonl"):
        samples = read_samples(name)
    else:
        return load_data_set(name, source, split, columns or {}, draw)
    return [samples[index] for index in draw(len(samples))]


def _draw(number: int, limit: int | None, seed: int) -> list[int]:
    """Which of so many samples are taken, in their order."""
    if limit is None or limit >= number:
        return list(range(number))
    return sorted(np.random.default_rng(seed).permutation(number)[:limit].tolist())


def _known_split(source: str, split: str, known: Sequence[str]) -> str:
    if split and split not in known:
        raise ValueError(f"{source} has no split {split!r}: take one of {', '.join(known)}.")
    return split or known[0]


# One question a picture, so that the samples are independent. A few scenes allow no question of some kind, so a spare
# one is drawn.
_DRAWN: dict[str, Callable[[str], Scenes | Pages | Descriptions]] = {
    "scenes": lambda split: Scenes(split, questions_per_scene=2, length=_NUM_DRAWN),
    "reading": lambda split: Pages(split, questions_per_page=1, length=_NUM_DRAWN),
    "descriptions": lambda split: Descriptions(split, length=_NUM_DRAWN),
}


def _drawn(source: str, split: str, draw: Callable[[int], list[int]]) -> list[Sample]:
    pictures = _DRAWN[source](split)
    samples = []
    for index in draw(len(pictures)):
        picture = pictures[index]
        question = picture.questions[0]
        samples.append(
            Sample(
                image=picture.image,
                question=question.question,
                answers=(question.answer,),
                kind=question.kind.replace("_", "/"),
                image_id=f"{source}/{split}/{index}",
                where=f"'{source}:{split}', row {index}",
            )
        )
    return samples
