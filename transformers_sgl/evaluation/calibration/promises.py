"""What a threshold decides, what a calibration promises of it, and the records of answers that it is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import numpy as np

from transformers_sgl.evaluation.calibration.bounds import check_fraction, exact, percent
from transformers_sgl.evaluation.run import Result

__all__ = ["DECISIONS", "EARLY_EXIT", "Decision", "KeepAccuracy", "LargeCallBudget", "Promise", "Record"]


@dataclass(frozen=True)
class Decision:
    """What a threshold decides: from it on a sample takes a cheap way to its answer, and else a dear one."""

    setting: str  # the threshold's name in the generation config
    right: str  # the right answers of the dear way
    rightly: str  # which samples it answers rightly, as a clause after their number
    dear: str  # what becomes of the samples that take it, as the end of a sentence about questions
    never: str  # what is true of samples that never take the cheap way, as a sentence's beginning
    cure: str  # what makes them fewer
    axis: str  # what the curve's rate is of
    highest: float = math.inf  # the highest threshold that the setting allows


EARLY_EXIT = Decision(
    setting="early_exit_threshold",
    right="the large model's right answers",
    rightly=" that the large model answers rightly",
    dear="go to the large model",
    never="The small model's answer was cut off",
    cure="a higher `max_new_tokens`",
    axis="questions sent to the large model",
)
_UNSURE = Decision(
    setting="unsure_threshold",
    right="the right answers with more visual tokens",
    rightly=" that are answered rightly with more visual tokens",
    dear="keep more visual tokens",
    never="The small model did not answer",  # which no run records
    cure="other data",
    axis="questions that keep more visual tokens",
)
_CONFIRMATION = Decision(
    setting="confirmation_threshold",
    right="the unpruned large model's right answers",
    rightly=" that the unpruned large model answers rightly",
    dear="are read again with every visual token",
    never="The pruned large model does not write what the small one does",
    cure="a higher `vision_retention_ratio` or `retention_ratio`",
    axis="questions read again with every visual token",
    highest=1.0,
)
DECISIONS = {decision.setting: decision for decision in (EARLY_EXIT, _UNSURE, _CONFIRMATION)}


@dataclass(frozen=True)
class Record:
    """What both ways to an answer made of one sample: for early exits, the small model and the large one."""

    draft_right: bool  # whether the cheap way's answer is right: the small model's; for unsure samples, the usual one
    large_right: bool  # whether the dear way's answer is right: the large model's, or that with more visual tokens
    decision_score: float  # how trustworthy the cheap way is, which is compared with the threshold
    complete: bool = True  # whether the cheap way is open: a draft that was cut off or not confirmed is never returned

    @classmethod
    def of(cls, result: Result) -> Record:
        """What a run of the pair without early exit recorded; an answer is right from a score of 0.5 on."""
        score, complete = result.decision_score or 0.0, bool(result.draft_complete)
        return cls((result.draft_score or 0) >= 0.5, result.score >= 0.5, score, complete)

    @classmethod
    def of_unsure(cls, usual: Result, more: Result) -> Record:
        """The same for an `unsure_threshold`, from a run that keeps as much as usual and one that keeps more."""
        return cls(usual.score >= 0.5, more.score >= 0.5, usual.decision_score or 0.0)

    @classmethod
    def of_confirmation(cls, confirmed: Result, whole: Result) -> Record:
        """The same for a `confirmation_threshold`, from a run that confirms at 0 and one that reads everything."""
        score = confirmed.confirmation_score or 0.0
        return cls((confirmed.draft_score or 0) >= 0.5, whole.score >= 0.5, score, score > 0)

    @property
    def exit_score(self) -> float:
        """The highest threshold at which the cheap way is taken; minus infinity where it is closed."""
        return self.decision_score if self.complete else -math.inf

    def right(self, threshold: float) -> bool:
        """Whether the pair's answer is right with this threshold."""
        return self.draft_right if self.exit_score >= threshold else self.large_right


@dataclass(frozen=True)
class _Promise:
    """A promise about the pair: among the samples that count, at most the fraction `limit` fails.

    A sample fails on one side of the threshold only, so moving the threshold the other way never adds a failure.
    """

    value: float  # the fraction that is promised
    decision: Decision = field(default=EARLY_EXIT, repr=False)  # what the threshold decides

    name: ClassVar[str]
    counts_all: ClassVar[bool]  # whether every sample counts
    cure: ClassVar[str]  # what to ask for instead if there are too few samples

    def __post_init__(self) -> None:
        check_fraction(self.name, self.value)


class KeepAccuracy(_Promise):
    """At least the fraction `value` of what the large model answers rightly stays right after routing.

    A sample fails if it exits early with a wrong draft where the large model is right. The pair's accuracy is then at
    least `value` times the large model's; drafts that are right where the large model is wrong come on top. For an
    `unsure_threshold` the usual retention stands for the small model, and the higher one for the large model; for a
    `confirmation_threshold` the unpruned large model does.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.calibration import KeepAccuracy

        >>> KeepAccuracy(0.99).limit
        Fraction(1, 100)

        ```
    """

    name = "keep_accuracy"
    counts_all = False
    cure = "a lower `keep_accuracy`"

    @property
    def counting(self) -> str:
        """Which samples count, as a clause after their number."""
        return self.decision.rightly

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
        return f"at least {percent(self.value)} of {self.decision.right} stay right"


class LargeCallBudget(_Promise):
    """At most the fraction `value` of the samples is sent to the large model.

    Every sample counts, and fails if it does not exit early; for an `unsure_threshold`, if it is unsure, and for a
    `confirmation_threshold`, if it is not confirmed. Of all thresholds that keep the promise, the highest is
    taken: the most careful one.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.calibration import LargeCallBudget

        >>> LargeCallBudget(0.5).sentence()
        'at most 50% of the questions go to the large model'

        ```
    """

    name = "large_call_budget"
    counting: ClassVar[str] = ""
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
            closed, decision = sum(not record.complete for record in records), self.decision
            raise ValueError(
                f"{decision.never} in {closed} of {len(records)} calibration samples, which at any threshold "
                f"{decision.dear}, but only {allowed} may: ask for {decision.cure} or for {self.cure}."
            )
        return threshold

    def sentence(self) -> str:
        return f"at most {percent(self.value)} of the questions {self.decision.dear}"


Promise = KeepAccuracy | LargeCallBudget
