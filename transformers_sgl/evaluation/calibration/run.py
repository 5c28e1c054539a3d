"""The run behind a calibration: both models answer questions whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers_sgl.evaluation.calibration.promises import Record
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import Answer, Batch, Method, Pair, Setting, pair_answers
from transformers_sgl.evaluation.metrics import choice_accuracy, exact_match
from transformers_sgl.evaluation.run import Run, run_methods
from transformers_sgl.tokens.early_exit import NEVER_EXIT

__all__ = ["run_samples"]


@dataclass(frozen=True)
class _WithoutExit(Method):
    """The pair with its own settings, but without early exit."""

    prunes = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        # A draft is verified because that changes no answer, and makes the small model answer even where nothing is
        # pruned.
        answers = pair_answers(pair, batch, early_exit_threshold=NEVER_EXIT, verify_draft=True)
        for sample, answer in zip(batch.samples, answers, strict=True):
            if answer.draft is None or answer.decision_score is None:
                raise ValueError(
                    f"{sample.where}: the small model did not answer, so there is nothing to calibrate; every sample "
                    "needs an image that becomes visual tokens."
                )
            if not math.isfinite(answer.decision_score):
                raise ValueError(
                    f"{sample.where}: the decision score is {answer.decision_score}, so the small model's numbers "
                    "leave the range of its type; take another `dtype`, such as float32."
                )
        return answers


def run_samples(
    pair: Pair, samples: Sequence[Sample], folder: Path, facts: dict[str, Any], *, batch_size: int = 8
) -> list[Record]:
    """Lets both models answer every sample, as [`run_methods`] does."""
    # A pair whose settings do not allow an early exit says so here, before all the work.
    inputs = pair.inputs(pair.processor, samples[:1], [samples[0].open_image()])
    pair.model.generate(**inputs, max_new_tokens=1, early_exit_threshold=0.0)
    runs = [Run("pair", _WithoutExit(), Setting(average_retention=1.0, prune_layer=0, num_layers=1))]
    options: dict[str, Any] = {"batch_size": batch_size, "title": "calibrate", "is_timed": False}
    return [Record.of(result) for result in run_methods(pair, samples, runs, folder, facts, score=_score, **options)]


def _score(answer: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    return (choice_accuracy if choices else exact_match)(answer, answers, choices)
