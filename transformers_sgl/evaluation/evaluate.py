"""Evaluates a pair: methods answer questions with known answers and are compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from transformers_sgl.evaluation.calibration import KeepAccuracy, Record, allowed_failures
from transformers_sgl.evaluation.checks import check_packages, check_settings
from transformers_sgl.evaluation.data import Sample, load_samples
from transformers_sgl.evaluation.methods import METHODS, SGL, Method, Pair, Setting, Unsure, find_method
from transformers_sgl.evaluation.metrics import Metric, exact_match
from transformers_sgl.evaluation.metrics import metric as find_metric
from transformers_sgl.evaluation.report import as_markdown, summarise, write_report
from transformers_sgl.evaluation.run import (
    Run,
    all_processes,
    alone_in,
    measure_costs,
    open_in_process,
    plan,
    run_methods,
)
from transformers_sgl.evaluation.run_folder import pair_facts
from transformers_sgl.storage.files import check_writable_folder
from transformers_sgl.storage.records import check_claim

__all__ = ["Evaluation", "evaluate"]

# The confidence with which a threshold keeps its promise.
_CONFIDENCE = 0.99
_OTHER_SPLITS = {
    "easy-vqa": "easy-vqa:train",
    "easy-vqa:test": "easy-vqa:train",
    "scenes": "scenes:calibration",
    "reading": "reading:calibration",
    "descriptions": "descriptions:calibration",
}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        report: Scores, intervals and comparisons: the content of `summary.json`, which the answers alone determine.
        speed: Times and memory, and comparisons at equal time: the content of `speed.json`.
        written: The files written; empty in all but the first of several processes that share the work.

    Example:
        ```python
        >>> from tempfile import mkdtemp
        >>> from transformers_sgl.evaluation import evaluate
        >>> from transformers_sgl.hub import embedded_pair

        >>> evaluation = evaluate(embedded_pair(), "scenes", out=mkdtemp(), methods=["large"], limit=2, device="cpu")
        >>> evaluation.report["num_samples"], len(evaluation.report["rows"])
        (2, 1)

        ```
    """

    report: dict[str, Any]
    speed: dict[str, Any]
    written: tuple[Path, ...]

    def to_markdown(self) -> str:
        """The table, one row for each method and retention."""
        return as_markdown(self.report, self.speed)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"report": self.report, "speed": self.speed, "written": [str(path) for path in self.written]}


def evaluate(
    pair: str | Path | tuple[Any, Any],
    data: str,
    *,
    out: Path | str,
    methods: Sequence[str] | None = None,
    retentions: Sequence[float] = (0.64, 0.35, 0.09),
    metric: str = "exact_match",
    calibration_data: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    calibration_limit: int = 2000,
    keep_accuracy: float = 0.99,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> Evaluation:
    """Lets methods answer questions with known answers, and compares them with the large model alone.

    A call that was cut off continues when it is repeated. Under `accelerate launch` or `torchrun` processes share the
    work.

    Args:
        pair (`str`, `Path` or `tuple`): A saved pair, in a folder or on the Hub; or a model and its processor.
        data (`str`): The questions, as for [`load_samples`].
        out (`str` or `Path`): The folder for records, tables and figure.
        methods (`Sequence[str]`, *optional*): Names in [`METHODS`]; by default all.
        retentions (`Sequence[float]`): Average retentions, in `(0, 1)`.
        metric (`str`, defaults to `"exact_match"`): A name in [`METRICS`].
        calibration_data (`str`, *optional*): Other questions, on which methods with early exit choose thresholds.
        columns (`Mapping[str, str]`, *optional*): As for [`load_samples`].
        limit (`int`, *optional*): The most questions; by default all.
        calibration_limit (`int`, defaults to 2000): The most questions for calibration.
        keep_accuracy (`float`, defaults to 0.99): For the same, the fraction of right answers to keep;
            [`KeepAccuracy`].
        batch_size (`int`, defaults to 8): How many questions are answered at once.
        max_new_tokens (`int`, defaults to 64): The length limit of an answer.
        seed (`int`, defaults to 0): What everything random is drawn from.
        dtype (`str`, defaults to `"auto"`): As for [`open_pair`].
        device (`str`, defaults to `"auto"`): As for [`open_pair`].

    Raises:
        OSError: If a file cannot be read or written, a package is missing, or another process writes into `out`.
        ValueError: If an argument is not allowed, or `out` holds another run.
    """
    # 1. What can be wrong is checked before the models are loaded.
    out, settings = Path(out), {"batch_size": batch_size, "seed": seed, "max_new_tokens": max_new_tokens}
    check_settings(**settings, calibration_limit=calibration_limit)
    check_packages("An evaluation", "evaluate")
    check_writable_folder(out)
    chosen = {name: find_method(name) for name in (METHODS if methods is None else methods)}
    retentions = check_retentions(retentions)
    load = partial(load_scorable, metric_name=metric, columns=columns, seed=seed)
    samples = load(data, limit=limit)
    calibration: list[Sample] = []
    if any(isinstance(method, SGL) for method in chosen.values()):
        calibration = load(calibration_data or other_split(data), limit=calibration_limit)
        check_disjoint(samples, calibration)
        if not all(isinstance(method, Unsure) for method in chosen.values() if isinstance(method, SGL)):
            check_enough(calibration, keep_accuracy)

    # 2. Every method answers everything, and the answers are compared.
    with alone_in(out, device):
        model, processor = open_in_process(pair, dtype, device)
        of_pair = pair_facts(model, pair if isinstance(pair, (str, Path)) else None)
        known = {**of_pair, "data": data, "metric_name": metric, **settings, "device": model.device.type}
        opened = Pair(model, processor, max_new_tokens, seed)
        return _compare(opened, samples, calibration, chosen, retentions, out, known, keep_accuracy)


def _compare(
    pair: Pair,
    samples: Sequence[Sample],
    calibration: Sequence[Sample],
    methods: Mapping[str, Method],
    retentions: Sequence[float],
    out: Path,
    known: dict[str, Any],
    keep_accuracy: float,
) -> Evaluation:
    """Runs the methods and writes the report, or reads it in processes that are not the first."""
    runs = plan(methods, retentions, pair.num_layers)
    check_claim(out, _facts(known, samples, runs))
    score, batch_size = find_metric(known["metric_name"]), known["batch_size"]
    calibrated: dict[str, SGL] = {}
    for name, method in methods.items():
        if isinstance(method, SGL):
            choose: Any = partial(choose_thresholds, keep_accuracy=keep_accuracy, num_evaluated=len(samples))
            if isinstance(method, Unsure):
                choose = partial(unsure_thresholds, share=method.unsure_share)
            thresholds = choose(
                pair,
                calibration,
                method.without_exit(),
                retentions,
                out / "calibration" / name,
                _facts(known, calibration, []),
                score=score,
                batch_size=batch_size,
            )
            calibrated[name] = replace(method, thresholds=thresholds)
    runs = plan({**methods, **calibrated}, retentions, pair.num_layers)
    chosen = {name: list(method.thresholds.values()) for name, method in calibrated.items()}
    facts = {**_facts(known, samples, runs), "thresholds": chosen}
    results = run_methods(pair, samples, runs, out, facts, score=score, batch_size=batch_size)
    processes = all_processes()
    written: list[Path] = []
    if processes.is_main_process:
        costs = measure_costs(pair, samples, runs, out, batch_size=batch_size)
        written = write_report(*summarise(results, samples, runs, costs, facts, pair.model.device), out)
    processes.wait_for_everyone()
    report, speed = (json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in ("summary", "speed"))
    return Evaluation(report, speed, tuple(written))


def _facts(known: dict[str, Any], samples: Sequence[Sample], runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the records depend on, for `run.json`."""
    questions = [[sample.image_id, sample.prompt, sample.answers] for sample in samples]
    digest = hashlib.sha256(json.dumps(questions).encode()).hexdigest()
    return {**known, "data_sha256": digest, "runs": [list(run.key) for run in runs]}


def load_scorable(
    name: str, *, metric_name: str, columns: Mapping[str, str] | None, limit: int | None, seed: int
) -> list[Sample]:
    """Loads questions, and raises if a metric does not suit them."""
    try:
        samples = load_samples(name, columns=columns, limit=limit, seed=seed)
    except ImportError as error:  # of a package that holds or reads the data
        raise OSError(str(error)) from error
    score, sample = find_metric(metric_name), None
    try:
        for sample in samples:
            score("", sample.answers, sample.choices)
    except ValueError as error:
        raise ValueError(f"{sample.where if sample else 'The data'}: {error}") from error
    return samples


def check_retentions(retentions: Sequence[float]) -> list[float]:
    """The average retentions without repetition; raises unless each is in `(0, 1)`."""
    for average in retentions:
        Setting.of(average, num_layers=1)
    return list(dict.fromkeys(retentions))


def other_split(data: str) -> str:
    """Where to calibrate for built-in data: another split of the same."""
    if data not in _OTHER_SPLITS:
        raise ValueError(
            "Methods with a threshold (such as sgl, unsure) choose it on other questions, and nothing tells which "
            f"go with {data!r}: name other questions as `calibration_data`, or leave these methods out."
        )
    return _OTHER_SPLITS[data]


def check_disjoint(samples: Sequence[Sample], calibration: Sequence[Sample]) -> None:
    """Raises if a threshold would be chosen on images that are evaluated."""
    shared = {sample.image_id for sample in samples} & {sample.image_id for sample in calibration}
    if shared:
        raise ValueError(
            f"{len(shared)} images are in the data and in the calibration data, such as {min(shared)!r}: a threshold "
            "must be chosen on other images than it is judged on."
        )


def check_enough(calibration: Sequence[Sample], keep_accuracy: float) -> None:
    """Raises if no answers to the calibration questions could prove the promise."""
    promise = KeepAccuracy(keep_accuracy)
    needed = math.ceil(math.log(1 - _CONFIDENCE) / math.log(1 - promise.limit))
    if len(calibration) < needed:
        raise ValueError(
            f"There are {len(calibration)} calibration questions, and to promise that {promise.sentence()} takes "
            f"{needed} that the large model answers rightly: give more calibration data, or a lower `keep_accuracy`."
        )


def unsure_thresholds(
    pair: Pair,
    samples: Sequence[Sample],
    method: Method,
    retentions: Sequence[float],
    folder: Path,
    facts: dict[str, Any],
    *,
    share: Callable[[Setting], float],
    score: Metric = exact_match,
    batch_size: int = 8,
) -> dict[float | None, float]:
    """The decision score below which the `share` of each average retention lies, on questions that are not evaluated.

    `method` scores drafts and returns none.
    """
    runs = plan({"sgp": method}, retentions[:1], pair.num_layers)
    options: dict[str, Any] = {"score": score, "batch_size": batch_size, "title": "calibrate"}
    results = run_methods(pair, samples, runs, folder, facts, **options)
    scores = [result.decision_score for result in results if result.decision_score is not None]
    settings = [Setting.of(average, pair.num_layers) for average in retentions]
    return {each.average_retention: float(np.quantile(scores, share(each))) for each in settings}


def choose_thresholds(
    pair: Pair,
    samples: Sequence[Sample],
    method: Method,
    retentions: Sequence[float],
    folder: Path,
    facts: dict[str, Any],
    *,
    keep_accuracy: float = 0.99,
    num_evaluated: int,
    score: Metric = exact_match,
    batch_size: int = 8,
) -> dict[float | None, float]:
    """Chooses, on questions that are not evaluated, a decision score from which on drafts are returned.

    An answer counts as right from a score of 0.5 on. The promise has to hold for the `num_evaluated` questions of the
    evaluation, with 99 % confidence. `method` scores drafts and returns none. Returns the threshold for each average
    retention.
    """
    promise = KeepAccuracy(keep_accuracy)
    runs = plan({"sgp": method}, retentions, pair.num_layers)
    options: dict[str, Any] = {"score": score, "batch_size": batch_size, "title": "calibrate"}
    results = run_methods(pair, samples, runs, folder, facts, **options)
    thresholds: dict[float | None, float] = {}
    for average in dict.fromkeys(run.average_retention for run in runs):
        records = [Record.of(result) for result in results if result.average_retention == average]
        counted = sum(promise.counts(record) for record in records)
        allowed = allowed_failures(counted, num_evaluated, promise.limit, _CONFIDENCE) if counted else None
        if allowed is None:
            raise ValueError(
                f"Of the {len(records)} calibration questions the large model answers {counted} rightly, which is too "
                f"few to promise that {promise.sentence()}: give more calibration data, or a lower `keep_accuracy`."
            )
        thresholds[average] = promise.threshold(records, allowed)
    return thresholds
