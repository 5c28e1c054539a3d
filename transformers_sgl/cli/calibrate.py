"""`transformers-sgl calibrate`: chooses a threshold of a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from transformers_sgl.cli import shared

__all__ = ["calibrate"]

_PROMISE = "Promise (one of these)"
# By setting: whose answers the threshold chooses between, whose right answers are kept, and what is to be rare.
_WORDS = {
    "early_exit_threshold": ("large model", "small model", "the large model's", "large calls"),
    "unsure_threshold": ("with more tokens", "as usual", "the larger retention's", "keep more"),
    "confirmation_threshold": ("unpruned", "small model", "the unpruned large model's", "read again"),
}


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
    setting: Annotated[
        Literal["early_exit_threshold", "unsure_threshold", "confirmation_threshold"],
        shared.option("NAME", "Which threshold: of early exits, of unsure samples or of confirmation."),
    ] = "early_exit_threshold",
    confidence: Annotated[float, shared.option("P", "Probability with which the promise holds.")] = 0.99,
    held_out: Annotated[float, shared.option("H", "Fraction of the images to measure on, not to choose on.")] = 0.5,
    seed: Annotated[int, shared.option("N", "What the split is drawn from.")] = 0,
    batch_size: shared.BatchSize = 8,
    max_new_tokens: shared.MaxNewTokens = 64,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    as_json: shared.Json = False,
) -> None:
    """Chooses the early-exit threshold of a pair, or another one, on questions with known answers.

    Chooses from which score on an answer takes the cheap way, so that a promise about accuracy or cost holds with the
    confidence asked for, and writes the threshold into the pair's settings. By default that is the decision score from
    which on the small model's answer is returned.
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
        setting=setting,
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
    dear, cheap, whose, rare = _WORDS[report.setting]
    held = "kept" if report.promise_held else "NOT kept"
    lines = [
        f"threshold    {report.threshold:.6g}",
        f"promise      {report.guarantee}",
        f"calibration  {report.num_calibration} samples count, {report.calibration_failures} fail "
        f"({report.allowed_failures} may)",
        f"held out     promise {held}: {report.num_held_out} samples count, {report.held_out_failures} fail "
        f"({report.breaking_failures - 1} may)",
        f"accuracy     {report.routed_accuracy}, {dear} {report.large_accuracy}, {cheap} {report.small_accuracy}",
        f"{rare:<11}  {report.large_call_rate}",
        f"written      {', '.join(map(str, report.written))}",
    ]
    if not report.promise_held:
        lines.append("             the pair's own settings stay as they were: give more data, or promise less")
    if report.kept_right is not None:
        lines.insert(5, f"kept right   {report.kept_right} of {whose} right answers")
    return "\n".join(lines)
