"""The model types whose pruned prompts vLLM can run, and what they are called there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["FAMILIES", "Family", "family_of", "feature_width"]


@dataclass(frozen=True)
class Family:
    """A model type in vLLM.

    Attributes:
        architecture (`str`): The name under which the plugin registers our class; no stock model has it.
        model_class (`str`): Our class in `transformers_sgl.engines.vllm.models`.
        modalities (`tuple` of `str`): What the vision tower reads.
        position_rows (`int`): The rows of positions that the decoder tells apart: 1, or 3 with M-RoPE.
    """

    architecture: str
    model_class: str
    modalities: tuple[str, ...]
    position_rows: int


FAMILIES: dict[str, Family] = {
    "internvl": Family("SGLInternVLForConditionalGeneration", "PrunedInternVL", ("image", "video"), 1),
    "llava": Family("SGLLlavaForConditionalGeneration", "PrunedLlava", ("image",), 1),
    "qwen2_5_vl": Family("SGLQwen2_5_VLForConditionalGeneration", "PrunedQwen2_5_VL", ("image", "video"), 3),
    "qwen3_vl": Family("SGLQwen3VLForConditionalGeneration", "PrunedQwen3VL", ("image", "video"), 3),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a large model; raises `ValueError` if vLLM cannot run its pruned prompts."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"vLLM cannot run pruned prompts of models of type {config.model_type!r}: use a large model of type "
            f"{', '.join(map(repr, FAMILIES))}, or run the pair without vLLM."
        )
    vision: Any = getattr(config, "vision_config", None)
    if config.model_type == "llava" and vision.model_type == "pixtral":
        raise ValueError(
            "vLLM cannot run pruned prompts of LLaVA models with a Pixtral vision tower, whose images have line "
            "breaks between their tokens: use one with a CLIP or SigLIP tower, or run the pair without vLLM."
        )
    return FAMILIES[config.model_type]


def feature_width(config: PreTrainedConfig) -> int:
    """The numbers in a visual token's features: the decoder's width, and once more for each deepstack layer."""
    levels = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    width: int = config.get_text_config(decoder=True).hidden_size
    return width * (1 + len(levels))
