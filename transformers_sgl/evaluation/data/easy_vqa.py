"""easy-VQA: pictures of one coloured shape, with questions that have one of thirteen answers.

The `easy-vqa` package holds the data set itself (MIT licence, 64 x 64 PNG files): 4,000 pictures with 38,575 questions
for training, 1,000 with 9,673 for testing. Three quarters of the questions are yes/no questions, and most of those can
be guessed from the wording: a shape has one colour of eight. Report yes/no questions apart from the others.
"""

from __future__ import annotations

from pathlib import Path

from transformers_sgl.evaluation.data.samples import Sample

__all__ = ["load_easy_vqa"]


def load_easy_vqa(split: str) -> list[Sample]:
    """The questions of the split `"train"` or `"test"`, in the package's order; no picture is read yet."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "easy-VQA's pictures and questions come in a package: run `pip install easy-vqa`."
        ) from error
    questions, answers, image_ids = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    return [
        Sample(
            image=Path(paths[image_id]),
            question=question,
            answers=(answer,),
            kind="yes/no" if answer in ("yes", "no") else "other",
            image_id=f"easy-vqa/{split}/{image_id}",
            where=f"'easy-vqa:{split}', row {index}",
        )
        for index, (question, answer, image_id) in enumerate(zip(questions, answers, image_ids, strict=True))
    ]
