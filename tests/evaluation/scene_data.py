"""Drawn scenes as a file of questions."""

from __future__ import annotations

import json
from pathlib import Path

from transformers_sgl.evaluation import Scenes


def write_data(path: Path, split: str, number: int) -> Path:
    """Scenes of both sizes, with a question each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(number):
        scene = Scenes(split, seed=6, size=64 if index % 3 else 128)[index]
        scene.image.save(path.with_name(f"{split}-{index}.png"))
        question = scene.questions[0]
        fields = {"image": f"{split}-{index}.png", "question": question.question, "answer": question.answer}
        lines.append(json.dumps({**fields, "kind": question.kind}) + "\n")
    path.write_text("".join(lines))
    return path
