"""Measuring: data sets that need no download, and what they are measured against."""

from transformers_sgl.evaluation.easy_vqa import EasyVQAQuestion, load_easy_vqa, question_only_prior
from transformers_sgl.evaluation.scenes import Question, Scene, SceneObject, Scenes

__all__ = [
    "EasyVQAQuestion",
    "Question",
    "Scene",
    "SceneObject",
    "Scenes",
    "load_easy_vqa",
    "question_only_prior",
]
