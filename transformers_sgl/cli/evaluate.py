"""`transformers-sgl evaluate`: compares methods on questions with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from transformers_sgl.cli import shared

__all__ = ["evaluate"]

_DATA, _HOW = "Data", "Methods and scores"


def evaluate(
    model: Annotated[str, shared.argument("MODEL", "A saved pair: a folder or a Hub repository.")],
    data: Annotated[
        str,
        shared.option(
            "DATA",
            "easy-vqa, scenes, reading, descriptions, a file of JSON lines, or a data set: org/name:split.",
            _DATA,
        ),
    ],
    out: Annotated[Path, shared.option("DIR", "Folder for records, tables and figure.")],
    calibration: Annotated[
        str | None,
        shared.option("DATA", "Other questions, for early exits (default: another split).", _DATA),
    ] = None,
    columns: Annotated[
        str | None,
        shared.option("OURS=THEIRS,...", "What a data set calls image, question, answers, choices, kind.", _DATA),
    ] = None,
    limit: Annotated[int | None, shared.option("N", "Most questions, drawn at random (default: all).", _DATA)] = None,
    calibration_limit: Annotated[int, shared.option("N", "Most calibration questions.", _DATA)] = 2000,
    methods: Annotated[str | None, shared.option("M,...", "Some of those listed below (default: all).", _HOW)] = None,
    retention: Annotated[str, shared.option("R,...", "Average retentions, as fractions.", _HOW)] = "0.64,0.35,0.09",
    metric: Annotated[
        str,
        shared.option(
            "NAME", "exact_match, vqa_accuracy, anls, relaxed_accuracy, choice_accuracy or described_facts.", _HOW
        ),
    ] = "exact_match",
    keep_accuracy: Annotated[
        float,
        shared.option("A", "For early exits: fraction of the large model's right answers that stay right.", _HOW),
    ] = 0.99,
    batch_size: shared.BatchSize = 8,
    seed: Annotated[int, shared.option("N", "What everything random is drawn from.")] = 0,
    max_new_tokens: shared.MaxNewTokens = 64,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
) -> None:
    """Compares guided pruning with other methods on questions with known answers.

    Lets every method answer every question, and reports accuracy, retention, operations, time and memory, with
    intervals and tests against the large model alone.
    """
    from transformers_sgl import evaluation

    found = evaluation.evaluate(
        model,
        data,
        out=out,
        methods=methods.split(",") if methods else None,
        retentions=_retentions(retention),
        metric=metric,
        calibration_data=calibration,
        columns=_columns(columns) if columns else None,
        limit=limit,
        calibration_limit=calibration_limit,
        keep_accuracy=keep_accuracy,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    if found.written:  # of several processes, one writes and tells
        print(found.to_markdown())
        print(f"\nwritten: {', '.join(map(str, found.written))}")


def _retentions(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--retention is {text!r}: write fractions separated by commas, such as 0.35,0.09.") from None


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise ValueError(f"--columns is {text!r}: write ours=theirs, separated by commas, such as image=picture.")
    return {ours: theirs for ours, _, theirs in pairs}
