"""A pair behind an OpenAI-compatible server."""

from transformers_sgl.serving.requests import Limits
from transformers_sgl.serving.server import PairApp, serve

__all__ = ["Limits", "PairApp", "serve"]
