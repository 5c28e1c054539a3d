"""Question files for the tests of batch jobs, and what stock calls of `generate` answer to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from transformers_sgl.evaluation import Scenes
from transformers_sgl.opening import chat_inputs, user_turn

SETTINGS = {"max_new_tokens": 8, "early_exit_threshold": 0.9}


def write_questions(folder: Path, number: int, **changed: Any) -> Path:
    """Scenes with a question each; `changed` maps the name of a line, such as `q3`, to what is written instead."""
    lines = []
    for index, scene in enumerate(Scenes("test", seed=7, questions_per_scene=1, length=number)):
        scene.image.save(folder / f"{index}.png")
        fields = {"id": f"q{index}", "image": f"{index}.png", "question": scene.questions[0].question}
        line = changed.get(f"q{index}", fields)
        lines.append(line if isinstance(line, str) else json.dumps({**fields, **line}))
    path = folder / "questions.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The records in a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def generated(pair: Any, processor: Any, file: Path, batch_size: int, **settings: Any) -> list[tuple[str, bool]]:
    """What `pair.generate` answers, batch by batch, and whether the small model alone has."""
    lines, found = read(file), []
    for start in range(0, len(lines), batch_size):
        batch = lines[start : start + batch_size]
        images = [Image.open(file.parent / line["image"]).convert("RGB") for line in batch]
        chats = [user_turn(line["question"], [image]) for line, image in zip(batch, images, strict=True)]
        inputs = chat_inputs(pair, processor, chats)
        output = pair.generate(**inputs, **settings, return_dict_in_generate=True)
        texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        exits = [False] * len(batch) if output.exited_early is None else output.exited_early.tolist()
        found += zip([text.strip() for text in texts], exits, strict=True)
    return found


def answered(folder: Path) -> list[tuple[str, bool]]:
    """What a job has answered, in the order of the questions, each of which it has dealt with once."""
    answers, rejected = read(folder / "answers.jsonl"), read(folder / "rejected.jsonl")
    indices = [record["index"] for record in answers]
    assert indices == sorted(set(indices))
    assert not set(indices) & {record["index"] for record in rejected}
    return [(record["answer"], record["exited_early"]) for record in answers]
