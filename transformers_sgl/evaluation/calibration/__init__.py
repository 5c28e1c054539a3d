"""Calibration: from which decision score on the small model's answer may be returned, with a guarantee.

The decision score says how trustworthy an answer of the small model (the draft) is, but not what a score is worth on
your questions. [`calibrate`] finds out. Both models answer questions whose answers are known; the samples are split
at random into a calibration part, which sets `early_exit_threshold`, and a held-out part, which shows the result. A
sample exits early if its score is at least the threshold. One of two promises is made about all samples like these:

- [`KeepAccuracy`]: of the questions that the large model answers rightly, at least a given fraction stays right.
- [`LargeCallBudget`]: at most a given fraction of the questions is sent to the large model.

A sample fails on one side of the threshold only, so it is enough to fix how many failures the calibration part may
show: [`allowed_failures`]. These are risk-controlling prediction sets (Bates et al. 2021, arXiv 2101.02703;
Angelopoulos et al., arXiv 2110.01052) with the exact binomial bound (Clopper and Pearson 1934).

Two other thresholds decide in the same way between a cheap and a dear way to an answer, and get the same promises:
`unsure_threshold`, from which on the large model keeps no more visual tokens than usual, and `confirmation_threshold`,
from which on a draft that the pruned large model would have written stands.
"""

from transformers_sgl.evaluation.calibration.bounds import allowed_failures
from transformers_sgl.evaluation.calibration.calibrate import calibrate
from transformers_sgl.evaluation.calibration.promises import KeepAccuracy, LargeCallBudget, Promise, Record
from transformers_sgl.evaluation.calibration.report import CalibrationReport, CurvePoint, Proportion

__all__ = [
    "CalibrationReport",
    "CurvePoint",
    "KeepAccuracy",
    "LargeCallBudget",
    "Promise",
    "Proportion",
    "Record",
    "allowed_failures",
    "calibrate",
]
