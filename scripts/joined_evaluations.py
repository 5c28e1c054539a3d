"""Several evaluations of the same questions as one, and what they would cost on models of other proportions.

Each evaluation has the large model among its methods. A method's time is told relative to the large model's in the
same batch of the same run, so evaluations that ran at different times, or side by side, can be put together: the times
of all but the first are scaled, batch by batch, by how fast the large model was in the first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformers_sgl.architectures import decoder
from transformers_sgl.evaluation.cost import Cost, measure_cost
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import SGL, Pair, find_method
from transformers_sgl.evaluation.metrics import metric as find_metric
from transformers_sgl.evaluation.report import compare_at_equal_cost, summarise
from transformers_sgl.evaluation.run import Result, RunKey, counted_batches, measure_costs, plan
from transformers_sgl.evaluation.statistics import PairedScores
from transformers_sgl.opening import open_pair
from transformers_sgl.storage.records import read_lines

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks.random_models import random_inputs, random_model

__all__ = ["PROPORTIONS", "Records", "joined", "operations_of_parts", "report", "versus_large"]

# Whose proportions the operations are told for, and the picture they read: 7 tiles of 256 visual tokens.
PROPORTIONS = {"large": "internvl-26b", "small": "internvl-2b"}
_IMAGE_SIZE_PX = (896, 1344)
_LARGE: RunKey = ("large", None)
_SMALL: RunKey = ("small", None)


@dataclass(frozen=True)
class Records:
    """What an evaluation, or several as one, wrote down."""

    results: dict[RunKey, dict[int, Result]]  # by run and the question's place
    costs: dict[RunKey, Cost]
    facts: dict[str, Any]  # what the records depend on, as in `run.json`

    @classmethod
    def of(cls, folder: Path, model: Path, samples: Sequence[Sample]) -> Records:
        """Those in an evaluation's folder; costs that it has not come to are counted now."""
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        results: dict[RunKey, dict[int, Result]] = {(name, average): {} for name, average in facts["runs"]}
        for file in sorted(folder.glob("samples*.jsonl")):
            for _, fields in read_lines(file):
                result = Result(**fields)
                results[result.run][result.sample] = result
        pair = Pair(*open_pair(model, device="cpu"), facts["max_new_tokens"], facts["seed"])
        methods = {name: find_method(name) for name, _ in results}
        for name, values in facts["thresholds"].items():
            method = methods[name]
            assert isinstance(method, SGL)
            averages = [average for each, average in results if each == name]
            methods[name] = replace(method, thresholds=dict(zip(averages, values, strict=True)))
        # Methods that do not prune run at any one of them.
        runs = plan(methods, _retentions(results) or [0.5], pair.num_layers)
        costs = measure_costs(pair, samples, runs, folder, batch_size=facts["batch_size"])
        return cls(results, costs, {**facts, "num_samples": len(samples)})

    @property
    def answered(self) -> list[int]:
        """The places of the questions that every run has answered, whole batches of them."""
        places = set.intersection(*(set(found) for found in self.results.values()))
        return sorted(places)


def joined(evaluations: Sequence[Records]) -> Records:
    """The evaluations as one, whose large model is that of the first.

    Raises:
        ValueError: If they are not of the same questions, or lack the large model.
    """
    first, *others = evaluations
    results, costs, thresholds = dict(first.results), dict(first.costs), dict(first.facts["thresholds"])
    for other in others:
        same = ("data_sha256", "batch_size", "seed", "weights", "max_new_tokens")
        different = [name for name in same if other.facts[name] != first.facts[name]]
        different += [] if _LARGE in first.results and _LARGE in other.results else ["the large model"]
        if different:
            raise ValueError(
                f"These evaluations cannot be put together; they differ in {', '.join(different)}: evaluate the same "
                "questions, with `large` among the methods."
            )
        here, there = first.results[_LARGE], other.results[_LARGE]
        factors = {place: here[place].seconds / there[place].seconds for place in here.keys() & there.keys()}
        for run, found in other.results.items():
            if run not in results:
                results[run] = {
                    place: replace(found[place], seconds=found[place].seconds * factor)
                    for place, factor in factors.items()
                    if place in found
                }
        costs = {**other.costs, **costs}
        thresholds |= other.facts["thresholds"]
    return Records(results, costs, {**first.facts, "thresholds": thresholds})


def report(
    records: Records,
    samples: Sequence[Sample],
    methods: Sequence[str],
    operations: dict[str, float],
    metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """Summary and speed as an evaluation writes them; beside these, the cost on the proportions of [`PROPORTIONS`].

    And the mean scores of the same answers by each of the `metrics`.
    """
    chosen = {name: find_method(name) for name in methods if any(run == name for run, _ in records.results)}
    # What the runs would do to a model is not asked for any more, so the number of layers does not matter.
    runs = plan(chosen, _retentions(records.results), num_layers=1)
    by_run = {run.key: [records.results[run.key][place] for place in records.answered] for run in runs}
    results = [result for found in by_run.values() for result in found]
    summary, speed = summarise(results, samples, runs, records.costs, records.facts)
    scores = {key: np.array([result.score for result in found]) for key, found in by_run.items()}
    paired = PairedScores([sample.image_id for sample in samples], records.facts["seed"])
    batches = counted_batches(records.facts["num_samples"], records.facts["batch_size"])
    counted = {place for batch in batches for place in batch}
    retained = {run.key: _retained(records.results[run.key], records.answered, counted) for run in runs}
    relative = relative_operations({run.key: records.costs[run.key] for run in runs}, retained, operations)
    scaled = {
        "operations": operations,
        "rows": [
            {"method": name, "target_retention": average, "relative_to_large": cost}
            for (name, average), cost in relative.items()
        ],
        "at_equal_operations": compare_at_equal_cost(scores, paired, relative),
    }
    versus_small = [
        {"method": name, "target_retention": average, **vars(paired.difference(own, scores[_SMALL]))}
        for (name, average), own in scores.items()
        if name not in ("large", "small") and _SMALL in scores
    ]
    by_metric = {
        metric: [
            {"method": name, "target_retention": average, "score": _mean_score(found, samples, metric)}
            for (name, average), found in by_run.items()
        ]
        for metric in metrics
    }
    whole = {"summary": summary, "speed": speed, "scaled": scaled, "versus_small": versus_small}
    return {**whole, "metrics": by_metric}


def _mean_score(results: Sequence[Result], samples: Sequence[Sample], metric: str) -> float:
    score = find_metric(metric)
    pairs = zip(results, samples, strict=True)
    return float(np.mean([score(result.answer, sample.answers, sample.choices) for result, sample in pairs]))


def versus_large(records: Records, samples: Sequence[Sample]) -> dict[str, Any]:
    """How much better than the large model alone the other methods of an evaluation are, on all that it answered."""
    answered = records.answered
    paired = PairedScores([samples[place].image_id for place in answered], records.facts["seed"])
    scores = {run: np.array([found[place].score for place in answered]) for run, found in records.results.items()}
    rows = [
        {
            "method": name,
            "target_retention": average,
            "score": float(own.mean()),
            "large_score": float(scores[_LARGE].mean()),
            **vars(paired.difference(own, scores[_LARGE])),
        }
        for (name, average), own in scores.items()
        if name != "large"
    ]
    return {"num_samples": len(answered), "rows": rows}


def relative_operations(
    costs: dict[RunKey, Cost],
    retained: dict[RunKey, tuple[float, float, float]],
    operations: dict[str, float],
) -> dict[RunKey, float]:
    """The operations of each run relative to the large model alone, were the models of other proportions.

    What a run did with each part, relative to the large and the small model alone, is taken times the part's
    operations in the other models. The decoder's are proportional to its tokens. Of the vision encoder and the small
    model it is counted; early exits and second readings come in as often as among all questions.

    Args:
        costs: What was counted, on few questions.
        retained: By run: the average retention, 0 where the large model was not called, of all questions and of those
            that were counted; and how often it was called.
        operations: Those of the other models, as [`operations_of_parts`] gives them.
    """
    large, small = costs[_LARGE], costs[_SMALL]
    whole, text = operations["vision"] + operations["decoder"], operations["text"]
    found = {}
    for run, cost in costs.items():
        everywhere, among_counted, called = retained[run]
        vision = cost.vision_flops / large.vision_flops * (everywhere / among_counted if among_counted else 1)
        of_decoder = text * called + (1 - text) * everywhere
        guide = (cost.flops - cost.vision_flops - cost.decoder_flops) / small.flops
        parts = {"vision": vision, "decoder": of_decoder, "small": guide}
        found[run] = sum(operations[part] * share for part, share in parts.items()) / whole
    return found


def _retained(found: dict[int, Result], places: Sequence[int], counted: set[int]) -> tuple[float, float, float]:
    """The average retention over questions, the same over those whose cost was counted, and the rate of calls."""
    all_of_it = {place: found[place].retention or 0.0 for place in places}
    among_counted = [share for place, share in all_of_it.items() if place in counted]
    everywhere, called = (
        np.mean(list(all_of_it.values())),
        np.mean([found[place].retention is not None for place in places]),
    )
    return float(everywhere), float(np.mean(among_counted or [everywhere])), float(called)


@torch.no_grad()
def operations_of_parts() -> dict[str, float]:
    """The operations of a prompt in each part of the models of [`PROPORTIONS`], counted without their weights."""
    found = {}
    for part, name in PROPORTIONS.items():
        inputs = random_inputs(random_model(name, shrink=64), _IMAGE_SIZE_PX)
        model = random_model(name, device="meta")
        pixels, prompt = (inputs[each].to("meta") for each in ("pixel_values", "input_ids"))
        vision = measure_cost(partial(model.get_image_features, pixels)).flops
        found[part] = {"vision": float(vision), "decoder": float(measure_cost(partial(decoder(model), prompt)).flops)}
    text = 1 - float((inputs["input_ids"] == model.config.image_token_id).double().mean())
    return {**found["large"], "small": sum(found["small"].values()), "text": text}


def _retentions(runs: Iterable[RunKey]) -> list[float]:
    return list(dict.fromkeys(average for _, average in runs if average is not None))
