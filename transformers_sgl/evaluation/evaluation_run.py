"""The run behind an evaluation: every method answers every question.

Read top to bottom: what is run; what comes of it; the run itself. Batches are cut once and for all, and within a batch
the methods take turns, so that what disturbs the machine disturbs all alike. A batch is on disk before the next one
begins: a run that was cut off goes on where it was, and processes that share the work
(`accelerate launch`) come to the same records as one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from transformers_sgl import __version__
from transformers_sgl.clock import now_ms
from transformers_sgl.evaluation.calibration import KeepAccuracy, allowed_failures
from transformers_sgl.evaluation.calibration_run import Record
from transformers_sgl.evaluation.cost import Cost, measure_cost
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import SGP, Batch, Method, Pair, Setting
from transformers_sgl.evaluation.metrics import metric
from transformers_sgl.evaluation.records import claim, fingerprint, not_a_record, read_lines
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.storage.files import write_atomically
from transformers_sgl.transformers_interface import newest_commit

__all__ = [
    "Result",
    "Run",
    "all_processes",
    "check_disjoint",
    "check_enough",
    "check_scorable",
    "choose_thresholds",
    "evaluation_facts",
    "measure_costs",
    "other_split",
    "plan",
    "read_retentions",
    "run_methods",
]

_NUM_COST_BATCHES = 4
# How long a process waits for the others: PyTorch's own minutes are less than a share of the batches may take.
_PATIENCE = timedelta(days=30)
# With what confidence a threshold keeps its promise.
_CONFIDENCE = 0.99
_OTHER_SPLITS = {"easy-vqa": "easy-vqa:train", "easy-vqa:test": "easy-vqa:train", "scenes": "scenes:calibration"}


@dataclass(frozen=True)
class Run:
    """A method at a setting: a row of the table.

    Attributes:
        name: The method's name.
        method: The method.
        setting: How much the large model shall process; the same for all runs of a method that does not prune.
    """

    name: str
    method: Method
    setting: Setting

    @property
    def average_retention(self) -> float | None:
        """The target; `None` for a method that does not prune."""
        return self.setting.average_retention if self.method.prunes else None

    @property
    def key(self) -> tuple[str, float | None]:
        """What tells it from other runs."""
        return self.name, self.average_retention


def plan(methods: Mapping[str, Method], retentions: Sequence[float], num_layers: int) -> list[Run]:
    """The runs of an evaluation: methods that prune at every retention, the others once.

    Args:
        methods (`Mapping[str, Method]`): The methods by name.
        retentions (`Sequence[float]`): The average retentions, in `(0, 1)`.
        num_layers (`int`): The large model's decoder layers.

    Returns:
        `list[Run]`: The runs.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.evaluation_run import plan
        >>> from transformers_sgl.evaluation.methods import METHODS

        >>> methods = {name: METHODS[name] for name in ("large", "random")}
        >>> [run.key for run in plan(methods, [0.64, 0.35], num_layers=48)]
        [('large', None), ('random', 0.64), ('random', 0.35)]

        ```
    """
    settings = [Setting.of(average, num_layers) for average in retentions]
    return [
        Run(name, method, setting)
        for name, method in methods.items()
        for setting in (settings if method.prunes else settings[:1])
    ]


@dataclass(frozen=True)
class Result:
    """What a run made of a sample: a line of `samples.jsonl`.

    Attributes:
        sample: The sample's place in the data, from 0.
        method: The method's name.
        average_retention: The target; `None` for a method that does not prune.
        answer: The answer.
        score: How right it is, from 0 to 1.
        seconds: The batch's time from images and questions to answers, divided by its samples.
        num_tokens: The answer's tokens.
        retention: The average retention that was reached; `None` where the large model was not called.
        exited_early: Whether the small model's answer was returned.
        draft: The small model's answer, where one was read.
        draft_score: How right that is.
        num_draft_tokens_accepted: How many of its tokens the large model confirmed.
        decision_score: How far it could be trusted.
        draft_complete: Whether it came to its end.
    """

    sample: int
    method: str
    average_retention: float | None
    answer: str
    score: float
    seconds: float
    num_tokens: int
    retention: float | None = None
    exited_early: bool | None = None
    draft: str | None = None
    draft_score: float | None = None
    num_draft_tokens_accepted: int | None = None
    decision_score: float | None = None
    draft_complete: bool | None = None

    @property
    def run(self) -> tuple[str, float | None]:
        """The run that it belongs to."""
        return self.method, self.average_retention


def all_processes(device: str = "auto") -> PartialState:
    """Who shares the work: this process and those that `accelerate launch` or `torchrun` started with it.

    Args:
        device (`str`, defaults to `"auto"`): Where the models shall run.

    Returns:
        `PartialState`: This process's place among them.
    """
    # Without being told so, processes that have no accelerator would not know of each other.
    on_cpu = device.startswith("cpu") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=_PATIENCE)


def read_retentions(text: str) -> list[float]:
    """Average retentions as they are given on a command line.

    Args:
        text (`str`): Fractions in `(0, 1)`, separated by commas.

    Returns:
        `list[float]`: The fractions, without repetition.

    Raises:
        ValueError: If one is no such fraction.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.evaluation_run import read_retentions

        >>> read_retentions("0.64,0.35")
        [0.64, 0.35]

        ```
    """
    try:
        retentions = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--retention is {text!r}: write fractions separated by commas, such as 0.64,0.35."
        ) from error
    for average in retentions:
        Setting.of(average, num_layers=1)  # raises if it is no fraction
    return list(dict.fromkeys(retentions))


def other_split(data: str) -> str:
    """Where to calibrate for built-in data.

    Args:
        data (`str`): The data that is evaluated.

    Returns:
        `str`: Another split of the same.

    Raises:
        ValueError: If there is none.
    """
    if data not in _OTHER_SPLITS:
        raise ValueError(
            f"The method sgl needs questions to choose its threshold on, and nothing tells which go with {data!r}: "
            "name other questions with --calibration, or leave sgl out of --methods."
        )
    return _OTHER_SPLITS[data]


def check_disjoint(samples: Sequence[Sample], calibration: Sequence[Sample]) -> None:
    """Raises if a threshold would be chosen on images that are evaluated.

    Args:
        samples (`Sequence[Sample]`): The data that is evaluated.
        calibration (`Sequence[Sample]`): The calibration data.

    Raises:
        ValueError: If they share an image.
    """
    shared = {sample.image_id for sample in samples} & {sample.image_id for sample in calibration}
    if shared:
        raise ValueError(
            f"{len(shared)} images are in the data and in the calibration data, such as {min(shared)!r}: a threshold "
            "must be chosen on other images than it is judged on."
        )


def check_enough(calibration: Sequence[Sample], keep_accuracy: float) -> None:
    """Raises if no answers to the calibration questions could prove a promise, so that nobody waits for it in vain.

    Args:
        calibration (`Sequence[Sample]`): The calibration data.
        keep_accuracy (`float`): As for [`choose_thresholds`].

    Raises:
        ValueError: If there are too few, or the promise is none.
    """
    promise = KeepAccuracy(keep_accuracy)
    needed = math.ceil(math.log(1 - _CONFIDENCE) / math.log(1 - promise.limit))
    if len(calibration) < needed:
        raise ValueError(
            f"There are {len(calibration)} calibration questions, and to promise that {promise.sentence()} takes "
            f"{needed} that the large model answers rightly: give more calibration data, or a lower --keep-accuracy."
        )


def check_scorable(samples: Sequence[Sample], metric_name: str) -> None:
    """Raises if a metric does not suit the data, before any model is loaded.

    Args:
        samples (`Sequence[Sample]`): The data.
        metric_name (`str`): The metric's name.

    Raises:
        ValueError: If there is no such metric, or a sample cannot be scored with it.
    """
    score, sample = metric(metric_name), None
    try:
        for sample in samples:
            score("", sample.answers, sample.choices)
    except ValueError as error:
        raise ValueError(f"{sample.where if sample else 'The data'}: {error}") from error


def evaluation_facts(
    model: Any, source: str, samples: Sequence[Sample], runs: Sequence[Run], **options: Any
) -> dict[str, Any]:
    """Everything that the records of an evaluation depend on, as it stands in `run.json`.

    Args:
        model ([`SGLForConditionalGeneration`]): The pair.
        source (`str`): The folder or the Hub repository it was loaded from.
        samples (`Sequence[Sample]`): The data.
        runs (`Sequence[Run]`): What is run.
        **options: What else was asked for: data, metric, batch size, seed, ...

    Returns:
        `dict`: The facts, ready for JSON.
    """
    folder = Path(source)
    settings = SGLGenerationConfig.from_generation_config(model.generation_config)
    data = [[sample.image_id, sample.prompt, sample.answers] for sample in samples]
    return {
        "model": str(folder.resolve()) if folder.is_dir() else source,
        "weights": fingerprint(folder) if folder.is_dir() else newest_commit(source),
        "data_sha256": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
        "runs": [list(run.key) for run in runs],
        **options,
        "dtype": [str(part.dtype) for part in (model.large, model.small)],
        "device": model.device.type,
        "generation_config": json.loads(settings.to_json_string(ignore_metadata=True)),
        "transformers_sgl": __version__,
    }


def run_methods(
    pair: Pair,
    samples: Sequence[Sample],
    runs: Sequence[Run],
    folder: Path,
    facts: dict[str, Any],
    *,
    metric_name: str = "exact_match",
    batch_size: int = 8,
    title: str = "evaluate",
) -> list[Result]:
    """Lets every run answer every sample, and goes on where an earlier call was cut off.

    Under `accelerate launch` every process takes its share of the batches, and all return all results.

    Args:
        pair ([`Pair`]): The models.
        samples (`Sequence[Sample]`): The data.
        runs (`Sequence[Run]`): What is run.
        folder (`Path`): Where the records are kept; made if it does not exist.
        facts (`dict`): What the records depend on, from [`evaluation_facts`].
        metric_name (`str`, defaults to `"exact_match"`): How answers are scored.
        batch_size (`int`, defaults to 8): How many samples are answered together.
        title (`str`, defaults to `"evaluate"`): What the progress bar says.

    Returns:
        `list[Result]`: A result for each sample and run, run by run.

    Raises:
        KeyboardInterrupt: If it is stopped; the message says how far it came.
        OSError: If the folder cannot be written, or an image cannot be read.
        ValueError: If the folder holds the records of another run.
    """
    processes = all_processes()
    if processes.is_main_process:
        claim(folder, facts)
    processes.wait_for_everyone()
    results = _read_results(folder, len(samples), runs)
    batches = [range(start, min(start + batch_size, len(samples))) for start in range(0, len(samples), batch_size)]
    waiting = [batch for batch in batches if any((run.key, index) not in results for run in runs for index in batch)]
    processes.wait_for_everyone()  # nobody writes before all have read
    mine = waiting[processes.process_index :: processes.num_processes]
    if mine:  # kernels are chosen and caches filled before time is taken
        batch = _batch(samples, mine[0])
        for run in runs:
            run.method.answer(pair, batch, run.setting)

    file = folder / f"samples-{processes.process_index}.jsonl"
    done = len(batches) - len(waiting)
    try:
        with (
            file.open("a", encoding="utf-8") as lines,
            tqdm(
                total=len(runs) * (len(mine) + done),
                initial=len(runs) * done,
                desc=title,
                unit="batch",
                disable=None if processes.is_main_process else True,
            ) as progress,
        ):
            for indices in mine:
                found = _run_batch(pair, samples, indices, runs, metric_name, progress)
                lines.write("".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in found))
                lines.flush()
                done += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Stopped after {done} of {len(batches)} batches; the same command goes on from there."
        ) from None
    processes.wait_for_everyone()
    results = _read_results(folder, len(samples), runs)
    processes.wait_for_everyone()
    whole = [results[run.key, index] for run in runs for index in range(len(samples))]
    if processes.is_main_process:
        _merge(folder, whole)
    processes.wait_for_everyone()
    return whole


def choose_thresholds(
    pair: Pair,
    samples: Sequence[Sample],
    retentions: Sequence[float],
    folder: Path,
    facts: dict[str, Any],
    *,
    keep_accuracy: float = 0.99,
    num_evaluated: int,
    metric_name: str = "exact_match",
    batch_size: int = 8,
) -> dict[float, float]:
    """Chooses, on questions that are not evaluated, from which decision score on drafts are returned.

    Args:
        pair ([`Pair`]): The models.
        samples (`Sequence[Sample]`): The calibration data; an answer counts as right from a score of 0.5 on.
        retentions (`Sequence[float]`): The average retentions; each gets a threshold.
        folder (`Path`): Where the records are kept.
        facts (`dict`): What the records depend on, from [`evaluation_facts`].
        keep_accuracy (`float`, defaults to 0.99): What fraction of the large model's right answers has to stay right,
            with 99 % confidence; see `calibration`.
        num_evaluated (`int`): The questions for which that has to hold.
        metric_name (`str`, defaults to `"exact_match"`): How answers are scored.
        batch_size (`int`, defaults to 8): How many samples are answered together.

    Returns:
        `dict[float, float]`: The thresholds by average retention.

    Raises:
        ValueError: If there are too few questions for the promise.
    """
    promise = KeepAccuracy(keep_accuracy)
    runs = plan({"sgp": SGP(scores_draft=True)}, retentions, pair.num_layers)
    results = run_methods(
        pair, samples, runs, folder, facts, metric_name=metric_name, batch_size=batch_size, title="calibrate"
    )
    thresholds = {}
    for average in retentions:
        found = [result for result in results if result.average_retention == average]
        records = [
            Record(
                index=result.sample,
                draft=result.draft or "",
                answer=result.answer,
                draft_right=(result.draft_score or 0) >= 0.5,
                large_right=result.score >= 0.5,
                confidence=0.0,
                consistency=0.0,
                decision_score=result.decision_score or 0.0,
                complete=bool(result.draft_complete),
            )
            for result in found
        ]
        counted = sum(promise.counts(record) for record in records)
        allowed = allowed_failures(counted, num_evaluated, promise.limit, _CONFIDENCE) if counted else None
        if allowed is None:
            raise ValueError(
                f"Of the {len(records)} calibration questions the large model answers {counted} rightly, which is too "
                f"few to promise that {promise.sentence()}: give more calibration data, or a lower --keep-accuracy."
            )
        thresholds[average] = promise.threshold(records, allowed)
    return thresholds


def measure_costs(
    pair: Pair, samples: Sequence[Sample], runs: Sequence[Run], folder: Path, *, batch_size: int = 8
) -> dict[tuple[str, float | None], Cost]:
    """Counts operations and memory of every run on a few batches, evenly drawn from the data.

    What an earlier call has counted is taken from `folder/costs.jsonl`.

    Args:
        pair ([`Pair`]): The models.
        samples (`Sequence[Sample]`): The data.
        runs (`Sequence[Run]`): What is run.
        folder (`Path`): Where the records are kept.
        batch_size (`int`, defaults to 8): How many samples are answered together.

    Returns:
        `dict`: By [`Run.key`], the operations for a question on average, and the most memory.
    """
    starts = range(0, len(samples), batch_size)
    chosen = [starts[place * len(starts) // _NUM_COST_BATCHES] for place in range(_NUM_COST_BATCHES)]
    batches = [_batch(samples, range(start, min(start + batch_size, len(samples)))) for start in dict.fromkeys(chosen)]
    number = sum(len(batch.samples) for batch in batches)
    file = folder / "costs.jsonl"
    costs = dict(_read_cost(file, line, fields) for line, fields in read_lines(file))
    for run in tqdm(runs, desc="operations and memory", unit="run", disable=None):
        if run.key not in costs:
            answers = (partial(run.method.answer, pair, batch, run.setting) for batch in batches)
            found = [measure_cost(answer, pair.model.device) for answer in answers]
            peaks = [cost.peak_memory_bytes for cost in found if cost.peak_memory_bytes is not None]
            cost = Cost(sum(cost.flops for cost in found) // number, max(peaks, default=None))
            fields = {"method": run.name, "average_retention": run.average_retention, **asdict(cost)}
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(fields) + "\n")
            costs[run.key] = cost
    return costs


def _read_cost(file: Path, line: int, fields: dict[str, Any]) -> tuple[tuple[str, float | None], Cost]:
    try:
        return (fields.pop("method"), fields.pop("average_retention")), Cost(**fields)
    except (KeyError, TypeError) as error:
        raise not_a_record(file, line, error) from error


def _run_batch(
    pair: Pair, samples: Sequence[Sample], indices: range, runs: Sequence[Run], metric_name: str, progress: Any
) -> list[Result]:
    batch, score = _batch(samples, indices), metric(metric_name)
    found: list[Result] = []
    # The order changes from batch to batch, so that no run always follows the same other.
    for place in np.random.default_rng(indices.start).permutation(len(runs)):
        run: Run = runs[place]
        start = now_ms(pair.model.device)
        answers = run.method.answer(pair, batch, run.setting)
        seconds = (now_ms(pair.model.device) - start) / 1000 / len(answers)
        for index, sample, answer in zip(indices, batch.samples, answers, strict=True):
            fields = asdict(answer)
            text = fields.pop("text")
            right = score(text, sample.answers, sample.choices)
            draft_right = None if answer.draft is None else score(answer.draft, sample.answers, sample.choices)
            found.append(Result(index, *run.key, text, right, seconds, **fields, draft_score=draft_right))
        progress.update(1)
    return found


def _batch(samples: Sequence[Sample], indices: range) -> Batch:
    chosen = [samples[index] for index in indices]
    return Batch(chosen, indices, [sample.open_image() for sample in chosen])


def _read_results(
    folder: Path, num_samples: int, runs: Sequence[Run]
) -> dict[tuple[tuple[str, float | None], int], Result]:
    """What all processes of earlier calls have left; a sample that was answered twice counts once."""
    known = {run.key for run in runs}
    results: dict[tuple[tuple[str, float | None], int], Result] = {}
    for file in sorted(folder.glob("samples*.jsonl")):
        for number, fields in read_lines(file):
            try:
                result = Result(**fields)
                if not 0 <= result.sample < num_samples or result.run not in known:
                    raise ValueError(f"there is no sample {result.sample} of {result.run}")
            except (TypeError, ValueError) as error:
                raise not_a_record(file, number, error) from error
            results.setdefault((result.run, result.sample), result)
    return results


def _merge(folder: Path, results: Sequence[Result]) -> None:
    """One file instead of one for each process."""
    text = "".join(json.dumps(asdict(result), ensure_ascii=False) + "\n" for result in results)
    write_atomically(folder / "samples.jsonl", text)
    for file in folder.glob("samples-*.jsonl"):
        with suppress(FileNotFoundError):
            file.unlink()
