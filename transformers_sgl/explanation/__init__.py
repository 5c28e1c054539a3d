"""What both models saw and wrote for one question, as a page."""

from transformers_sgl.explanation.explain import explain
from transformers_sgl.explanation.result import Explanation, GuidedAnswer, Model, Picture

__all__ = ["Explanation", "GuidedAnswer", "Model", "Picture", "explain"]
