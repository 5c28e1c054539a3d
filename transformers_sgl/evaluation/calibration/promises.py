"""What a calibration promises, and the records of answers that it is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from transformers_sgl.evaluation.calibration.bounds import check_fraction, exact, percent
from transformers_sgl.evaluation.run import Result

__all__ = ["KeepAccuracy", "LargeCallBudget", "Promise", "Record"]


@dataclass(frozen=True)
class Record:
    """What both models made of one sample."""

    draft_right: bool  # whether the small model's answer is right
    large_right: bool  # whether the large model's answer is right
    decision_score: float  # how trustworthy the draft is, which is compared with the threshold
    complete: bool = True  # whether the draft was not cut off; one that was is never returned

    @classmethod
    def of(cls, result: Result) -> Record:
        """What a run of the pair without early exit recorded; an answer is right from a score of 0.5 on."""
        score, complete = result.decision_score or 0.0, bool(result.draft_complete)
        return cls((result.draft_score or 0) >= 0.5, result.score >= 0.5, score, complete)

    @property
    def exit_score(self) -> float:
        """The highest threshold at which the draft is returned; minus infinity for a draft that was cut off."""
        return self.decision_score if self.complete else -math.inf

    def right(self, threshold: float) -> bool:
        """Whether the pair's answer is right if it exits early from this threshold on."""
        return self.draft_right if self.exit_score >= threshold else self.large_right


@dataclass(frozen=True)
class _Promise:
    """A promise about the pair: among the samples that count, at most the fraction `limit` fails.

    A sample fails on one side of the threshold only, so moving the threshold the other way never adds a failure.
    """

    value: float  # the fraction that is promised

    name: ClassVar[str]
    counting: ClassVar[str]  # which samples count, as a clause after their number
    counts_all: ClassVar[bool]  # whether every sample counts
    cure: ClassVar[str]  # what to ask for instead if there are too few samples

    def __post_init__(self) -> None:
        check_fraction(self.name, self.value)


class KeepAccuracy(_Promise):
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
    cure = "a lower `keep_accuracy`"

    @property
    def limit(self) -> Fraction:
        return 1 - exact(self.value)

    def counts(self, record: Record) -> bool:
        return record.large_right

    def fails(self, record: Record, threshold: float) -> bool:
        return not record.draft_right and record.exit_score >= threshold

    def threshold(self, records: Sequence[Record], allowed: int) -> float:
        """Just above the first score that misleads once too often; 0 if there is none."""
        misleading = sorted((r.exit_score for r in records if r.large_right and not r.draft_right), reverse=True)
        if len(misleading) <= allowed or misleading[allowed] < 0:
            return 0.0
        # Anything above the first score that is one too many will do; the next calibration score leaves some room.
        # After the last score it is the next number in float32, in which `generate` compares.
        above = float(np.nextafter(np.float32(misleading[allowed]), np.float32(np.inf)))
        return min((r.exit_score for r in records if r.exit_score > misleading[allowed]), default=above)

    def sentence(self) -> str:
        return f"at least {percent(self.value)} of the large model's right answers stay right"


class LargeCallBudget(_Promise):
    """At most the fraction `value` of the samples is sent to the large model.

    Every sample counts, and fails if it does not exit early. Of all thresholds that keep the promise, the highest is
    taken: the most careful one.

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
    cure = "a higher `large_call_budget`"

    @property
    def limit(self) -> Fraction:
        return exact(self.value)

    def counts(self, record: Record) -> bool:
        return True

    def fails(self, record: Record, threshold: float) -> bool:
        return record.exit_score < threshold

    def threshold(self, records: Sequence[Record], allowed: int) -> float:
        """The lowest score but `allowed`."""
        threshold = sorted(record.exit_score for record in records)[allowed]
        if threshold < 0:
            cut_off = sum(not record.complete for record in records)
            raise ValueError(
                f"The small model's answer was cut off in {cut_off} of {len(records)} calibration samples, which at "
                f"any threshold go to the large model, but only {allowed} may: ask for a higher "
                f"`max_new_tokens` or for {self.cure}."
            )
        return threshold

    def sentence(self) -> str:
        return f"at most {percent(self.value)} of the questions go to the large model"


Promise = KeepAccuracy | LargeCallBudget
