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
from transformers_sgl.evaluation.report import compare_at_equal_cost, summarise
from transformers_sgl.evaluation.run import Result, RunKey, measure_costs, plan
from transformers_sgl.evaluation.run_folder import read_lines
from transformers_sgl.evaluation.statistics import PairedScores
from transformers_sgl.opening import open_pair

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
            methods[name] = replace(method, thresholds=dict(zip(_retentions(results), values, strict=True)))
        runs = plan(methods, _retentions(results), pair.num_layers)
        return cls(results, measure_costs(pair, samples, runs, folder, batch_size=facts["batch_size"]), facts)

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
    records: Records, samples: Sequence[Sample], methods: Sequence[str], operations: dict[str, float]
) -> dict[str, Any]:
    """Summary and speed as an evaluation writes them; beside these, the cost on the proportions of [`PROPORTIONS`]."""
    chosen = {name: find_method(name) for name in methods if any(run == name for run, _ in records.results)}
    # What the runs would do to a model is not asked for any more, so the number of layers does not matter.
    runs = plan(chosen, _retentions(records.results), num_layers=1)
    by_run = {run.key: [records.results[run.key][place] for place in records.answered] for run in runs}
    results = [result for found in by_run.values() for result in found]
    summary, speed = summarise(results, samples, runs, records.costs, records.facts)
    scores = {key: np.array([result.score for result in found]) for key, found in by_run.items()}
    paired = PairedScores([sample.image_id for sample in samples], records.facts["seed"])
    relative = relative_operations({run.key: records.costs[run.key] for run in runs}, operations)
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
    return {"summary": summary, "speed": speed, "scaled": scaled, "versus_small": versus_small}


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


def relative_operations(costs: dict[RunKey, Cost], operations: dict[str, float]) -> dict[RunKey, float]:
    """The operations of each run relative to the large model alone, were the models of other proportions.

    Of each part, the large model's vision encoder and decoder and the small model, it is known how many times its
    usual operations the run took: how many it takes alone. That often are those of the part in the other models taken.
    """
    large, small = costs[_LARGE], costs[_SMALL]
    whole = operations["vision"] + operations["decoder"]
    return {
        key: (
            operations["vision"] * cost.vision_flops / large.vision_flops
            + operations["decoder"] * cost.decoder_flops / large.decoder_flops
            + operations["small"] * (cost.flops - cost.vision_flops - cost.decoder_flops) / small.flops
        )
        / whole
        for key, cost in costs.items()
    }


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
    return {**found["large"], "small": sum(found["small"].values())}


def _retentions(runs: Iterable[RunKey]) -> list[float]:
    return list(dict.fromkeys(average for _, average in runs if average is not None))
