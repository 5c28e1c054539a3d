"""What the scripts that evaluate the embedded pair share: arguments, opening, running, intervals and the record."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from transformers_sgl.evaluation import Sample
from transformers_sgl.evaluation.run_folder import measurement_record
from transformers_sgl.opening import chat_inputs, open_pair, user_turn

ROOT = Path(__file__).parents[1]
MAX_NEW_TOKENS = 40

Method = Callable[[dict[str, torch.Tensor], Sequence[int]], torch.Tensor]


def argument_parser(doc: str, output: str, limit: int | None = None) -> argparse.ArgumentParser:
    """The arguments that all have; `output` is the file in `benchmarks/results/` that is written."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "model_cards" / "sgl-tiny")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / output)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=limit, help="questions at the most")
    return parser


def open_evaluation(arguments: argparse.Namespace, max_new_tokens: int = MAX_NEW_TOKENS) -> Evaluation:
    """The pair that the arguments name, ready to be asked."""
    pair = open_pair(arguments.model, device=arguments.device)
    return Evaluation(*pair, arguments.batch_size, max_new_tokens)


def write_record(arguments: argparse.Namespace, tables: dict[str, Any], indent: int | None = 2, **more: Any) -> None:
    """Writes the tables, after what was measured on what."""
    record = {**measurement_record(arguments.seed, torch.device(arguments.device)), "tables": tables, **more}
    arguments.output.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


def data_of(sample: Sample) -> str:
    """The data set a sample belongs to, as the tables call it."""
    source = sample.image_id.partition("/")[0]
    return {"easy-vqa": "easy-VQA"}.get(source, source)


def is_right(answer: str, sample: Sample) -> bool:
    """Whether an answer is the expected one to the letter."""
    return answer.strip() == sample.answers[0]


class Evaluation:
    """Runs methods over samples; all methods see the same inputs."""

    def __init__(self, model: Any, processor: Any, batch_size: int, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    def __call__(self, samples: Sequence[Sample], methods: dict[str, Method], title: str) -> dict[str, list[bool]]:
        """Whether each answer is right, by method, in the order of the samples."""
        answers = self.answers(samples, methods, title)
        return {name: list(map(is_right, given, samples)) for name, given in answers.items()}

    def answers(self, samples: Sequence[Sample], methods: dict[str, Method], title: str) -> dict[str, list[str]]:
        """The answers, by method, in the order of the samples."""
        given: dict[str, list[str]] = {name: [] for name in methods}
        for indices in tqdm(list(self.batches(samples)), desc=title):
            batch = [samples[index] for index in indices]
            inputs = self.inputs(batch)
            for name, method in methods.items():
                sequences = method(inputs, indices)[:, inputs["input_ids"].shape[1] :]
                given[name] += self.processor.batch_decode(sequences, skip_special_tokens=True)
        return given

    def large_alone(self, inputs: dict[str, torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """The large model, unpruned and as it is in transformers."""
        return self.model.large.generate(**inputs, max_new_tokens=self.max_new_tokens)

    def small_alone(self, inputs: dict[str, torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """The small model, likewise."""
        return self.model.small.generate(**inputs, max_new_tokens=self.max_new_tokens)

    def guided(self, preset: str, inputs: dict[str, torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """The pair with the settings of a preset."""
        return self.model.generate(**inputs, preset=preset, max_new_tokens=self.max_new_tokens)

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


def percent(values: Any) -> float:
    return round(100 * float(np.mean(values)), 1)


def paired_interval(differences: np.ndarray, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean over samples, in percent."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(differences), (resamples, len(differences)))
    low, high = np.percentile(100 * differences[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def difference(hits: np.ndarray, other: np.ndarray, seed: int) -> str:
    """The difference of two means over samples, in percentage points with its interval."""
    low, high = paired_interval(hits - other, seed)
    return f"{percent(hits - other):+.1f} [{low:+.1f}, {high:+.1f}]"
