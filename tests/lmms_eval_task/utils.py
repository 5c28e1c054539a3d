"""What `easy_vqa.yaml` is made of: the questions' file and how a line of it becomes documents with pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import easy_vqa
from PIL import Image

_FOLDER = Path(easy_vqa.__file__).parent / "data" / "test"
QUESTIONS = str(_FOLDER / "questions.json")


def process_docs(dataset: datasets.Dataset) -> datasets.Dataset:
    """The questions, one a document; the file holds all of them in a list of question, answer and picture."""
    lines = "".join(dataset["text"])
    return datasets.Dataset.from_list(
        [
            {"question": question, "answer": answer, "image": str(_FOLDER / "images" / f"{image_id}.png")}
            for question, answer, image_id in json.loads(lines)
        ]
    ).cast_column("image", datasets.Image())


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]
