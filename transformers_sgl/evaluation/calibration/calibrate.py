"""Calibrates a pair: from questions with known answers to the threshold in its settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers_sgl.evaluation.calibration.promises import DECISIONS, Promise
from transformers_sgl.evaluation.calibration.report import CalibrationReport, write_results
from transformers_sgl.evaluation.calibration.run import run_samples
from transformers_sgl.evaluation.calibration.threshold import check_feasible, choose_threshold
from transformers_sgl.evaluation.checks import check_packages, check_settings
from transformers_sgl.evaluation.data import read_samples
from transformers_sgl.evaluation.methods import Pair
from transformers_sgl.evaluation.run import alone_in, open_in_process
from transformers_sgl.evaluation.run_folder import measurement_record, pair_facts
from transformers_sgl.storage.files import check_writable_folder, locked
from transformers_sgl.storage.identity import fingerprint

__all__ = ["calibrate"]


def calibrate(
    pair: str | Path | tuple[Any, Any],
    data: str | Path,
    promise: Promise,
    *,
    out: Path | str,
    setting: str = "early_exit_threshold",
    confidence: float = 0.99,
    held_out: float = 0.5,
    seed: int = 0,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    dtype: str = "auto",
    device: str = "auto",
) -> CalibrationReport:
    """Chooses a threshold of a pair on questions with known answers, by default that of early exits (section 3.3).

    A call that was cut off goes on where it stopped when it is made again. If the promise holds on the held-out
    questions, and the pair is given as a folder, the threshold goes into its `generation_config.json`.

    Args:
        pair (`str`, `Path` or `tuple`): A saved pair, in a folder or on the Hub; or a model and its processor.
        data (`str` or `Path`): Questions and answers as JSON lines; see [`read_samples`].
        promise ([`KeepAccuracy`] or [`LargeCallBudget`]): What the threshold has to keep.
        setting (`str`, defaults to `"early_exit_threshold"`): The threshold to choose. For an `"unsure_threshold"` the
            right answers with `unsure_retention_ratio` are kept, or the samples with so much are few; for a
            `"confirmation_threshold"` it is the unpruned large model's answers, and what it reads again.
        out (`str` or `Path`): The folder for records, report, curve, and settings with the threshold.
        confidence (`float`, defaults to 0.99): The probability with which the promise holds.
        held_out (`float`, defaults to 0.5): The fraction of the images that is held out to measure on.
        seed (`int`, defaults to 0): What the split is drawn from.
        batch_size (`int`, defaults to 8): How many questions are answered at once.
        max_new_tokens (`int`, defaults to 64): The length limit of an answer.
        dtype (`str`, defaults to `"auto"`): As for [`open_pair`].
        device (`str`, defaults to `"auto"`): As for [`open_pair`].

    Returns:
        [`CalibrationReport`]: The threshold, what is known about it, and the files written.

    Raises:
        KeyboardInterrupt: If it is stopped; the message says how far it came.
        OSError: If a file cannot be read or written, or another process writes into `out`.
        ValueError: If an argument is not allowed, there are too few questions, or `out` holds another run.
    """
    # 1. What can be wrong is checked before the models are loaded.
    check_settings(batch_size=batch_size, seed=seed, max_new_tokens=max_new_tokens)
    check_packages("Calibration", "calibrate")
    promise = _about(promise, setting)
    out, source = Path(out), pair if isinstance(pair, (str, Path)) else None
    folder = None if source is None or not Path(source).is_dir() else Path(source)
    for place in (out, folder):
        check_writable_folder(place)
    samples = read_samples(data)
    images = [sample.image_id for sample in samples]
    how: dict[str, Any] = {"confidence": confidence, "held_out": held_out, "seed": seed}
    check_feasible(promise, images, **how)
    with alone_in(out, device):
        model, processor = open_in_process(pair, dtype, device)
        # 2. Everything is answered in both ways; what an earlier call has done is not done again.
        facts = run_facts(model, source, data, max_new_tokens, setting)
        opened, decision = Pair(model, processor, max_new_tokens), promise.decision
        records = run_samples(opened, samples, out, facts, batch_size=batch_size, decision=decision)

        # 3. The threshold, and what it gives. One that breaks the promise is reported, but not put into the pair.
        measurement = measurement_record(seed, model.device)
        report = choose_threshold(records, images, promise, **how, measurement=measurement)
        target = folder if report.promise_held else None
        with _still_the_pair(target, facts, out):
            written = write_results(report, out, model.generation_config, target)
    return replace(report, written=tuple(written))


def _about(promise: Promise, setting: str) -> Promise:
    """The promise about another threshold; raises `ValueError` if there is none of that name."""
    if setting not in DECISIONS:
        raise ValueError(f"`setting` is {setting!r}: choose one of {', '.join(map(repr, DECISIONS))}.")
    return replace(promise, decision=DECISIONS[setting])


@contextmanager
def _still_the_pair(folder: Path | None, facts: dict[str, Any], out: Path) -> Iterator[None]:
    """Keeps others from saving into the pair's folder; raises `OSError` if it holds other weights by now."""
    if folder is None:
        yield
        return
    with nullcontext() if folder.resolve() == out.resolve() else locked(folder):
        if fingerprint(folder) != facts["weights"]:
            raise OSError(
                f"Another pair was saved into {str(folder)!r} while this one was calibrated: calibrate again."
            )
        yield


def run_facts(
    model: Any,
    source: str | Path | None,
    data: str | Path,
    max_new_tokens: int,
    setting: str = "early_exit_threshold",
) -> dict[str, Any]:
    """What the records depend on, for `run.json`."""
    # A second calibration is not another run, so what it sets does not count; nothing exits early in any.
    return {
        **pair_facts(model, source, without=("early_exit_threshold", setting)),
        "setting": setting,
        "data_sha256": hashlib.sha256(Path(data).read_bytes()).hexdigest(),
        "max_new_tokens": max_new_tokens,
    }
