"""The settings of an answer in vLLM's words; what vLLM cannot do is refused."""

from __future__ import annotations

from typing import Any

import torch

from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.transformers_interface import default_settings

__all__ = ["guiding_settings", "sampling_arguments"]

# Stock settings that vLLM carries out, and those that say nothing about an answer; any other that is set is refused.
_CARRIED_OUT = {
    "bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "min_new_tokens", "min_p",
    "pad_token_id", "repetition_penalty", "sequence_bias", "stop_strings", "temperature", "top_k", "top_p",
}  # fmt: skip
_WITHOUT_MEANING = {
    "cache_implementation", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "return_dict_in_generate", "transformers_version", "use_cache",
}  # fmt: skip


def guiding_settings(settings: SGLGenerationConfig, num_layers: int) -> SGLGenerationConfig:
    """The same, pruned from the decoder's first layer on, with the same average retention.

    vLLM's paged cache holds equally many tokens of every layer.
    """
    average = settings.average_retention(num_layers)
    changed = SGLGenerationConfig.from_generation_config(settings)
    changed.retention_ratio, changed.prune_layer = average, 0
    return changed


def sampling_arguments(settings: SGLGenerationConfig, max_tokens: int, seed: int | None) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams` for resolved settings.

    Raises:
        ValueError: If a setting is one that vLLM cannot obey, with the cure.
    """
    _check(settings)
    eos = settings.eos_token_id
    arguments: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_tokens": min(settings.min_new_tokens or 0, max_tokens),
        "temperature": 0.0,
        "repetition_penalty": settings.repetition_penalty or 1.0,
        "stop_token_ids": [] if eos is None else torch.as_tensor(eos).reshape(-1).tolist(),
        "stop": settings.stop_strings,
        "include_stop_str_in_output": True,  # as in transformers
    }
    if settings.do_sample:
        arguments |= {
            "temperature": 1.0 if settings.temperature is None else settings.temperature,
            "top_k": settings.top_k or 0,
            "top_p": settings.top_p or 1.0,
            "min_p": settings.min_p or 0.0,
            "seed": seed,
        }
    bias = settings.sequence_bias
    if bias:
        arguments["logit_bias"] = {ids[0]: value for ids, value in _pairs(bias)}
    return arguments


def _check(settings: SGLGenerationConfig) -> None:
    """Raises `ValueError` if a setting is one that vLLM cannot obey."""
    neutral, own = default_settings(), SGLGenerationConfig.extra_defaults()
    for name, value in settings.to_dict().items():
        if name in _CARRIED_OUT or name in _WITHOUT_MEANING or name in own or value in (None, neutral.get(name)):
            continue
        raise ValueError(
            f"`{name}` is {value!r}, which vLLM cannot obey: leave it out, or use the engine transformers."
        )
    if settings.confirmation_threshold is not None:
        raise ValueError(
            "`confirmation_threshold` lets the large model read a prompt twice, which a request to vLLM cannot: leave "
            "it out, or use the engine transformers."
        )
    if settings.verify_draft:
        raise ValueError(
            f"`verify_draft` is {settings.verify_draft!r}, but vLLM takes no draft with a request: leave it out, or "
            "use the engine transformers."
        )
    if any(len(ids) > 1 for ids, _ in _pairs(settings.sequence_bias or {})):
        raise ValueError("`sequence_bias` has a sequence of several tokens, which vLLM cannot obey: name single ones.")


def _pairs(bias: Any) -> list[tuple[list[int], float]]:
    items = bias.items() if isinstance(bias, dict) else bias
    return [(list(ids), float(value)) for ids, value in items]
