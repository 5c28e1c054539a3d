"""The run behind a calibration: both models answer questions whose answers are known.

Each batch is one `generate` call. Its records are on disk before the next one begins, so that a run that was cut off
goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from transformers_sgl.evaluation.calibration.promises import Record
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import Pair
from transformers_sgl.evaluation.metrics import choice_accuracy, exact_match
from transformers_sgl.evaluation.run_folder import claim, not_a_record, read_lines
from transformers_sgl.tokens.early_exit import NEVER_EXIT

__all__ = ["run_samples"]


def run_samples(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    folder: Path,
    facts: dict[str, Any],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
) -> list[Record]:
    """Lets both models answer every sample, continuing where an earlier call was cut off.

    `folder/samples.jsonl` gets the records, and `folder/run.json` the `facts` that they depend on, so that records of
    different runs are never mixed.
    """
    file = folder / "samples.jsonl"
    # A pair whose settings do not allow an early exit says so here, before all the work.
    model.generate(**_inputs(model, processor, samples[:1]), max_new_tokens=1, early_exit_threshold=0.0)
    claim(folder, facts)
    records = {record.index: record for record in _read_records(file, len(samples))}
    waiting = [index for index in range(len(samples)) if index not in records]
    try:
        with (
            file.open("a", encoding="utf-8") as lines,
            tqdm(total=len(samples), initial=len(records), unit="sample", disable=None) as progress,
        ):
            for start in range(0, len(waiting), batch_size):
                batch = waiting[start : start + batch_size]
                asked = [samples[index] for index in batch]
                done = _run_batch(model, processor, asked, batch, max_new_tokens)
                lines.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in done)
                lines.flush()
                records |= {record.index: record for record in done}
                progress.update(len(done))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Stopped after {len(records)} of {len(samples)} samples; the same command goes on from there."
        ) from None
    return [records[index] for index in range(len(samples))]


def _run_batch(
    model: Any, processor: Any, samples: Sequence[Sample], indices: Sequence[int], max_new_tokens: int
) -> list[Record]:
    inputs = _inputs(model, processor, samples)
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        early_exit_threshold=NEVER_EXIT,
        verify_draft=True,  # changes no answer, and makes the small model answer even where nothing is pruned
        return_dict_in_generate=True,
    )
    if output.draft_sequences is None or output.decision_score is None:
        raise ValueError(
            f"{samples[0].where}: the small model did not answer, so there is nothing to calibrate; every sample "
            "needs an image that becomes visual tokens."
        )
    answers, drafts = (
        [text.strip() for text in part.batch_decode(sequences, skip_special_tokens=True)]
        for part, sequences in (
            (processor, output.sequences[:, inputs["input_ids"].shape[1] :]),
            (processor.small_processor, output.draft_sequences),
        )
    )
    scores = (score.float().tolist() for score in (output.confidence, output.consistency, output.decision_score))
    complete = output.draft_complete.tolist()
    records = [
        Record(index, draft, answer, _is_right(draft, sample), _is_right(answer, sample), *rest)
        for index, sample, draft, answer, *rest in zip(
            indices, samples, drafts, answers, *scores, complete, strict=True
        )
    ]
    for record, sample in zip(records, samples, strict=True):
        if not math.isfinite(record.decision_score):
            raise ValueError(
                f"{sample.where}: the decision score is {record.decision_score}, so the small model's numbers leave "
                "the range of its type; take another --dtype, such as float32."
            )
    return records


def _is_right(answer: str, sample: Sample) -> bool:
    score = choice_accuracy if sample.choices else exact_match
    return bool(score(answer, sample.answers, sample.choices))


def _inputs(model: Any, processor: Any, samples: Sequence[Sample]) -> Any:
    return Pair(model, processor).inputs(processor, samples, [sample.open_image() for sample in samples])


def _read_records(file: Path, num_samples: int) -> Iterator[Record]:
    """The records of an earlier call."""
    for number, fields in read_lines(file):
        try:
            record = Record(**fields)
            if not 0 <= record.index < num_samples:
                raise ValueError(f"there is no sample {record.index}")
        except (TypeError, ValueError) as error:
            raise not_a_record(file, number, error) from error
        yield record
