"""Measuring: questions whose answers are known, and how right an answer is."""

from transformers_sgl.evaluation.data import Sample, load_samples
from transformers_sgl.evaluation.easy_vqa import EasyVQAQuestion, load_easy_vqa, question_only_prior
from transformers_sgl.evaluation.metrics import METRICS, metric
from transformers_sgl.evaluation.scenes import Question, Scene, SceneObject, Scenes

__all__ = [
    "METRICS",
    "EasyVQAQuestion",
    "Question",
    "Sample",
    "Scene",
    "SceneObject",
    "Scenes",
    "load_easy_vqa",
    "load_samples",
    "metric",
    "question_only_prior",
]
