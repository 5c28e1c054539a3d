"""The run behind a calibration: both models answer questions whose answers are known.

Each batch is one `generate` call; what came of it is on disk before the next one begins, so that a run that was cut
off goes on where it was. Where the questions come from is told in `data`, what the answers tell about thresholds in
`calibration`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from transformers_sgl import __version__
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.methods import Pair
from transformers_sgl.evaluation.metrics import choice_accuracy, exact_match
from transformers_sgl.evaluation.records import claim, fingerprint, not_a_record, read_lines
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.tokens.early_exit import NEVER_EXIT
from transformers_sgl.transformers_interface import newest_commit

__all__ = ["Record", "run_facts", "run_samples"]


@dataclass(frozen=True)
class Record:
    """What both models made of one sample: a line of `samples.jsonl`.

    Attributes:
        index: The sample's place in the data, from 0.
        draft: The small model's answer.
        answer: The large model's answer.
        draft_right: Whether the small model's answer is right.
        large_right: Whether the large model's answer is right.
        confidence: The draft's confidence.
        consistency: The draft's consistency.
        decision_score: Their mean, by which a draft is returned or not.
        complete: Whether the draft came to its end; one that was cut off is never returned.
    """

    index: int
    draft: str
    answer: str
    draft_right: bool
    large_right: bool
    confidence: float
    consistency: float
    decision_score: float
    complete: bool = True

    @property
    def exit_score(self) -> float:
        """The highest threshold at which the draft is returned; no threshold is as low as that of a cut-off draft."""
        return self.decision_score if self.complete else -math.inf

    def right(self, threshold: float) -> bool:
        """Whether the pair's answer is right if it exits early from this threshold on."""
        return self.draft_right if self.exit_score >= threshold else self.large_right


def run_facts(model: Any, source: str, data: str | os.PathLike[str], max_new_tokens: int) -> dict[str, Any]:
    """Everything that the records of a run depend on, as it stands in `run.json`.

    Args:
        model ([`SGLForConditionalGeneration`]): The pair.
        source (`str`): The folder or the Hub repository it was loaded from.
        data (`str` or `os.PathLike`): The data file.
        max_new_tokens (`int`): The length limit of an answer.

    Returns:
        `dict`: The facts, ready for JSON. The pair's own `early_exit_threshold` is not one of them.
    """
    settings = SGLGenerationConfig.from_generation_config(model.generation_config)
    settings.early_exit_threshold = None  # what this is all for: a second calibration is not another run
    folder = Path(source)
    return {
        "model": str(folder.resolve()) if folder.is_dir() else source,
        "weights": fingerprint(folder) if folder.is_dir() else newest_commit(source),
        "data_sha256": hashlib.sha256(Path(data).read_bytes()).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "dtype": [str(part.dtype) for part in (model.large, model.small)],
        "generation_config": json.loads(settings.to_json_string(ignore_metadata=True)),
        "transformers_sgl": __version__,
    }


def run_samples(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    folder: str | os.PathLike[str],
    facts: dict[str, Any],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
) -> list[Record]:
    """Lets both models answer every sample, and goes on where an earlier call was cut off.

    Each batch is one `generate` call that never exits early. Its records are written to `folder/samples.jsonl` before
    the next batch begins; `folder/run.json` holds `facts`, so that records of another run are never mixed in.

    Args:
        model ([`SGLForConditionalGeneration`]): The pair.
        processor ([`SGLProcessor`]): Its processor.
        samples (`Sequence[Sample]`): The samples.
        folder (`str` or `os.PathLike`): Where the records are kept; made if it does not exist.
        facts (`dict`): What the records depend on, from [`run_facts`].
        batch_size (`int`, *optional*, defaults to 8): How many samples share a `generate` call.
        max_new_tokens (`int`, *optional*, defaults to 64): The length limit of an answer.

    Returns:
        `list[Record]`: One record for each sample, in their order.

    Raises:
        KeyboardInterrupt: If it is stopped; the message says how far it came.
        OSError: If the folder cannot be written, or an image cannot be read.
        ValueError: If the folder holds the records of another run, or the pair gives no decision score.
    """
    folder = Path(folder)
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
        verify_draft=True,  # changes no answer, and lets the small model answer where nothing is pruned, too
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
    """The records of an earlier call. A last line that was cut off is taken away; its sample is run again."""
    for number, fields in read_lines(file):
        try:
            record = Record(**fields)
            if not 0 <= record.index < num_samples:
                raise ValueError(f"there is no sample {record.index}")
        except (TypeError, ValueError) as error:
            raise not_a_record(file, number, error) from error
        yield record
