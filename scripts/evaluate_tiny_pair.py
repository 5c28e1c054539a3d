"""Measures how well the embedded pair's models read.

    python scripts/evaluate_tiny_pair.py

Accuracy of both models, unpruned, on the whole easy-VQA test split and on held-out scenes, with the question-only
prior beside them: the answer that each question has most often in training, given without looking. What pruning costs
is measured by `evaluate_methods.py`.

An answer counts if it is the expected one to the letter. The result goes to `benchmarks/sgl_tiny.json`, from which
`scripts/render_tables.py` fills the README and the card.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_sgl.architectures import decoder_layers
from transformers_sgl.evaluation import Sample, Scenes, load_samples
from transformers_sgl.evaluation.run_folder import measurement_record
from transformers_sgl.opening import chat_inputs, user_turn

ROOT = Path(__file__).parents[1]
MAX_NEW_TOKENS = 40


Method = Callable[[dict[str, torch.Tensor], Sequence[int]], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "model_cards" / "sgl-tiny")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "sgl_tiny.json")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="questions of each set at the most, to try the script")
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model).to(arguments.device)
    processor = AutoProcessor.from_pretrained(arguments.model)
    evaluate = Evaluation(model, processor, arguments.batch_size)
    # One question about each test scene, so that the samples are independent.
    easy, scenes = load_samples("easy-vqa"), scene_samples("test", 2000, questions_per_scene=1)

    both = {"large": evaluate.large_alone, "small": evaluate.small_alone}
    whole = [*easy[: arguments.limit], *scenes[: arguments.limit]]
    reading = evaluate(whole, both, "unpruned")
    prior = guess([*load_samples("easy-vqa:train"), *scene_samples("train", 2000, questions_per_scene=9)], whole)

    record = {
        **measurement_record(arguments.seed, torch.device(arguments.device)),
        "tables": {
            "sgl-tiny-models": models_table(model),
            "sgl-tiny-accuracy": accuracy_table(whole, reading, prior),
        },
    }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


# ---------------------------------------------------------------------------------------------------------------- data


def scene_samples(split: str, num_scenes: int, questions_per_scene: int) -> list[Sample]:
    # A few scenes allow no question of some kind, so a spare question is drawn.
    scenes = Scenes(split, questions_per_scene=questions_per_scene + 1, length=num_scenes)
    return [
        Sample(
            scene.image,
            question.question,
            (question.answer,),
            kind=question.kind.replace("_", "/"),
            image_id=f"scenes/{split}/{index}",
        )
        for index, scene in enumerate(tqdm(scenes, desc=f"scenes {split}", leave=False))
        for question in scene.questions[:questions_per_scene]
    ]


def data_of(sample: Sample) -> str:
    """The data set a sample belongs to, as the tables call it."""
    return {"easy-vqa": "easy-VQA", "scenes": "scenes"}[sample.image_id.partition("/")[0]]


def is_right(answer: str, sample: Sample) -> bool:
    """Whether an answer is the expected one to the letter."""
    return answer.strip() == sample.answers[0]


def guess(train: Sequence[Sample], test: Sequence[Sample]) -> list[bool]:
    """Whether the question-only prior is right, for every test sample."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in train:
        for question in (sample.question, ""):
            counts[data_of(sample), question][sample.answers[0]] += 1
    guesses = {key: answers.most_common(1)[0][0] for key, answers in counts.items()}
    return [is_right(guesses.get((data_of(s), s.question), guesses[data_of(s), ""]), s) for s in test]


# ------------------------------------------------------------------------------------------------------------- methods


class Evaluation:
    """Runs methods over samples; all methods see the same inputs."""

    def __init__(self, model: Any, processor: Any, batch_size: int) -> None:
        self.model = model
        self.processor = processor
        self.batch_size = batch_size

    def __call__(self, samples: Sequence[Sample], methods: dict[str, Method], title: str) -> dict[str, list[bool]]:
        """Whether each answer is right, by method, in the order of the samples."""
        right: dict[str, list[bool]] = {name: [] for name in methods}
        for indices in tqdm(list(self.batches(samples)), desc=title):
            batch = [samples[index] for index in indices]
            inputs = self.inputs(batch)
            for name, method in methods.items():
                sequences = method(inputs, indices)[:, inputs["input_ids"].shape[1] :]
                answers = self.processor.batch_decode(sequences, skip_special_tokens=True)
                right[name] += map(is_right, answers, batch)
        return right

    def large_alone(self, inputs: dict[str, torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """The large model, unpruned and as it is in transformers."""
        return self.model.large.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)

    def small_alone(self, inputs: dict[str, torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """The small model, likewise."""
        return self.model.small.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)

    def batches(self, samples: Sequence[Sample]) -> Iterator[range]:
        """Neighbouring samples; a batch does not mix data sets, whose images differ in size."""
        start = 0
        while start < len(samples):
            stop = min(start + self.batch_size, len(samples))
            stop = next((i for i in range(start, stop) if data_of(samples[i]) != data_of(samples[start])), stop)
            yield range(start, stop)
            start = stop

    def inputs(self, batch: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Both models' inputs for a batch of samples."""
        chats = [user_turn(sample.question, [sample.open_image()]) for sample in batch]
        return chat_inputs(self.model, self.processor, chats)


# -------------------------------------------------------------------------------------------------------------- tables


def accuracy_table(samples: Sequence[Sample], right: dict[str, list[bool]], prior: Sequence[bool]) -> dict[str, Any]:
    rows = []
    for data in dict.fromkeys(map(data_of, samples)):
        for kind in ["all", *sorted({sample.kind for sample in samples if data_of(sample) == data})]:
            chosen = [i for i, s in enumerate(samples) if data_of(s) == data and kind in ("all", s.kind)]
            accuracies = [percent([hits[i] for i in chosen]) for hits in (right["large"], right["small"], prior)]
            rows.append([data, kind, len(chosen), *accuracies])
    return {
        "columns": ["data", "questions", "number", "large", "small", "question-only prior"],
        "rows": rows,
        "caption": "Exact match in percent, unpruned, greedy; easy-VQA is its whole test split, scenes are held out.",
    }


def models_table(model: Any) -> dict[str, Any]:
    rows = [
        [
            f"`{name}/`",
            f"{sum(parameter.numel() for parameter in part.parameters()):,}",
            len(decoder_layers(part)),
            part.config.get_text_config().hidden_size,
        ]
        for name, part in (("large", model.large), ("small", model.small))
    ]
    columns = ["model", "parameters", "decoder layers", "width"]
    return {"columns": columns, "rows": rows, "caption": "Counted in the checkpoints."}


def percent(values: Any) -> float:
    return round(100 * float(np.mean(values)), 1)


def paired_interval(differences: np.ndarray, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over samples, in percent."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(differences), (resamples, len(differences)))
    low, high = np.percentile(100 * differences[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


if __name__ == "__main__":
    main()
