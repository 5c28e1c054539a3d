"""What the small model's guidance costs, beside its answer alone and beside attention collected as it is elsewhere.

Elsewhere attention is collected by `output_attentions=True`, which needs eager attention and returns whole matrices to
be summed. Either the decoder alone is eager ("published"), or the vision encoder, too, as
`set_attn_implementation("eager")` on the whole model makes it ("published_whole").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.memory import available_memory, in_gib, measure_memory
from benchmarks.parts.answers import prescribed
from benchmarks.parts.pairing import while_in_decoder
from benchmarks.timing import Timing, ratio, take_turns
from transformers_sgl.architectures import decoder, visual_tokens_of
from transformers_sgl.clock import now_ms
from transformers_sgl.hooks.attention_recorder import AttentionRecorder
from transformers_sgl.transformers_interface import attention_name

__all__ = [
    "attention_matrix_bytes",
    "compare_guidance",
    "compare_importance",
    "measure_guidance",
    "published_importance",
]

# How much of the memory that is left an estimate may fill.
_USABLE = 0.8


def measure_guidance(
    small: PreTrainedModel,
    inputs: dict[str, Tensor],
    answer_tokens: int,
    rounds: int = 5,
    memory: bool = True,
) -> dict[str, Any]:
    """Measures the small model's answer in each way.

    Args:
        small (`PreTrainedModel`): The small model.
        inputs (`dict`): Its inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        answer_tokens (`int`): How many tokens it writes.
        rounds (`int`, defaults to 5): How often each way is timed.
        memory (`bool`, defaults to `True`): Whether memory is measured, too.

    Returns:
        `dict`: What [`compare_guidance`] finds; `decoder_prefill`, the same times for the decoder's first pass alone;
        and under `importance` how far both ways' results are apart.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> from benchmarks.parts.guidance import measure_guidance
        >>> from transformers_sgl.hub import embedded_pair

        >>> small = AutoModelForImageTextToText.from_pretrained(embedded_pair() / "small")
        >>> prompt = torch.tensor([[20] + 64 * [small.config.image_token_id] + [21, 22]])
        >>> inputs = {"input_ids": prompt, "pixel_values": torch.zeros(1, 3, 64, 64)}
        >>> found = measure_guidance(small, inputs, answer_tokens=2, rounds=1)
        >>> list(found["ways"]), found["importance"]["equal"]
        (['plain', 'capture', 'published', 'published_whole'], True)

        ```
    """
    found = compare_guidance(small, inputs, answer_tokens, rounds, memory, whole=True)
    there = [name for name, way in found["ways"].items() if "skipped" not in way]
    found["decoder_prefill"] = _compare_decoders(small, inputs, rounds, there)
    if "published" in there:
        found["importance"] = compare_importance(small, inputs, answer_tokens)
    return found


def compare_guidance(
    small: PreTrainedModel,
    inputs: dict[str, Tensor],
    answer_tokens: int,
    rounds: int,
    memory: bool,
    whole: bool,
) -> dict[str, Any]:
    """Time and memory of an answer alone, watched, and in the published way where that fits.

    Returns:
        `dict`: The sizes; under `ways` for each its `time`, its `memory` and their ratios to plain, or why it was
        `skipped`; and `published_over_capture`.
    """
    tokens = visual_tokens_of(small.config, inputs)
    ways = _ways(small, inputs, answer_tokens)
    if not whole:
        del ways["published_whole"]
    needed = attention_matrix_bytes(small, tokens.batch_size, tokens.prompt_length + answer_tokens)
    left = available_memory(small.device)
    skipped: dict[str, Any] = {}
    if needed > _USABLE * left:
        reason = f"the matrices of all layers take {in_gib(needed)}, and {in_gib(left)} are left"
        skipped = {name: {"skipped": reason} for name in ways if name.startswith("published")}
        ways = {name: way for name, way in ways.items() if name not in skipped}

    # What is measured for its memory is warm when it is timed.
    memories = {name: measure_memory(way, small) if memory else None for name, way in ways.items()}
    timings = take_turns(ways, rounds, small.device, warmup=0 if memory else 1)
    found: dict[str, Any] = {name: _cost_of_way(name, timings, memories) for name in ways}
    result = {
        "num_visual_tokens": tokens.num_visual_tokens,
        "batch_size": tokens.batch_size,
        "prompt_length": tokens.prompt_length,
        "answer_tokens": answer_tokens,
        "ways": {**found, **skipped},
    }
    if not skipped:
        extra = [found[name]["extra_memory_bytes"] for name in ("published", "capture")]
        result["published_over_capture"] = {
            "time": ratio(timings["published"], timings["capture"]),
            "extra_memory": extra[0] / extra[1] if all(number and number > 0 for number in extra) else None,
        }
    return result


def _ways(small: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int) -> dict[str, Callable[[], Any]]:
    """By name, the ways to get an answer: alone, watched, and with whole attention matrices."""
    tokens = visual_tokens_of(small.config, inputs)
    settings: dict[str, Any] = {"max_new_tokens": answer_tokens}

    def capture() -> Tensor:
        with AttentionRecorder(small, tokens) as recorder:
            small.generate(**inputs, **settings)
        return recorder.importance

    return {
        "plain": partial(small.generate, **inputs, **settings),
        "capture": capture,
        "published": partial(published_importance, small, inputs, **settings),
        "published_whole": partial(published_importance, small, inputs, whole=True, **settings),
    }


def _cost_of_way(name: str, timings: dict[str, Timing], memories: dict[str, dict[str, int] | None]) -> dict[str, Any]:
    memory, plain = memories[name], memories["plain"]
    found: dict[str, Any] = {
        "time": timings[name].to_dict(),
        "time_over_plain": ratio(timings[name], timings["plain"]),
        "memory": memory,
        "extra_memory_bytes": None,
        "peak_over_plain": None,
    }
    if memory is not None and plain is not None:
        found["extra_memory_bytes"] = memory["working_bytes"] - plain["working_bytes"]
        found["peak_over_plain"] = memory["peak_bytes"] / plain["peak_bytes"]
    return found


def _compare_decoders(
    small: PreTrainedModel, inputs: dict[str, Tensor], rounds: int, names: Sequence[str]
) -> dict[str, Any]:
    """The time that the decoder's first pass takes in each way."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    ways = _ways(small, inputs, answer_tokens=1)

    def run(name: str) -> None:
        with while_in_decoder(small, lambda: now_ms(small.device)) as total:
            ways[name]()
        samples[name].append(total[0])

    take_turns({name: partial(run, name) for name in names}, rounds, small.device)
    timings = {name: Timing(tuple(found[-rounds:])) for name, found in samples.items()}
    return {
        name: {
            "time": timing.to_dict(),
            "time_over_plain": ratio(timing, timings["plain"]),
            "time_over_capture": ratio(timing, timings["capture"]),
        }
        for name, timing in timings.items()
    }


def attention_matrix_bytes(model: PreTrainedModel, batch_size: int, length: int) -> int:
    """The bytes of all layers' attention matrices, as `output_attentions=True` keeps them, for prompts of this length.

    The float32 copies that one layer's softmax makes are in it.
    """
    text = model.config.get_text_config(decoder=True)
    matrix = batch_size * text.num_attention_heads * length**2
    return matrix * (text.num_hidden_layers * model.dtype.itemsize + 2 * 4)


@torch.no_grad()
def published_importance(
    model: PreTrainedModel, inputs: dict[str, Tensor], whole: bool = False, **settings: Any
) -> Tensor:
    """The importance of visual tokens as research code collects it: from whole attention matrices.

    Args:
        model (`PreTrainedModel`): The model; its attention is eager for the time being.
        inputs (`dict`): Its inputs, without padding.
        whole (`bool`, defaults to `False`): Whether the vision encoder's attention is eager, too.
        **settings: Settings of stock `generate`.

    Returns:
        `Tensor` of shape `(batch, num_visual_tokens)`: What [`AttentionRecorder`] records, in float32.
    """
    tokens = visual_tokens_of(model.config, inputs)
    first = int(tokens.last_position.max()) + 1
    owner = model if whole else decoder(model)
    before = attention_name(owner.config)
    owner.set_attn_implementation("eager")
    try:
        output = model.generate(**inputs, **settings, output_attentions=True, return_dict_in_generate=True)
    finally:
        owner.set_attn_implementation(before)
    importance = torch.zeros(tokens.positions.shape, device=tokens.positions.device)
    for step, layers in enumerate(output.attentions):
        for attention in layers:  # (batch, heads, queries, keys)
            rows = attention if step else attention[:, :, first:]
            importance += rows.float().sum(dim=(1, 2)).gather(1, tokens.positions)
    return importance


def compare_importance(small: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int) -> dict[str, Any]:
    """Whether both ways find the same importance when the same answer is written."""
    tokens = visual_tokens_of(small.config, inputs)
    settings = {"max_new_tokens": answer_tokens, **prescribed(small, inputs, answer_tokens)}
    with AttentionRecorder(small, tokens) as recorder:
        small.generate(**inputs, **settings)
    published = published_importance(small, inputs, **settings)
    difference = float((recorder.importance - published).abs().max())
    relative = difference / float(published.abs().max())
    tolerance = 1e-4 if small.dtype == torch.float32 else 2e-2
    return {
        "largest_difference": difference,
        "relative_difference": relative,
        "tolerance": tolerance,
        "equal": relative <= tolerance,
    }
