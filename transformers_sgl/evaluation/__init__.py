"""Measuring: how right a pair's answers are, compared with other methods, and when an early exit is safe.

Read [`evaluate`], which compares methods, and [`calibrate`], which sets the early-exit threshold. The rooms below them
hold methods, data and calibration; `lmms_eval` makes a pair a model of that harness.
"""

from transformers_sgl.evaluation.calibration import CalibrationReport, KeepAccuracy, LargeCallBudget, calibrate
from transformers_sgl.evaluation.data import Sample, Scenes, load_samples, read_samples
from transformers_sgl.evaluation.evaluate import Evaluation, evaluate
from transformers_sgl.evaluation.methods import METHODS, Guide, Method
from transformers_sgl.evaluation.metrics import METRICS, metric

__all__ = [
    "METHODS",
    "METRICS",
    "CalibrationReport",
    "Evaluation",
    "Guide",
    "KeepAccuracy",
    "LargeCallBudget",
    "Method",
    "Sample",
    "Scenes",
    "calibrate",
    "evaluate",
    "load_samples",
    "metric",
    "read_samples",
]
