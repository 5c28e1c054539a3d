"""What vLLM calls in each of its processes, through the entry point group `vllm.general_plugins`."""

from __future__ import annotations

from transformers_sgl.engines.vllm.families import FAMILIES

__all__ = ["register"]


def register() -> None:
    """Makes our classes known under names of their own; vLLM imports one when a checkpoint asks for it by name."""
    from vllm import ModelRegistry

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, f"transformers_sgl.engines.vllm.models:{family.model_class}")
