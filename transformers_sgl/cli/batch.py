"""`transformers-sgl batch`: answers a whole data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from transformers_sgl.cli import shared

if TYPE_CHECKING:
    from transformers_sgl.batch_jobs import BatchReport

__all__ = ["batch"]

_WORKERS = "Workers"


def batch(
    questions: Annotated[Path, shared.argument("QUESTIONS", "File of JSON lines.")],
    output: Annotated[Path, shared.option("DIR", "Folder for answers and rejected lines.")],
    batch_size: shared.BatchSize = 8,
    small_workers: Annotated[int, shared.option("N", "How many workers have the small model.", _WORKERS)] = 1,
    large_workers: Annotated[int, shared.option("N", "How many workers have the large model.", _WORKERS)] = 1,
    ray: Annotated[
        str | None,
        shared.option("ADDRESS", "Ray cluster whose machines do the work, or local to start one.", _WORKERS),
    ] = None,
    preset: shared.Preset = None,
    retention: shared.Retention = None,
    prune_layer: shared.PruneLayer = None,
    early_exit_threshold: shared.EarlyExitThreshold = None,
    model: shared.Model = None,
    max_new_tokens: shared.MaxNewTokens = 64,
    engine: shared.Engine = "transformers",
    engine_options: shared.EngineOptions = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    as_json: shared.Json = False,
) -> None:
    """Answers a whole data set.

    The small model's workers guide and answer what they are sure of, the large model's workers the rest.
    """
    options = shared.read_engine_options(engine, engine_options)
    from transformers_sgl.batch_jobs import run_batch

    report = run_batch(
        shared.pair_name(model),
        questions,
        output=output,
        small_workers=small_workers,
        large_workers=large_workers,
        batch_size=batch_size,
        settings=shared.pair_settings(preset, retention, prune_layer, early_exit_threshold, max_new_tokens),
        dtype=dtype,
        device=device,
        ray=ray,
        engine=engine,
        engine_options=options,
    )
    shared.print_result(report.to_dict(), _as_text(report), as_json)


def _as_text(report: BatchReport) -> str:
    early = f"{report.num_exited_early} by the small model alone"
    lines = [f"answered  {report.num_answered} of {report.num_questions} questions, {early}"]
    if report.average_retention is not None:
        lines.append(f"kept      {report.average_retention:.0%} of the visual tokens on average")
    if report.num_new:
        each = 1000 * report.seconds / report.num_new
        lines.append(f"time      {report.seconds:.1f} s for {report.num_new} of them now, {each:.0f} ms each")
    else:
        lines.append("time      nothing was left to do")
    if report.num_worker_deaths:
        lines.append(f"workers   {report.num_worker_deaths} died and were replaced")
    if report.num_rejected:
        lines.append(f"rejected  {report.num_rejected}: the reasons are in {report.rejected}")
    return "\n".join([*lines, f"written   {report.answers}"])
