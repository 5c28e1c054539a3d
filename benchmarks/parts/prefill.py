"""The large model's first pass, pruned: how much faster it is, and how much faster it could be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.parts.pairing import presets_of, sizes, while_in_decoder
from benchmarks.timing import Timing, ratio, spread, take_turns
from transformers_sgl.architectures import decoder
from transformers_sgl.clock import now_ms
from transformers_sgl.evaluation.cost import flop_counter

__all__ = ["measure_prefill"]

_Timings = dict[str, Timing]


def measure_prefill(
    large: PreTrainedModel, inputs: dict[str, Tensor], rounds: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Measures how much faster pruning makes the first token, and compares it with two ideals.

    `ideal` is the ratio of floating-point operations, of a causal attention only the needed half: a pass that is bound
    by nothing but arithmetic. Matrices of fewer rows are multiplied less efficiently, which no pruning can change. So
    the stock decoder is also timed on prompts of only the kept tokens; `kernel_ideal` is what these times make for the
    layers above and below `prune_layer`.

    Args:
        large (`PreTrainedModel`): The large model.
        inputs (`dict`): Its inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        rounds (`int`, defaults to 5): How often each setting is timed.
        seed (`int`, defaults to 0): What the choice of kept tokens is drawn from.

    Returns:
        `dict`: For `"unpruned"` and each preset under `settings` what was kept and, for the `whole` call and the
        `decoder` alone: `time`, `flops`, `ideal` (FLOPs unpruned / FLOPs), `speed_up` (time unpruned / time) and
        `reached` (speed-up / ideal); for the decoder also `kernel_ideal` and `kernel_reached`.
    """
    presets, kept = presets_of(large, inputs, seed)
    flops = _count_flops(large, inputs, presets)
    whole, in_decoder, short = _time_passes(large, inputs, presets, kept, rounds, seed)
    num_layers = decoder(large).config.num_hidden_layers
    settings: dict[str, Any] = {}
    for name in presets:
        found = settings[name] = dict(kept[name])
        for part, timings in (("whole", whole), ("decoder", in_decoder)):
            ideal = flops["unpruned"][part] / flops[name][part]
            speed_up = ratio(timings["unpruned"], timings[name])
            found[part] = {
                "time": timings[name].to_dict(),
                "flops": flops[name][part],
                "ideal": ideal,
                "speed_up": speed_up,
                "reached": {end: value / ideal for end, value in speed_up.items()},
            }
        below = kept[name].get("prune_layer", 0) / num_layers
        kernels = _kernel_ideals(short["unpruned"], short[name], below)
        rounds_of = zip(in_decoder["unpruned"].samples, in_decoder[name].samples, kernels, strict=True)
        found["decoder"]["kernel_ideal"] = spread(kernels)
        found["decoder"]["kernel_reached"] = spread([unpruned / pruned / best for unpruned, pruned, best in rounds_of])
    return {**sizes(large, inputs), "settings": settings}


def _count_flops(
    large: PreTrainedModel, inputs: dict[str, Tensor], presets: dict[str, Callable[[], Any]]
) -> dict[str, dict[str, int]]:
    """By preset, the operations of the `whole` pass and of its `decoder`."""
    flops = {}
    for name, pruned in presets.items():
        counter = flop_counter(halves_causal=True)
        with pruned(), counter, while_in_decoder(large, counter.get_total_flops) as total:
            large.generate(**inputs, max_new_tokens=1)
        flops[name] = {"whole": counter.get_total_flops(), "decoder": int(total[0])}
    return flops


def _time_passes(
    large: PreTrainedModel,
    inputs: dict[str, Tensor],
    presets: dict[str, Callable[[], Any]],
    kept: dict[str, dict[str, Any]],
    rounds: int,
    seed: int,
) -> tuple[_Timings, _Timings, _Timings]:
    """By preset: the whole pass, its decoder, and the stock decoder on a prompt of only the kept tokens."""
    device, text = large.device, decoder(large)
    in_decoder: dict[str, list[float]] = {name: [] for name in presets}

    def run(name: str) -> None:
        with presets[name](), while_in_decoder(large, lambda: now_ms(device)) as total:
            large.generate(**inputs, max_new_tokens=1)
        in_decoder[name].append(total[0])

    states = torch.zeros(*inputs["input_ids"].shape, text.config.hidden_size, dtype=large.dtype, device=device)
    states.normal_(std=0.02, generator=torch.Generator(device).manual_seed(seed))

    @torch.no_grad()
    def run_short(name: str) -> None:
        num_dropped = kept["unpruned"]["num_kept"] - kept[name]["num_kept"]
        text(inputs_embeds=states[:, num_dropped:], use_cache=True)

    ways = {("whole", name): partial(run, name) for name in presets}
    ways |= {("short", name): partial(run_short, name) for name in presets}
    timings = take_turns(ways, rounds, device)
    return (
        {name: timings["whole", name] for name in presets},
        {name: Timing(tuple(samples[-rounds:])) for name, samples in in_decoder.items()},
        {name: timings["short", name] for name in presets},
    )


def _kernel_ideals(unpruned: Timing, short: Timing, below: float) -> list[float]:
    """By round, the speed-up if this share of the layers read the whole prompt and the others the short one."""
    rounds = zip(unpruned.samples, short.samples, strict=True)
    return [whole / (below * whole + (1 - below) * part) for whole, part in rounds]
