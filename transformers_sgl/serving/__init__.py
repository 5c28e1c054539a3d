"""A pair behind transformers' own OpenAI-compatible server."""

from transformers_sgl.serving.server import PairServer, serve

__all__ = ["PairServer", "serve"]
