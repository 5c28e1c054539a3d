"""The large model's tokens after the first: how long each takes, and how large the cache is."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from benchmarks.parts.pairing import presets_of, sizes
from benchmarks.timing import Timing, ratio, take_turns
from transformers_sgl.clock import now_ms
from transformers_sgl.transformers_interface import cache_of

__all__ = ["cache_bytes", "measure_decode"]


def measure_decode(
    large: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int = 16, rounds: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Measures time and cache of each further token, pruned and not.

    Args:
        large (`PreTrainedModel`): The large model.
        inputs (`dict`): Its inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        answer_tokens (`int`, defaults to 16): How many tokens it writes, at least 2; the first is the prefill's.
        rounds (`int`, defaults to 5): How often each setting is timed.
        seed (`int`, defaults to 0): What the choice of kept tokens is drawn from.

    Returns:
        `dict`: For `"unpruned"` and each preset under `settings` the `time` of a token (the median of an answer's
        steps), `time_over_unpruned`, `cache_bytes` and `cache_over_unpruned`.
    """
    device, answer_tokens = large.device, max(2, answer_tokens)
    presets, kept = presets_of(large, inputs, seed)
    steps: dict[str, list[float]] = {name: [] for name in presets}

    def run(name: str) -> Any:
        clock = _StepClock(device)
        with presets[name]():
            output = large.generate(
                **inputs,
                max_new_tokens=answer_tokens,
                stopping_criteria=StoppingCriteriaList([clock]),
                return_dict_in_generate=True,
            )
        steps[name].append(float(np.median(np.diff(clock.times))))
        return output

    held = {name: cache_bytes(cache_of(run(name))) for name in presets}
    take_turns({name: partial(run, name) for name in presets}, rounds, device, warmup=0)  # they have just run
    timings = {name: Timing(tuple(samples[-rounds:])) for name, samples in steps.items()}
    settings = {
        name: {
            **kept[name],
            "time": timings[name].to_dict(),
            "time_over_unpruned": ratio(timings[name], timings["unpruned"]),
            "cache_bytes": held[name],
            "cache_over_unpruned": held[name] / held["unpruned"],
        }
        for name in presets
    }
    return {**sizes(large, inputs), "answer_tokens": answer_tokens, "settings": settings}


class _StepClock(StoppingCriteria):
    """Ends nothing, but notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []  # milliseconds
        self._device = device

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(now_ms(self._device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def cache_bytes(cache: Any) -> int:
    """The bytes of a cache's keys and values; its layers may differ in length."""
    return sum(each.numel() * each.element_size() for layer in cache.layers for each in (layer.keys, layer.values))
