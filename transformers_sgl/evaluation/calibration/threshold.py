"""Chooses the threshold on one part of the samples and measures it on the other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from transformers_sgl.evaluation.calibration.bounds import (
    allowed_failures,
    check_fraction,
    exact,
    least_sizes,
    percent,
)
from transformers_sgl.evaluation.calibration.promises import Promise, Record
from transformers_sgl.evaluation.calibration.report import CalibrationReport, CurvePoint, Proportion

__all__ = ["check_feasible", "choose_threshold", "split_by_image"]


def choose_threshold(
    records: Sequence[Record],
    images: Sequence[Hashable],
    promise: Promise,
    *,
    confidence: float = 0.99,
    held_out: float = 0.5,
    seed: int = 0,
    measurement: dict[str, Any] | None = None,
) -> CalibrationReport:
    """Chooses the threshold on one part of the samples and measures it on the other.

    Of the samples, `images` names the image of each; questions about one image stay on one side.
    """
    # 1. One part to choose on, another to measure on.
    calibration, fresh = ([records[index] for index in side] for side in split_by_image(images, held_out, seed))

    # 2. The number of failures that are allowed sets the threshold.
    counted, fresh_counted = ([r for r in part if promise.counts(r)] for part in (calibration, fresh))
    sizes = len(counted), len(fresh_counted)
    allowed = allowed_failures(*sizes, promise.limit, confidence) if all(sizes) else None
    if allowed is None:
        raise _too_few(promise, *sizes, confidence, num_samples=len(records))
    threshold, decision = promise.threshold(calibration, allowed), promise.decision
    if threshold > decision.highest:
        raise ValueError(
            f"No `{decision.setting}` keeps the promise that {promise.sentence()}, because some wrong answers have a "
            f"score of {decision.highest:g}: ask for {promise.cure}, or leave the threshold out."
        )

    # 3. What it gives on the other samples.
    failures, fresh_failures = (sum(promise.fails(r, threshold) for r in part) for part in (counted, fresh_counted))
    breaking = math.floor(promise.limit * len(fresh_counted)) + 1
    large_right = [r for r in fresh if r.large_right]
    num_images = len(set(images))
    return CalibrationReport(
        threshold=threshold,
        setting=decision.setting,
        promise={promise.name: promise.value},
        confidence=confidence,
        guarantee=_guarantee(promise, confidence, len(fresh_counted), len(records), num_images),
        num_samples=len(records),
        num_images=num_images,
        num_calibration=len(counted),
        num_held_out=len(fresh_counted),
        allowed_failures=allowed,
        calibration_failures=failures,
        held_out_failures=fresh_failures,
        breaking_failures=breaking,
        promise_held=fresh_failures < breaking,
        routed_accuracy=_proportion([r.right(threshold) for r in fresh]),
        large_accuracy=_proportion([r.large_right for r in fresh]),
        small_accuracy=_proportion([r.draft_right for r in fresh]),
        large_call_rate=_proportion([r.exit_score < threshold for r in fresh]),
        kept_right=_proportion([r.right(threshold) for r in large_right]) if large_right else None,
        curve=_curve(fresh),
        measurement=measurement or {},
    )


def check_feasible(
    promise: Promise, images: Sequence[Hashable], *, confidence: float = 0.99, held_out: float = 0.5, seed: int = 0
) -> None:
    """Raises if no outcome of a run could prove the promise."""
    check_fraction("confidence", confidence)
    calibration, fresh = map(len, split_by_image(images, held_out, seed))
    if promise.counts_all:
        feasible = allowed_failures(calibration, fresh, promise.limit, confidence) is not None
    else:
        # How many will count is not known yet. Fewer never prove more about new questions, so at least this can be
        # checked; for a smaller fresh set the promise may be easier to keep.
        feasible = calibration * math.log(1 - promise.limit) <= math.log(1 - exact(confidence))
    if not feasible:
        raise _too_few(promise, calibration, fresh, confidence, len(images), "" if promise.counts_all else "at most ")


def split_by_image(images: Sequence[Hashable], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits samples at random into calibration and held-out indices, questions about one image to the same side."""
    check_fraction("held_out", held_out)
    distinct = list(dict.fromkeys(images))
    if len(distinct) < 2:
        raise ValueError("All samples are about one image, so none can be held out: give samples about more images.")
    number = min(max(1, round(held_out * len(distinct))), len(distinct) - 1)
    order = np.random.default_rng(seed).permutation(len(distinct))
    apart = {distinct[index] for index in order[:number]}
    sides: tuple[list[int], list[int]] = ([], [])
    for index, image in enumerate(images):
        sides[image in apart].append(index)
    return sides


def _too_few(
    promise: Promise, num_calibration: int, num_held_out: int, confidence: float, num_samples: int, about: str = ""
) -> ValueError:
    counted = num_calibration + num_held_out
    there = f"There are {about}{num_calibration} calibration and {num_held_out} held-out samples{promise.counting}"
    if not (num_calibration and num_held_out):
        return ValueError(
            f"{there}, so nothing can be promised of them: add data, or check whether the expected answers are worded "
            "like the models'."
        )
    calibration, held_out = least_sizes(num_calibration, num_held_out, promise.limit, confidence)
    needed = math.ceil(num_samples * (calibration + held_out) / counted)
    return ValueError(
        f"{there}. To promise with {percent(confidence)} confidence that {promise.sentence()} takes at least "
        f"{calibration} and {held_out}, or about {needed} lines of data in all: add data, or ask for {promise.cure} "
        "or a lower `confidence`."
    )


def _guarantee(promise: Promise, confidence: float, num_held_out: int, num_samples: int, num_images: int) -> str:
    sentence = promise.sentence()
    text = (
        f"{sentence[0].upper()}{sentence[1:]}: with {percent(confidence)} confidence among all questions like "
        f"these, and likewise among {num_held_out} fresh ones{promise.counting}"
    )
    if num_images < num_samples:
        text += f" (as far as {num_samples} questions about only {num_images} images are independent)"
    return f"{text}."


_MAX_CURVE_POINTS = 200


def _curve(records: Sequence[Record]) -> tuple[CurvePoint, ...]:
    """Thresholds from never calling the large model to always, at equal steps of the scores."""
    scores, draft_right, large_right = (
        np.array([getattr(r, name) for r in records]) for name in ("exit_score", "draft_right", "large_right")
    )
    distinct = np.unique(scores[scores >= 0])
    if len(distinct) > _MAX_CURVE_POINTS:
        distinct = distinct[np.linspace(0, len(distinct) - 1, _MAX_CURVE_POINTS).round().astype(int)]
    points = []
    for threshold in [*distinct.tolist(), None]:
        calls = np.ones(len(records), bool) if threshold is None else scores < threshold
        rate = float(calls.mean())
        by_chance = rate * large_right.mean() + (1 - rate) * draft_right.mean()
        accuracy = np.where(calls, large_right, draft_right).mean()
        points.append(CurvePoint(threshold, rate, float(accuracy), float(by_chance)))
    return tuple(points)


def _proportion(hits: Sequence[bool]) -> Proportion:
    return Proportion.of(sum(hits), len(hits))
