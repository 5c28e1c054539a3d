"""The run behind a calibration: both ways to an answer, on questions whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers_sgl.evaluation.calibration.promises import EARLY_EXIT, Decision, Record
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import Answer, Batch, Method, Pair, Setting, pair_answers
from transformers_sgl.evaluation.metrics import choice_accuracy, exact_match
from transformers_sgl.evaluation.run import Run, run_methods
from transformers_sgl.tokens.early_exit import NEVER_EXIT

__all__ = ["run_samples"]


# A draft is verified because that changes no answer, and makes the small model answer even where nothing is pruned.
_WITHOUT_EXIT = {"early_exit_threshold": NEVER_EXIT, "verify_draft": "once"}
_WHOLE = {"retention_ratio": 1.0, "vision_retention_ratio": 1.0, "confirmation_threshold": None}
# By the setting whose threshold is chosen, the ways between which it decides, as settings of the pair; the first is
# the cheap one, and says how trustworthy it is. Both answers of an early exit come from one call.
_WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "early_exit_threshold": {"pair": _WITHOUT_EXIT},
    "unsure_threshold": {
        "pair": {**_WITHOUT_EXIT, "unsure_threshold": 0.0},
        "more": {**_WITHOUT_EXIT, "unsure_threshold": NEVER_EXIT},
    },
    "confirmation_threshold": {
        "pair": {**_WITHOUT_EXIT, "confirmation_threshold": 0.0},
        "whole": {**_WITHOUT_EXIT, **_WHOLE},
    },
}


@dataclass(frozen=True)
class _Way(Method):
    """The pair with its own settings, but for some."""

    settings: dict[str, Any] = field(default_factory=dict)
    confirms: bool = False  # whether the pruned large model scores drafts

    prunes = False

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        answers = pair_answers(pair, batch, **self.settings)
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
            if self.confirms and answer.confirmation_score is None:
                raise ValueError(
                    f"{sample.where}: nothing was pruned, so there is nothing to confirm; give the pair a "
                    "`retention_ratio` or `vision_retention_ratio` below 1."
                )
        return answers


def run_samples(
    pair: Pair,
    samples: Sequence[Sample],
    folder: Path,
    facts: dict[str, Any],
    *,
    batch_size: int = 8,
    decision: Decision = EARLY_EXIT,
) -> list[Record]:
    """Lets the pair answer every sample in both ways that the decision is about, as [`run_methods`] does."""
    ways, confirms = _WAYS[decision.setting], decision.setting == "confirmation_threshold"
    # A pair whose settings do not allow a threshold says so here, before all the work.
    inputs = pair.inputs(pair.processor, samples[:1], [samples[0].open_image()])
    pair.model.generate(**inputs, max_new_tokens=1, **{**ways["pair"], decision.setting: 0.0})
    whole = Setting(average_retention=1.0, prune_layer=0, num_layers=1)
    runs = [Run(name, _Way(ways[name], confirms and name == "pair"), whole) for name in ways]
    options: dict[str, Any] = {"batch_size": batch_size, "title": "calibrate", "is_timed": False}
    results = run_methods(pair, samples, runs, folder, facts, score=_score, **options)
    of_way = [[result for result in results if result.method == name] for name in ways]
    if decision is EARLY_EXIT:
        return [Record.of(result) for result in of_way[0]]
    record = Record.of_confirmation if confirms else Record.of_unsure
    return [record(cheap, dear) for cheap, dear in zip(*of_way, strict=True)]


def _score(answer: str, answers: Sequence[str], choices: Sequence[str]) -> float:
    return (choice_accuracy if choices else exact_match)(answer, answers, choices)
