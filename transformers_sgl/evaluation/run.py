"""The run behind an evaluation: every method answers every question.

Batches are cut once and for all, and within a batch the methods take turns, so that what disturbs the machine disturbs
all alike. A batch is on disk before the next one begins: a run that was cut off goes on where it stopped, and several
processes (`accelerate launch`) write the same records as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from transformers_sgl import opening
from transformers_sgl.clock import now_ms
from transformers_sgl.evaluation.cost import Cost, measure_cost
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import Batch, Method, Pair, Setting
from transformers_sgl.evaluation.metrics import Metric, exact_match
from transformers_sgl.storage.files import append, locked, write_atomically
from transformers_sgl.storage.records import claim, not_a_record, read_lines

__all__ = [
    "Result",
    "Run",
    "RunKey",
    "all_processes",
    "alone_in",
    "counted_batches",
    "measure_costs",
    "open_in_process",
    "plan",
]
__all__ += ["run_methods"]

RunKey = tuple[str, float | None]  # a method's name and its average retention
_NUM_COST_BATCHES = 4
# How long a process waits for the others: PyTorch's default of some minutes is less than a share may take.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Run:
    """A method at a setting: a row of the table."""

    name: str  # the method's name
    method: Method  # the method
    setting: Setting  # how many visual tokens the large model may process; a method that does not prune has one run

    @property
    def average_retention(self) -> float | None:
        """The target; `None` for a method that does not prune."""
        return self.setting.average_retention if self.method.prunes else None

    @property
    def key(self) -> RunKey:
        """What identifies it among the runs."""
        return self.name, self.average_retention


def plan(methods: Mapping[str, Method], retentions: Sequence[float], num_layers: int) -> list[Run]:
    """The runs of an evaluation: methods that prune at every retention, the others once."""
    settings = [Setting.of(average, num_layers) for average in retentions]
    return [
        Run(name, method, setting)
        for name, method in methods.items()
        for setting in (settings if method.prunes else settings[:1])
    ]


@dataclass(frozen=True)
class Result:
    """How a run answered a sample: a line of `samples.jsonl`."""

    sample: int  # the sample's place in the data, from 0
    method: str  # the method's name
    average_retention: float | None  # the target; `None` for a method that does not prune
    answer: str  # the answer
    score: float  # its score, from 0 to 1
    seconds: float  # the batch's time from images and questions to answers, divided by its number of samples
    num_tokens: int  # the answer's tokens
    # The average retention that was reached; `None` where the large model was not called.
    retention: float | None = None
    exited_early: bool | None = None  # whether the small model's answer was returned
    draft: str | None = None  # the small model's answer, if there is one
    draft_score: float | None = None  # its score
    num_draft_tokens_accepted: int | None = None  # how many of its tokens the large model confirmed
    decision_score: float | None = None  # how trustworthy it is
    draft_complete: bool | None = None  # whether it was not cut off
    confirmation_score: float | None = None  # how probable the pruned large model finds it; 0 where it disagrees

    @property
    def run(self) -> RunKey:
        """The key of its run."""
        return self.method, self.average_retention


def all_processes(device: str = "auto") -> PartialState:
    """Who shares the work: this process and those that `accelerate launch` or `torchrun` started with it."""
    # Processes without an accelerator do not find each other unless they are told so.
    on_cpu = device.startswith("cpu") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=_PATIENCE)


@contextmanager
def alone_in(folder: Path, device: str = "auto") -> Iterator[None]:
    """Keeps a run's folder for these processes; raises `OSError` where another run is writing into it."""
    if not all_processes(device).is_main_process:
        yield  # nothing is written before all processes have met the one that has the folder
        return
    busy = f"Another process is writing into {str(folder)!r}: wait until it is done, or give another `out`."
    with locked(folder, busy=busy):
        yield


def open_in_process(pair: str | Path | tuple[Any, Any], dtype: str, device: str) -> tuple[Any, Any]:
    """The model and its processor; each of several processes has a device of its own."""
    processes = all_processes(device)
    if not isinstance(pair, (str, Path)):
        return pair
    if processes.num_processes > 1:
        device = str(processes.device)
    return opening.open_pair(pair, dtype=dtype, device=device)


def run_methods(
    pair: Pair,
    samples: Sequence[Sample],
    runs: Sequence[Run],
    folder: Path,
    facts: dict[str, Any],
    *,
    score: Metric = exact_match,
    batch_size: int = 8,
    title: str = "evaluate",
    is_timed: bool = True,
) -> list[Result]:
    """Lets every run answer every sample, continuing where an earlier call was cut off.

    `folder/run.json` gets `facts`, what the records depend on, and the settings of every run. Under
    `accelerate launch` every process takes its share of the batches, and all return all results, run by run.
    """
    processes = all_processes()
    if processes.is_main_process:
        claim(folder, {**facts, "settings": [run.method.facts(run.setting) for run in runs]})
    processes.wait_for_everyone()
    results = _read_results(folder, len(samples), runs)
    batches = [range(start, min(start + batch_size, len(samples))) for start in range(0, len(samples), batch_size)]
    waiting = [batch for batch in batches if any((run.key, index) not in results for run in runs for index in batch)]
    processes.wait_for_everyone()  # nobody writes before all have read
    mine = waiting[processes.process_index :: processes.num_processes]
    if mine and is_timed:  # the warm-up chooses kernels and fills caches
        batch = _batch(samples, mine[0])
        for run in runs:
            run.method.answer(pair, batch, run.setting)

    file = folder / f"samples-{processes.process_index}.jsonl"
    append(file, "")
    done = len(batches) - len(waiting)
    try:
        with tqdm(
            total=len(runs) * (len(mine) + done),
            initial=len(runs) * done,
            desc=title,
            unit="batch",
            disable=None if processes.is_main_process else True,
        ) as progress:
            for indices in mine:
                found = _run_batch(pair, samples, indices, runs, score, progress)
                append(file, "".join(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in found))
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


def measure_costs(
    pair: Pair, samples: Sequence[Sample], runs: Sequence[Run], folder: Path, *, batch_size: int = 8
) -> dict[RunKey, Cost]:
    """Operations for a question on average, and peak memory, of every run on a few batches spread over the data.

    `folder/costs.jsonl` keeps them for later calls.
    """
    batches = [_batch(samples, indices) for indices in counted_batches(len(samples), batch_size)]
    number = sum(len(batch.samples) for batch in batches)
    file = folder / "costs.jsonl"
    costs = dict(_read_cost(file, line, fields) for line, fields in read_lines(file))
    for run in tqdm(runs, desc="operations and memory", unit="run", disable=None):
        if run.key not in costs:
            answers = (partial(run.method.answer, pair, batch, run.setting) for batch in batches)
            found = [measure_cost(answer, pair.model.device, pair.model.large) for answer in answers]
            peaks = [cost.peak_memory_bytes for cost in found if cost.peak_memory_bytes is not None]
            names = ("flops", "vision_flops", "decoder_flops")
            flops = {name: sum(getattr(cost, name) for cost in found) // number for name in names}
            cost = Cost(peak_memory_bytes=max(peaks, default=None), **flops)
            fields = {"method": run.name, "average_retention": run.average_retention, **asdict(cost)}
            append(file, json.dumps(fields) + "\n")
            costs[run.key] = cost
    return costs


def counted_batches(num_samples: int, batch_size: int) -> list[range]:
    """The batches whose operations are counted."""
    starts = range(0, num_samples, batch_size)
    chosen = [starts[place * len(starts) // _NUM_COST_BATCHES] for place in range(_NUM_COST_BATCHES)]
    return [range(start, min(start + batch_size, num_samples)) for start in dict.fromkeys(chosen)]


def _read_cost(file: Path, line: int, fields: dict[str, Any]) -> tuple[RunKey, Cost]:
    try:
        return (fields.pop("method"), fields.pop("average_retention")), Cost(**fields)
    except (KeyError, TypeError) as error:
        raise not_a_record(file, line, error) from error


def _run_batch(
    pair: Pair, samples: Sequence[Sample], indices: range, runs: Sequence[Run], score: Metric, progress: Any
) -> list[Result]:
    batch = _batch(samples, indices)
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


def _read_results(folder: Path, num_samples: int, runs: Sequence[Run]) -> dict[tuple[RunKey, int], Result]:
    """The records of all processes of earlier calls; a sample that was answered twice counts once."""
    known = {run.key for run in runs}
    results: dict[tuple[RunKey, int], Result] = {}
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
