"""Calibration: from which decision score on the small model's answer may be returned, with a guarantee.

The decision score says how far an answer of the small model (the draft) can be trusted, but not what a score is worth
on your questions. Calibration finds out. Both models answer questions whose answers are known; the samples are split
at random into a calibration part, which sets `early_exit_threshold`, and a held-out part, which shows what came of it.
A sample exits early if its score is at least the threshold. One of two promises is made about all the others like it:

- [`KeepAccuracy`]: of the questions that the large model answers rightly, at least a given fraction stays right.
- [`LargeCallBudget`]: at most a given fraction of the questions is sent to the large model.

Either way a sample fails on one side of the threshold only, so all that has to be fixed is how many failures the
calibration part may show: [`allowed_failures`]. These are risk-controlling prediction sets (Bates et al. 2021, arXiv
2101.02703; Angelopoulos et al., arXiv 2110.01052) with the exact binomial bound (Clopper and Pearson 1934).

Read top to bottom: the statistics, then the report. How the answers come about is told in `calibration_run`.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from transformers_sgl.evaluation.calibration_run import Record
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.storage.files import write_atomically

__all__ = [
    "CalibrationReport",
    "CurvePoint",
    "KeepAccuracy",
    "LargeCallBudget",
    "Promise",
    "Proportion",
    "allowed_failures",
    "calibrate",
    "check_feasible",
    "check_packages",
    "split_by_image",
    "write_results",
]

_INTERVAL_CONFIDENCE = 0.95
_MAX_CURVE_POINTS = 200


# --------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Promise(ABC):
    """What is promised of the pair: that among the samples that count, few fail.

    A sample fails on one side of the threshold only, so moving the threshold the other way never adds a failure.

    Attributes:
        value: The fraction that is promised.
        name: The promise's name.
        counting: Which samples count, as a clause behind their number.
        counts_all: Whether every sample counts.
        cure: What to ask for instead where there are too few samples.
    """

    value: float

    name: ClassVar[str]
    counting: ClassVar[str]
    counts_all: ClassVar[bool]
    cure: ClassVar[str]

    def __post_init__(self) -> None:
        _check_fraction(self.name, self.value)

    @property
    @abstractmethod
    def limit(self) -> Fraction:
        """The greatest fraction of failures that keeps the promise."""

    @abstractmethod
    def counts(self, record: Record) -> bool:
        """Whether the promise speaks of this sample."""

    @abstractmethod
    def fails(self, record: Record, threshold: float) -> bool:
        """Whether a sample that counts fails at this threshold."""

    @abstractmethod
    def threshold(self, records: Sequence[Record], allowed: int) -> float:
        """The threshold at which at most `allowed` samples fail, and none that is no worse than the next one.

        Args:
            records (`Sequence[Record]`): The calibration part.
            allowed (`int`): How many failures it may show, from [`allowed_failures`].

        Returns:
            `float`: The threshold that gives most of what was not promised: fewest calls of the large model, or most
            accuracy.
        """

    @abstractmethod
    def sentence(self) -> str:
        """The promise in words."""


class KeepAccuracy(Promise):
    """At least the fraction `value` of what the large model answers rightly stays right after routing.

    A sample fails if it exits early with a wrong draft where the large model is right. The pair's accuracy is then at
    least `value` times the large model's; drafts that are right where the large model is wrong come on top.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.calibration import KeepAccuracy

        >>> KeepAccuracy(0.99).limit
        Fraction(1, 100)

        ```
    """

    name = "keep_accuracy"
    counting = " that the large model answers rightly"
    counts_all = False
    cure = "a lower --keep-accuracy"

    @property
    def limit(self) -> Fraction:
        """What the promise leaves: `1 - value`."""
        return 1 - _exact(self.value)

    def counts(self, record: Record) -> bool:
        """Whether the large model is right."""
        return record.large_right

    def fails(self, record: Record, threshold: float) -> bool:
        """Whether a wrong draft is returned."""
        return not record.draft_right and record.exit_score >= threshold

    def threshold(self, records: Sequence[Record], allowed: int) -> float:
        """Just above the first score that misleads once too often; 0 if there is none."""
        misleading = sorted((r.exit_score for r in records if r.large_right and not r.draft_right), reverse=True)
        if len(misleading) <= allowed or misleading[allowed] < 0:
            return 0.0
        # Anything above the first score that is too much will do; the next calibration score leaves some room. Beyond
        # the last one it is the next number in float32, because that is what `generate` compares in.
        above = float(np.nextafter(np.float32(misleading[allowed]), np.float32(np.inf)))
        return min((r.exit_score for r in records if r.exit_score > misleading[allowed]), default=above)

    def sentence(self) -> str:
        """The promise in words."""
        return f"at least {_percent(self.value)} of the large model's right answers stay right"


class LargeCallBudget(Promise):
    """At most the fraction `value` of the samples is sent to the large model.

    Every sample counts, and fails if it does not exit early. Of all thresholds that keep the promise the highest is
    taken, which is the most careful one.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.calibration import LargeCallBudget

        >>> LargeCallBudget(0.5).sentence()
        'at most 50% of the questions go to the large model'

        ```
    """

    name = "large_call_budget"
    counting = ""
    counts_all = True
    cure = "a higher --large-call-budget"

    @property
    def limit(self) -> Fraction:
        """The budget itself."""
        return _exact(self.value)

    def counts(self, record: Record) -> bool:
        """Always."""
        return True

    def fails(self, record: Record, threshold: float) -> bool:
        """Whether the large model is called."""
        return record.exit_score < threshold

    def threshold(self, records: Sequence[Record], allowed: int) -> float:
        """The lowest score but `allowed`."""
        threshold = sorted(record.exit_score for record in records)[allowed]
        if threshold < 0:
            cut_off = sum(not record.complete for record in records)
            raise ValueError(
                f"The small model's answer was cut off in {cut_off} of {len(records)} calibration samples, which at "
                f"any threshold go to the large model, but only {allowed} may: ask for a higher --max-new-tokens or "
                f"for {self.cure}."
            )
        return threshold

    def sentence(self) -> str:
        """The promise in words."""
        return f"at most {_percent(self.value)} of the questions go to the large model"


def allowed_failures(
    num_calibration: int, num_held_out: int, limit: float | Fraction, confidence: float = 0.99
) -> int | None:
    """The most failures `c` that the calibration part may show for the promise to hold elsewhere.

    The samples that count are taken as exchangeable. Whoever fails first as the threshold moves is the worst. The
    threshold is set so that the calibration part's `(c + 1)`-th worst sample does not fail, nor does any sample that
    is no worse. Each of these events must then have a probability of at most `1 - confidence`:

    1. *More than the fraction `limit` of all questions fails.* More than that fraction is then worse than the
       `(c + 1)`-th worst calibration sample. So at most `c` of the `n` calibration samples belong to the worst `limit`
       of all questions, to which each belongs with the probability `limit`, or more where there are ties:
       `BinomCDF(c; n, limit)`. This is the bound of Clopper and Pearson (1934). Only one threshold is tried, so there
       is nothing to correct for (Bates et al. 2021).
    2. *Among `m` fresh samples, here the held-out part, `t` or more fail*, where `t = floor(limit * m) + 1` is the
       least number that breaks the promise. Order all `n + m` samples from the worst on, ties at random. Those that
       fail are strictly worse than the `(c + 1)`-th calibration sample, so they stand before it, and at most `c` of
       the first `c + t` samples belong to the calibration part. How many do is hypergeometric, because every order is
       as likely as any other: `P(Hypergeom(n + m, c + t, n) <= c)`. Ties only make the event rarer, and samples that
       fail at no threshold stand last.

    Args:
        num_calibration (`int`): `n`, the calibration samples that count.
        num_held_out (`int`): `m`, the held-out samples that count.
        limit (`float` or `Fraction`): The greatest fraction of failures that keeps the promise, in `(0, 1)`.
        confidence (`float`, *optional*, defaults to 0.99): The probability of each of the two statements, in `(0, 1)`.

    Returns:
        `int`, *optional*: `c`; `None` where even a calibration part without any failure would prove too little.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.calibration import allowed_failures

        >>> allowed_failures(1000, 1000, limit=0.05)
        29
        >>> allowed_failures(50, 50, limit=0.05) is None
        True

        ```
    """
    from scipy.stats import binom, hypergeom

    _check_fraction("limit", limit)
    _check_fraction("confidence", confidence)
    limit, risk = _exact(limit), float(1 - _exact(confidence))
    breaking = math.floor(limit * num_held_out) + 1

    def is_too_many(failures: int) -> bool:
        in_population = binom.cdf(failures, num_calibration, float(limit))
        in_fresh = hypergeom.cdf(failures, num_calibration + num_held_out, failures + breaking, num_calibration)
        return bool(max(in_population, in_fresh) > risk)

    # Both probabilities grow with the failures, so the first number that is too many can be searched by halves.
    too_many = bisect_left(range(num_calibration), True, key=is_too_many)
    return too_many - 1 if too_many else None


def check_feasible(
    promise: Promise, images: Sequence[Hashable], *, confidence: float = 0.99, held_out: float = 0.5, seed: int = 0
) -> None:
    """Raises if no outcome of a run could prove the promise, so that nobody waits for it in vain.

    Args:
        promise ([`Promise`]): The promise.
        images (`Sequence`): Each sample's image, as for [`calibrate`].
        confidence (`float`, *optional*, defaults to 0.99): As for [`calibrate`].
        held_out (`float`, *optional*, defaults to 0.5): As for [`calibrate`].
        seed (`int`, *optional*, defaults to 0): As for [`calibrate`].

    Raises:
        ValueError: If there are too few samples, or an argument is not allowed.
    """
    _check_fraction("confidence", confidence)
    calibration, fresh = map(len, split_by_image(images, held_out, seed))
    if promise.counts_all:
        feasible = allowed_failures(calibration, fresh, promise.limit, confidence) is not None
    else:
        # How many will count is not known yet. Fewer never prove more of new questions, so that much can be said; a
        # fresh set may be easier to promise for where it is smaller.
        feasible = calibration * math.log(1 - promise.limit) <= math.log(1 - _exact(confidence))
    if not feasible:
        about = "" if promise.counts_all else "at most "
        raise _too_few(promise, calibration, fresh, confidence, len(images), about)


def split_by_image(images: Sequence[Hashable], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits samples at random, all questions about one image to the same side.

    Args:
        images (`Sequence`): Each sample's image, or whatever names it.
        held_out (`float`): The fraction of the images that is held out, in `(0, 1)`.
        seed (`int`): What the split is drawn from.

    Returns:
        `tuple[list[int], list[int]]`: The indices of the calibration part and of the held-out part.

    Raises:
        ValueError: If there is only one image, or `held_out` is no such fraction.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.calibration import split_by_image

        >>> split_by_image(["a.png", "a.png", "b.png", "c.png"], held_out=0.5, seed=0)
        ([2], [0, 1, 3])

        ```
    """
    _check_fraction("held_out", held_out)
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
            f"{there}, so nothing can be promised of them: add data, or look whether the expected answers are worded "
            "as the models word theirs."
        )
    calibration, held_out = _least_sizes(num_calibration, num_held_out, promise.limit, confidence)
    needed = math.ceil(num_samples * (calibration + held_out) / counted)
    return ValueError(
        f"{there}. To promise with {_percent(confidence)} confidence that {promise.sentence()} takes at least "
        f"{calibration} and {held_out}, or about {needed} lines of data in all: add data, or ask for {promise.cure} "
        "or a lower --confidence."
    )


def _least_sizes(num_calibration: int, num_held_out: int, limit: Fraction, confidence: float) -> tuple[int, int]:
    """The next larger parts, in the same proportion, of which a calibration part without failures would be proof."""
    log_risk = math.log(1 - _exact(confidence))

    def log_choose(total: int, chosen: int) -> float:
        return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)

    calibration = max(num_calibration + 1, math.ceil(log_risk / math.log(1 - limit)))
    while True:
        held_out = max(1, round(calibration * num_held_out / num_calibration))
        breaking = math.floor(limit * held_out) + 1
        if log_choose(held_out, breaking) - log_choose(calibration + held_out, breaking) <= log_risk:
            return calibration, held_out
        # With a larger fresh set it only gets harder, until the promise allows one failure more there.
        next_held_out = math.ceil(breaking / limit)
        calibration = max(calibration + 1, math.floor((next_held_out - 0.5) * num_calibration / num_held_out))


def _check_fraction(name: str, value: float | Fraction) -> None:
    if not 0 < value < 1:
        raise ValueError(f"`{name}` is {value!r}: pass a fraction above 0 and below 1.")


def _exact(value: float | Fraction) -> Fraction:
    """The number as it was written: 1 - 0.9 is exactly a tenth, so that one failure of ten is within the limit."""
    return Fraction(str(value))


# ------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Proportion:
    """A fraction of samples with its exact 95 % interval (Clopper and Pearson 1934).

    Attributes:
        count: How many samples it is.
        total: Of how many.
        value: The fraction.
        low: The lower end of the interval.
        high: The upper end.
    """

    count: int
    total: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> Proportion:
        """The fraction `count / total`.

        Args:
            count (`int`): How many samples it is.
            total (`int`): Of how many, at least 1.

        Returns:
            `Proportion`: The fraction.

        Example:
            ```python
            >>> from transformers_sgl.evaluation.calibration import Proportion

            >>> print(Proportion.of(19, 20))
            95.0% [75.1, 99.9]

            ```
        """
        from scipy.stats import binomtest

        low, high = binomtest(count, total).proportion_ci(_INTERVAL_CONFIDENCE, method="exact")
        return cls(count, total, count / total, float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class CurvePoint:
    """What one threshold gives on the held-out part.

    Attributes:
        threshold: The threshold; `None` never exits.
        large_call_rate: The fraction of samples that goes to the large model.
        accuracy: The pair's accuracy.
        random_accuracy: The expected accuracy if as many samples, drawn at random, went to the large model.
    """

    threshold: float | None
    large_call_rate: float
    accuracy: float
    random_accuracy: float


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found: the content of `calibration.json`.

    Attributes:
        threshold: The `early_exit_threshold` to use.
        promise: The promise's name and value.
        confidence: The probability with which it holds, once for new questions and once for the held-out part.
        guarantee: The same as a sentence.
        num_samples: All samples.
        num_images: The images they are about.
        num_calibration: The calibration samples that the promise counts.
        num_held_out: The held-out samples that it counts.
        allowed_failures: How many failures the calibration part may show.
        calibration_failures: How many it shows.
        held_out_failures: How many the held-out part shows.
        breaking_failures: The least number of failures there that breaks the promise.
        promise_held: Whether the promise held on the held-out part.
        routed_accuracy: The pair's accuracy on the held-out part.
        large_accuracy: The large model's, with the pair's settings.
        small_accuracy: The small model's.
        large_call_rate: The fraction of the held-out part that goes to the large model.
        kept_right: What stays right of what the large model answers rightly; `None` if it answers nothing rightly.
        curve: What other thresholds give on the held-out part.
        measurement: Machine, versions, seed and date.
    """

    threshold: float
    promise: dict[str, float]
    confidence: float
    guarantee: str
    num_samples: int
    num_images: int
    num_calibration: int
    num_held_out: int
    allowed_failures: int
    calibration_failures: int
    held_out_failures: int
    breaking_failures: int
    promise_held: bool
    routed_accuracy: Proportion
    large_accuracy: Proportion
    small_accuracy: Proportion
    large_call_rate: Proportion
    kept_right: Proportion | None
    curve: tuple[CurvePoint, ...]
    measurement: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as it is written to JSON, the measurement's fields at its end."""
        fields = asdict(self)
        return {**fields, **fields.pop("measurement")}


def calibrate(
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

    Args:
        records (`Sequence[Record]`): What both models made of the samples.
        images (`Sequence`): Each sample's image, or whatever names it.
        promise ([`Promise`]): What the threshold has to keep.
        confidence (`float`, *optional*, defaults to 0.99): The probability with which it has to.
        held_out (`float`, *optional*, defaults to 0.5): The fraction of the images that is held out.
        seed (`int`, *optional*, defaults to 0): What the split is drawn from.
        measurement (`dict`, *optional*): Machine, versions, seed and date, for the report.

    Returns:
        `CalibrationReport`: The threshold, and what is known of it.

    Raises:
        ValueError: If there are too few samples for the promise.
    """
    # 1. One part to choose on, another to measure on.
    calibration, fresh = ([records[index] for index in side] for side in split_by_image(images, held_out, seed))

    # 2. The number of failures that may be seen sets the threshold.
    counted, fresh_counted = ([r for r in part if promise.counts(r)] for part in (calibration, fresh))
    sizes = len(counted), len(fresh_counted)
    allowed = allowed_failures(*sizes, promise.limit, confidence) if all(sizes) else None
    if allowed is None:
        raise _too_few(promise, *sizes, confidence, num_samples=len(records))
    threshold = promise.threshold(calibration, allowed)

    # 3. What it gives on samples that had no say in it.
    failures, fresh_failures = (sum(promise.fails(r, threshold) for r in part) for part in (counted, fresh_counted))
    breaking = math.floor(promise.limit * len(fresh_counted)) + 1
    large_right = [r for r in fresh if r.large_right]
    num_images = len(set(images))
    return CalibrationReport(
        threshold=threshold,
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


def write_results(
    report: CalibrationReport,
    folder: str | os.PathLike[str],
    generation_config: SGLGenerationConfig,
    pair: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Writes the report, its curve and the settings with the threshold in them.

    Args:
        report ([`CalibrationReport`]): The report.
        folder (`str` or `os.PathLike`): Gets `calibration.json`, `curve.png` and `generation_config.json`.
        generation_config ([`SGLGenerationConfig`]): The pair's own settings; they are not changed.
        pair (`str` or `os.PathLike`, *optional*): The pair's folder. Its `generation_config.json` is replaced last and
            in one step, so that it is either what it was or complete.

    Returns:
        `list[Path]`: The files written.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    settings = SGLGenerationConfig.from_generation_config(generation_config)
    settings.early_exit_threshold = report.threshold
    # What `save_pretrained` writes; its checks of fields that are not ours to change would come after all the work.
    text = settings.to_json_string(keys_to_pop=["compile_config"])

    curve = folder / "curve.png"
    _draw(report, curve)
    written = [curve]
    texts = {folder / "calibration.json": json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"}
    for place in [folder] if pair is None else [folder, Path(pair)]:
        texts[place / "generation_config.json"] = text
    for path, content in texts.items():
        write_atomically(path, content)
        written.append(path)
    return written


def check_packages(work: str = "Calibration", extra: str = "calibrate") -> None:
    """Raises unless the packages that a measurement needs beside the package's own are installed.

    Args:
        work (`str`, *optional*, defaults to `"Calibration"`): What needs them.
        extra (`str`, *optional*, defaults to `"calibrate"`): The extra that brings them.

    Raises:
        ValueError: If one is missing; the sentence says how to install it.
    """
    try:
        for name in ("matplotlib", "scipy"):
            import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{work} needs matplotlib and scipy ({error}): run `pip install 'transformers_sgl[{extra}]'`."
        ) from error


def _guarantee(promise: Promise, confidence: float, num_held_out: int, num_samples: int, num_images: int) -> str:
    sentence = promise.sentence()
    text = (
        f"{sentence[0].upper()}{sentence[1:]}: with {_percent(confidence)} confidence among all questions like "
        f"these, and likewise among {num_held_out} fresh ones{promise.counting}"
    )
    if num_images < num_samples:
        text += f" (as far as {num_samples} questions about only {num_images} images are independent)"
    return f"{text}."


def _curve(records: Sequence[Record]) -> tuple[CurvePoint, ...]:
    """From never calling the large model to always; at most so many thresholds, at equal steps of the scores."""
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


def _draw(report: CalibrationReport, path: Path) -> None:
    # The objects rather than pyplot, which would keep the figure and choose a window system for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = [100 * point.large_call_rate for point in report.curve]
    chosen = 100 * report.large_call_rate.value, 100 * report.routed_accuracy.value
    axes.plot(rates, [100 * point.accuracy for point in report.curve], label="by decision score (SEE)")
    axes.plot(rates, [100 * point.random_accuracy for point in report.curve], "--", color="grey", label="at random")
    axes.plot(*chosen, "o", color="black", label=f"threshold {report.threshold:.4g}")
    axes.set_xlabel("questions sent to the large model (%)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(f"Early exit on {report.large_call_rate.total:,} held-out questions")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _proportion(hits: Sequence[bool]) -> Proportion:
    return Proportion.of(sum(hits), len(hits))


def _percent(fraction: float) -> str:
    return f"{float(100 * _exact(fraction)):.10g}%"
