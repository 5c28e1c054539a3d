"""What choosing visual tokens takes, beside the large model's first pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedModel

from benchmarks.parts.pairing import sizes
from benchmarks.timing import ratio, take_turns
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.tokens.selection import SELECTIONS, decoder_processors

__all__ = ["measure_selection"]


def measure_selection(
    large: PreTrainedModel,
    inputs: dict[str, Tensor],
    width: int,
    retention_ratios: Sequence[float] = (0.05, 0.09, 0.2, 0.35),
    rounds: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Times each selection and the large model's first pass over everything, in turn.

    Features and importance are drawn, neighbours alike as in pictures.

    Args:
        large (`PreTrainedModel`): The large model.
        inputs (`dict`): Its inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        width (`int`): The width of the features, which is that of the small model's decoder.
        retention_ratios (sequence of `float`): How many tokens are chosen, as fractions.
        rounds (`int`, defaults to 3): How often each is timed.
        seed (`int`, defaults to 0): What features and importance are drawn from.

    Returns:
        `dict`: The sizes; `prefill`, a time; under `selections`, by name, for each ratio its `retention_ratio`, the
        number of tokens `kept`, its `time` and `time_over_prefill`.
    """
    tokens = visual_tokens_of(large.config, inputs)
    generator, device = torch.Generator().manual_seed(seed), tokens.valid.device
    shape = (tokens.batch_size, width, max(1, tokens.num_visual_tokens // 8))
    features = interpolate(torch.randn(shape, generator=generator), tokens.num_visual_tokens, mode="linear").mT
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    importance = torch.rand(tokens.valid.shape, generator=generator).pow(4).to(device)
    tokens = replace(tokens, features=features.to(device, large.dtype))

    ways: dict[Any, Any] = {"prefill": partial(large.generate, **inputs, max_new_tokens=1)}
    for name in ("top_k", *SELECTIONS):
        for share in retention_ratios:
            choose = decoder_processors(share, min_tokens_per_image=1, selection=name)
            ways[name, share] = partial(choose.keep_mask, tokens, importance)
    timings = take_turns(ways, rounds, large.device)
    selections: dict[str, list[dict[str, Any]]] = {}
    for (name, share), way in ((key, way) for key, way in ways.items() if key != "prefill"):
        found = {
            "retention_ratio": share,
            "kept": int(way().sum(dim=1).max()),
            "time": timings[name, share].to_dict(),
            "time_over_prefill": ratio(timings[name, share], timings["prefill"]),
        }
        selections.setdefault(name, []).append(found)
    return {**sizes(large, inputs), "prefill": timings["prefill"].to_dict(), "selections": selections}
