"""`transformers-sgl calibrate`: chooses the early-exit threshold of a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from transformers_sgl.cli import shared

__all__ = ["calibrate"]

_PROMISE = "Promise (one of these)"


def calibrate(
    model: Annotated[
        str, shared.argument("MODEL", "A saved pair: a folder, whose settings get the threshold, or a Hub repository.")
    ],
    data: Annotated[Path, shared.option("FILE", "Questions and answers, as JSON lines.")],
    out: Annotated[Path, shared.option("DIR", "Folder for records, report and curve.")],
    keep_accuracy: Annotated[
        float | None,
        shared.option("A", "Fraction of the large model's right answers to keep, such as 0.99.", _PROMISE),
    ] = None,
    large_call_budget: Annotated[
        float | None, shared.option("B", "Largest fraction of questions for the large model, such as 0.5.", _PROMISE)
    ] = None,
    confidence: Annotated[float, shared.option("P", "Probability with which the promise holds.")] = 0.99,
    held_out: Annotated[float, shared.option("H", "Fraction of the images to measure on, not to choose on.")] = 0.5,
    seed: Annotated[int, shared.option("N", "What the split is drawn from.")] = 0,
    batch_size: shared.BatchSize = 8,
    max_new_tokens: shared.MaxNewTokens = 64,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    as_json: shared.Json = False,
) -> None:
    """Chooses the early-exit threshold of a pair on questions with known answers.

    Chooses from which decision score on the small model's answer is returned, so that a promise about accuracy or
    cost holds with the confidence asked for, and writes the threshold into the pair's settings.
    """
    if (keep_accuracy is None) == (large_call_budget is None):
        raise ValueError("One promise is needed: give either `--keep-accuracy` or `--large-call-budget`.")
    from transformers_sgl import evaluation

    if keep_accuracy is None:
        promise: Any = evaluation.LargeCallBudget(large_call_budget)  # type: ignore[arg-type]
    else:
        promise = evaluation.KeepAccuracy(keep_accuracy)
    report = evaluation.calibrate(
        model,
        data,
        promise,
        out=out,
        confidence=confidence,
        held_out=held_out,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
    )
    shared.print_result(report.to_dict(), _as_text(report), as_json)


def _as_text(report: Any) -> str:
    held = "kept" if report.promise_held else "NOT kept"
    lines = [
        f"threshold    {report.threshold:.6g}",
        f"promise      {report.guarantee}",
        f"calibration  {report.num_calibration} samples count, {report.calibration_failures} fail "
        f"({report.allowed_failures} may)",
        f"held out     promise {held}: {report.num_held_out} samples count, {report.held_out_failures} fail "
        f"({report.breaking_failures - 1} may)",
        f"accuracy     {report.routed_accuracy}, large model {report.large_accuracy}, "
        f"small model {report.small_accuracy}",
        f"large calls  {report.large_call_rate}",
        f"written      {', '.join(map(str, report.written))}",
    ]
    if not report.promise_held:
        lines.append("             the pair's own settings stay as they were: give more data, or promise less")
    if report.kept_right is not None:
        lines.insert(5, f"kept right   {report.kept_right} of the large model's right answers")
    return "\n".join(lines)
