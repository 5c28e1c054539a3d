"""Measuring: how right a pair's answers are, against those of other methods, and when an early exit is safe.

Read [`evaluate`], which compares methods, and [`calibrate`], which sets the early-exit threshold. The rooms below them
hold the methods, the data and the calibration; `lmms_eval` makes a pair a model of that harness.
"""

from transformers_sgl.evaluation.calibration import CalibrationReport, KeepAccuracy, LargeCallBudget, calibrate
from transformers_sgl.evaluation.data import (
    EasyVQAQuestion,
    Question,
    Sample,
    Scene,
    SceneObject,
    Scenes,
    load_easy_vqa,
    load_samples,
    question_only_prior,
    read_samples,
)
from transformers_sgl.evaluation.evaluate import Evaluation, evaluate
from transformers_sgl.evaluation.methods import METHODS, Answer, Batch, Guide, Method, Pair, Setting
from transformers_sgl.evaluation.metrics import METRICS, metric

__all__ = [
    "METHODS",
    "METRICS",
    "Answer",
    "Batch",
    "CalibrationReport",
    "EasyVQAQuestion",
    "Evaluation",
    "Guide",
    "KeepAccuracy",
    "LargeCallBudget",
    "Method",
    "Pair",
    "Question",
    "Sample",
    "Scene",
    "SceneObject",
    "Scenes",
    "Setting",
    "calibrate",
    "evaluate",
    "load_easy_vqa",
    "load_samples",
    "metric",
    "question_only_prior",
    "read_samples",
]
