"""The benchmark's parts: what guidance costs, what pruning saves, and when the whole beats the large model alone.

Weights and images are random: time, memory and operations do not depend on them. Every part is a function that takes
models and inputs and returns a plain dictionary, ready for JSON; ways that are compared take turns in one run
([`take_turns`]), and each ratio is the median of the rounds' ratios with its least and greatest. Read top to bottom:

    guidance      the small model's `generate` alone, watched, and as attention is collected elsewhere
    prefill       the large model's first pass, pruned, against what the saved operations would give
    decode        seconds and cache for each further token, pruned
    drafts        forward passes and time by the length of an answer and the share of its draft that is right
    end to end    both models against the large one alone, by retention and by the share of early exits
    break-even    the same while one thing grows; where the ratio crosses 1
    growth        guidance again while prompts, batches and answers grow, with a power law fitted

What a random model writes is decided by the last bit of its logits. Where it matters what is written, the answer is
prescribed by a logits processor, so that drafts are right and wrong exactly as often as is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from transformers_sgl.architectures import decoder, visual_token_ids, visual_tokens_of
from transformers_sgl.custom_generate import generate_with_small_model
from transformers_sgl.evaluation.cost import available_memory, flop_counter, measure_working_memory
from transformers_sgl.evaluation.timing import Timing, now_ms, ratio, spread, take_turns
from transformers_sgl.generation_config_sgl import PRESETS, average_retention, resolve_prune_layer
from transformers_sgl.hooks.attention_recorder import AttentionRecorder
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.tokens.early_exit import NEVER_EXIT
from transformers_sgl.tokens.importance_process import ImportanceProcessorList, RetentionRatioProcessor
from transformers_sgl.transformers_interface import attention_name, cache_of

__all__ = [
    "Pairing",
    "attention_matrix_bytes",
    "break_even",
    "cache_bytes",
    "measure_break_even",
    "measure_decode",
    "measure_drafts",
    "measure_end_to_end",
    "measure_growth",
    "measure_guidance",
    "measure_prefill",
    "power_law",
    "published_importance",
]

# Shares of questions that the small model answers alone.
EXIT_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# How much of the memory that is left an estimate may fill.
_USABLE = 0.8


@dataclass(frozen=True)
class Pairing:
    """Two models and the same question for both.

    Attributes:
        large: The large model.
        small: The small model.
        inputs: The large model's inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        small_inputs: The small model's; `None` where it reads the large one's.
    """

    large: PreTrainedModel
    small: PreTrainedModel
    inputs: dict[str, Tensor]
    small_inputs: dict[str, Tensor] | None = None

    @property
    def for_small(self) -> dict[str, Tensor]:
        """What the small model reads."""
        return self.inputs if self.small_inputs is None else self.small_inputs

    def guided(self, **settings: Any) -> Any:
        """Stock `generate` of the large model, guided by the small one.

        Args:
            **settings: Those of [`SGLGenerationConfig`].

        Returns:
            `Tensor` or [`SGLGenerateOutput`]: As from a pair's `generate`.
        """
        # Random models have no tokenizers; one object for both says that a token means the same to either.
        vocabulary = {"tokenizer": _TOKENIZER, "small_tokenizer": _TOKENIZER}
        own = {f"small_{name}": value for name, value in (self.small_inputs or {}).items()}
        arguments: dict[str, Any] = {**self.inputs, **own, **vocabulary, **settings}
        return generate_with_small_model(self.large, self.small, **arguments)


_TOKENIZER = object()


# ----------------------------------------------------------------------------------------------------------- guidance


def measure_guidance(
    small: PreTrainedModel,
    inputs: dict[str, Tensor],
    answer_tokens: int,
    rounds: int = 5,
    memory: bool = True,
) -> dict[str, Any]:
    """What the small model's guidance costs, beside its answer alone and beside the way it is collected elsewhere.

    That way is eager attention with `output_attentions=True`, which returns whole matrices to be summed; either the
    decoder alone is eager ("published"), or the vision encoder, too, as `set_attn_implementation("eager")` on the
    whole model has it ("published_whole").

    Args:
        small (`PreTrainedModel`): The small model.
        inputs (`dict`): Its inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        answer_tokens (`int`): How many tokens it writes.
        rounds (`int`, defaults to 5): How often each way is timed.
        memory (`bool`, defaults to `True`): Whether memory is measured, too.

    Returns:
        `dict`: The sizes; under `ways` for each its `time`, its `memory` and their ratios to plain, or why it was
        `skipped`; `published_over_capture`; `decoder_prefill`, the same times for the decoder's first pass alone,
        without vision encoder and answer; and under `importance` how far both ways' results are apart.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> from transformers_sgl.evaluation.benchmark import measure_guidance
        >>> from transformers_sgl.hub import embedded_pair

        >>> small = AutoModelForImageTextToText.from_pretrained(embedded_pair() / "small")
        >>> prompt = torch.tensor([[20] + 64 * [small.config.image_token_id] + [21, 22]])
        >>> inputs = {"input_ids": prompt, "pixel_values": torch.zeros(1, 3, 64, 64)}
        >>> found = measure_guidance(small, inputs, answer_tokens=2, rounds=1)
        >>> list(found["ways"]), found["importance"]["equal"]
        (['plain', 'capture', 'published', 'published_whole'], True)

        ```
    """
    found = _compare_guidance(small, inputs, answer_tokens, rounds, memory, whole=True)
    found["decoder_prefill"] = _compare_decoders(small, inputs, rounds, list(_there(found["ways"])))
    if "skipped" not in found["ways"]["published"]:
        found["importance"] = _compare_importance(small, inputs, answer_tokens)
    return found


def _ways(small: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int) -> dict[str, Callable[[], Any]]:
    """By name, the ways to get an answer: alone, watched, and with whole attention matrices."""
    tokens = visual_tokens_of(small.config, inputs)
    settings: dict[str, Any] = {"max_new_tokens": answer_tokens}

    def plain() -> None:
        small.generate(**inputs, **settings)

    def capture() -> Tensor:
        with AttentionRecorder(small, tokens) as recorder:
            small.generate(**inputs, **settings)
        return recorder.importance

    return {
        "plain": plain,
        "capture": capture,
        "published": lambda: published_importance(small, inputs, **settings),
        "published_whole": lambda: published_importance(small, inputs, whole=True, **settings),
    }


def _there(ways: dict[str, Any]) -> Iterator[str]:
    """Those that were not left out."""
    return (name for name, found in ways.items() if "skipped" not in found)


def _compare_guidance(
    small: PreTrainedModel,
    inputs: dict[str, Tensor],
    answer_tokens: int,
    rounds: int,
    memory: bool,
    whole: bool,
) -> dict[str, Any]:
    """Time and memory of an answer alone, watched, and in the published way where that fits."""
    tokens, device = visual_tokens_of(small.config, inputs), small.device
    ways = _ways(small, inputs, answer_tokens)
    if not whole:
        del ways["published_whole"]
    length = tokens.prompt_length + answer_tokens
    needed, left = attention_matrix_bytes(small, tokens.batch_size, length), available_memory(device)
    skipped: dict[str, Any] = {}
    if left is not None and needed > _USABLE * left:
        reason = f"the matrices of all layers take {_gib(needed)}, and {_gib(left)} are left"
        skipped = {name: {"skipped": reason} for name in ways if name.startswith("published")}
        ways = {name: way for name, way in ways.items() if name not in skipped}

    # What is measured for its memory is warm when it is timed.
    memories = {name: _memory(way, small) if memory else None for name, way in ways.items()}
    timings = take_turns(ways, rounds, device, warmup=0 if memory else 1)
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


def _compare_decoders(
    small: PreTrainedModel, inputs: dict[str, Tensor], rounds: int, names: Sequence[str]
) -> dict[str, Any]:
    """The time that the decoder's first pass takes in each way."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    ways = _ways(small, inputs, answer_tokens=1)

    def run(name: str) -> None:
        with _while_in_decoder(small, lambda: now_ms(small.device)) as total:
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


def _memory(way: Callable[[], Any], *models: PreTrainedModel) -> dict[str, int]:
    """The memory of models and of what they do, in bytes."""
    weights, working = (
        sum(model.get_memory_footprint() for model in models),
        measure_working_memory(way, models[0].device),
    )
    return {"weights_bytes": weights, "working_bytes": working, "peak_bytes": weights + working}


def attention_matrix_bytes(model: PreTrainedModel, batch_size: int, length: int) -> int:
    """How much memory the attention matrices of all layers take at once, as `output_attentions=True` keeps them.

    Args:
        model (`PreTrainedModel`): The model.
        batch_size (`int`): How many prompts it reads.
        length (`int`): How many tokens each has.

    Returns:
        `int`: The bytes, with the float32 copies that one layer's softmax makes.
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


def _compare_importance(small: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int) -> dict[str, Any]:
    """Whether both ways find the same, when the same is written."""
    tokens = visual_tokens_of(small.config, inputs)
    settings = {"max_new_tokens": answer_tokens, **_prescribed(small, inputs, answer_tokens)}
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


# ------------------------------------------------------------------------------------------------------------ prefill


def measure_prefill(
    large: PreTrainedModel, inputs: dict[str, Tensor], rounds: int = 5, seed: int = 0
) -> dict[str, Any]:
    """How much faster the large model's first token comes when it is pruned, and how much it could at the best.

    The best is the ratio of floating-point operations: a pass that is bound by nothing but arithmetic. They are those
    that PyTorch counts, without the half of a causal attention that nobody needs. Matrices of fewer rows are
    multiplied less efficiently, which no pruning can change; so the stock decoder is also timed on prompts that have
    only the kept tokens, and what these times make for the layers above and below `prune_layer` is the `kernel_ideal`.

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
    device = large.device
    presets, kept = _presets(large, inputs, seed)
    decoder_samples: dict[str, list[float]] = {name: [] for name in presets}

    def run(name: str) -> None:
        with presets[name](), _while_in_decoder(large, lambda: now_ms(device)) as total:
            large.generate(**inputs, max_new_tokens=1)
        decoder_samples[name].append(total[0])

    flops: dict[str, dict[str, float]] = {}
    for name, pruned in presets.items():
        counter = flop_counter(halves_causal=True)
        with pruned(), counter, _while_in_decoder(large, counter.get_total_flops) as total:
            large.generate(**inputs, max_new_tokens=1)
        flops[name] = {"whole": counter.get_total_flops(), "decoder": int(total[0])}

    text = decoder(large)
    batch_size, length = inputs["input_ids"].shape
    states = torch.zeros(batch_size, length, text.config.hidden_size, dtype=large.dtype, device=device)
    states.normal_(std=0.02, generator=torch.Generator(device).manual_seed(seed))
    num_dropped = {name: kept["unpruned"]["num_kept"] - found["num_kept"] for name, found in kept.items()}

    @torch.no_grad()
    def run_short(name: str) -> None:
        text(inputs_embeds=states[:, num_dropped[name] :], use_cache=True)

    ways: dict[str, Callable[[], Any]] = {name: partial(run, name) for name in presets}
    ways |= {f"short-{name}": partial(run_short, name) for name in presets}
    whole = take_turns(ways, rounds, device)
    parts = {
        "whole": whole,
        "decoder": {name: Timing(tuple(samples[-rounds:])) for name, samples in decoder_samples.items()},
    }
    settings: dict[str, Any] = {}
    for name in presets:
        settings[name] = dict(kept[name])
        below = kept[name].get("prune_layer", 0) / text.config.num_hidden_layers
        rounds_of = zip(whole["short-unpruned"].samples, whole[f"short-{name}"].samples, strict=True)
        kernels = [long / (below * long + (1 - below) * short) for long, short in rounds_of]
        for part, timings in parts.items():
            ideal = flops["unpruned"][part] / flops[name][part]
            speed_up = ratio(timings["unpruned"], timings[name])
            settings[name][part] = {
                "time": timings[name].to_dict(),
                "flops": flops[name][part],
                "ideal": ideal,
                "speed_up": speed_up,
                "reached": {end: value / ideal for end, value in speed_up.items()},
            }
        unpruned, pruned_ = parts["decoder"]["unpruned"].samples, parts["decoder"][name].samples
        settings[name]["decoder"]["kernel_ideal"] = spread(kernels)
        settings[name]["decoder"]["kernel_reached"] = spread(
            [whole_ / mine / best for whole_, mine, best in zip(unpruned, pruned_, kernels, strict=True)]
        )
    return {**_sizes(large, inputs), "settings": settings}


def _presets(
    large: PreTrainedModel, inputs: dict[str, Tensor], seed: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """By name, what makes the model pruned for a while, and what is kept; "unpruned" first."""
    tokens = visual_tokens_of(large.config, inputs)
    num_layers = large.config.get_text_config(decoder=True).num_hidden_layers
    pruned: dict[str, Callable[[], Any]] = {"unpruned": nullcontext}
    kept: dict[str, dict[str, Any]] = {"unpruned": {"num_kept": tokens.num_visual_tokens, "average_retention": 1.0}}
    for name, preset in PRESETS.items():
        keep_mask = _random_keep_mask(tokens, preset["retention_ratio"], seed)
        layer = resolve_prune_layer(preset["prune_layer"], num_layers)
        pruned[name] = partial(VisualTokenPruner, large, tokens.prompt_keep_mask(keep_mask), layer)
        kept[name] = {
            "num_kept": int(keep_mask[0].sum()),
            "retention_ratio": preset["retention_ratio"],
            "prune_layer": layer,
            "average_retention": average_retention(preset["retention_ratio"], layer, num_layers),
        }
    return pruned, kept


def _random_keep_mask(tokens: Any, retention_ratio: float, seed: int) -> Tensor:
    """Which visual tokens to keep, `(batch, num_visual_tokens)`: so many, whichever."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(tokens.valid.shape, generator=generator).to(tokens.valid.device)
    return ImportanceProcessorList([RetentionRatioProcessor(retention_ratio)]).keep_mask(tokens, importance)


@contextmanager
def _while_in_decoder(model: PreTrainedModel, read: Callable[[], float]) -> Iterator[list[float]]:
    """Adds up by how much something grows while the decoder runs: the clock, or a count of operations."""
    total, module = [0.0], decoder(model)

    def begin(*_: Any) -> None:
        total[0] -= read()

    def end(*_: Any) -> None:
        total[0] += read()

    handles = [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def _sizes(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Any]:
    tokens = visual_tokens_of(model.config, inputs)
    return {
        "num_visual_tokens": tokens.num_visual_tokens,
        "batch_size": tokens.batch_size,
        "prompt_length": tokens.prompt_length,
        "num_layers": model.config.get_text_config(decoder=True).num_hidden_layers,
        "attention": attention_name(decoder(model).config),
    }


# ------------------------------------------------------------------------------------------------------------- decode


def measure_decode(
    large: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int = 16, rounds: int = 5, seed: int = 0
) -> dict[str, Any]:
    """How long each further token takes, and how large the cache is behind the prompt, pruned and not.

    Args:
        large (`PreTrainedModel`): The large model.
        inputs (`dict`): Its inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        answer_tokens (`int`, defaults to 16): How many tokens it writes, 2 at least; the first is the prefill's.
        rounds (`int`, defaults to 5): How often each setting is timed.
        seed (`int`, defaults to 0): What the choice of kept tokens is drawn from.

    Returns:
        `dict`: For `"unpruned"` and each preset under `settings` the `time` of a token (the median of an answer's
        steps), `time_over_unpruned`, `cache_bytes` and `cache_over_unpruned`.
    """
    device, answer_tokens = large.device, max(2, answer_tokens)
    presets, kept = _presets(large, inputs, seed)
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
    return {**_sizes(large, inputs), "answer_tokens": answer_tokens, "settings": settings}


class _StepClock(StoppingCriteria):
    """Ends nothing, but notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []  # milliseconds
        self._device = device

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.times.append(now_ms(self._device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def cache_bytes(cache: Any) -> int:
    """How many bytes a cache's keys and values take.

    Args:
        cache (`Cache`): What a model returned; its layers may differ in length.

    Returns:
        `int`: The bytes of all layers.
    """
    return sum(each.numel() * each.element_size() for layer in cache.layers for each in (layer.keys, layer.values))


# ------------------------------------------------------------------------------------------------------------- drafts


def measure_drafts(
    large: PreTrainedModel,
    inputs: dict[str, Tensor],
    answer_lengths: Sequence[int] = (8, 64),
    acceptances: Sequence[float] = (0.0, 0.5, 0.8, 0.95, 1.0),
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """What a verified draft saves the large model, pruned at the preset "balanced".

    Args:
        large (`PreTrainedModel`): The large model.
        inputs (`dict`): Its inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        answer_lengths (sequence of `int`, defaults to 8 and 64): How many tokens are written.
        acceptances (sequence of `float`, defaults to 0, 0.5, 0.8, 0.95 and 1): How probably a draft's token is right.
        rounds (`int`, defaults to 5): How often each is timed.
        seed (`int`, defaults to 0): What answers and drafts are drawn from.

    Returns:
        `dict`: Under `rows`, for each length and acceptance: `num_forward_passes`, `passes_per_token`, `time` and
        `time_over_no_draft`; with an acceptance of `None` there is no draft.
    """
    presets, kept = _presets(large, inputs, seed)
    rows = []
    for length in answer_lengths:
        settings = {"max_new_tokens": length, **_prescribed(large, inputs, length, seed)}
        drafts: dict[float | None, Tensor | None] = {None: None}
        drafts |= {rate: _draft(large, inputs, length, rate, seed) for rate in acceptances}
        passes: dict[float | None, int] = {}

        def run(rate: float | None, drafts: Any = drafts, settings: Any = settings, passes: Any = passes) -> None:
            verifier = _verifier(large, drafts[rate])
            with presets["balanced"]():
                verifier.generate(**inputs, **settings)
            passes[rate] = verifier.num_forward_passes

        timings = take_turns({str(rate): partial(run, rate) for rate in drafts}, rounds, large.device)
        rows += [
            {
                "answer_tokens": length,
                "acceptance": rate,
                "num_forward_passes": passes[rate],
                "passes_per_token": passes[rate] / length,
                "time": timings[str(rate)].to_dict(),
                "time_over_no_draft": ratio(timings[str(rate)], timings[str(None)]),
            }
            for rate in drafts
        ]
    return {**_sizes(large, inputs), **kept["balanced"], "rows": rows}


def _verifier(large: PreTrainedModel, draft: Tensor | None) -> DraftVerifier:
    return DraftVerifier(large, draft, None if draft is None else torch.ones_like(draft).bool())


class _Prescribed(LogitsProcessor):
    """Lets a model write one answer and no other, `(batch, answer_tokens)`."""

    def __init__(self, answer: Tensor, prompt_length: int) -> None:
        self._answer, self._prompt_length = answer, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._answer[:, input_ids.shape[1] - self._prompt_length, None]
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def _prescribed(
    model: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int, seed: int = 0
) -> dict[str, Any]:
    """The argument of `generate` that makes the model write a random answer."""
    processor = _Prescribed(_answer(model, inputs, answer_tokens, seed), inputs["input_ids"].shape[1])
    return {"logits_processor": LogitsProcessorList([processor])}


def _answer(model: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int, seed: int) -> Tensor:
    """A random answer without special tokens, `(batch, answer_tokens)`."""
    plain = _plain_token_ids(model)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(plain), (len(inputs["input_ids"]), answer_tokens), generator=generator)
    return plain[chosen].to(inputs["input_ids"].device)


def _plain_token_ids(model: PreTrainedModel) -> Tensor:
    """All ids that are neither a placeholder nor something that ends or fills up an answer."""
    special = set(visual_token_ids(model.config))
    for name in ("eos_token_id", "pad_token_id"):
        ids = getattr(model.generation_config, name, None)
        special.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    size = model.config.get_text_config(decoder=True).vocab_size
    return torch.tensor([token for token in range(size) if token not in special])


def _draft(model: PreTrainedModel, inputs: dict[str, Tensor], length: int, acceptance: float, seed: int) -> Tensor:
    """The answer, with each token right with this probability and else another; `(batch, length)`."""
    answer, plain = _answer(model, inputs, length, seed), _plain_token_ids(model).to(inputs["input_ids"].device)
    generator = torch.Generator().manual_seed(seed + 1)
    wrong = torch.rand(answer.shape, generator=generator).to(answer.device) >= acceptance
    other = plain[(torch.searchsorted(plain, answer) + 1) % len(plain)]
    return torch.where(wrong, other, answer)


# --------------------------------------------------------------------------------------------------------- end to end


def measure_end_to_end(
    pairing: Pairing, answer_tokens: int = 16, rounds: int = 5, memory: bool = True
) -> dict[str, Any]:
    """Both models against the large one alone, by preset, and by the share of questions that exit early.

    Drafts are not verified here: random models never agree. At batch size 1 the expected time is linear in the share
    of exits: those cost the small model and its scoring, the others that and the large model as well.

    Args:
        pairing ([`Pairing`]): The models and the question.
        answer_tokens (`int`, defaults to 16): How many tokens either model writes.
        rounds (`int`, defaults to 5): How often each way is timed.
        memory (`bool`, defaults to `True`): Whether memory is measured, too.

    Returns:
        `dict`: The time of `large` alone, of guidance by preset (`guided`), scored (`scored`), and of an `exit`, each
        with its ratio to large alone; and by preset the ratio at each share of exits (`by_exit_share`) and the share
        from which on the pair is faster (`break_even_share`: 0 if always, `None` if never).
    """
    large, device = pairing.large, pairing.large.device
    shared = {"max_new_tokens": answer_tokens, "verify_draft": False}

    def run(**settings: Any) -> None:
        pairing.guided(**shared, **settings)

    ways: dict[str, Callable[[], Any]] = {
        "large": partial(large.generate, **pairing.inputs, max_new_tokens=answer_tokens),
        "exit": partial(run, early_exit_threshold=0.0),
    }
    for name, preset in PRESETS.items():
        ways[f"guided-{name}"] = partial(run, score_draft=False, early_exit_threshold=NEVER_EXIT, **preset)
        ways[f"scored-{name}"] = partial(
            run, score_draft=True, return_dict_in_generate=True, early_exit_threshold=NEVER_EXIT, **preset
        )
    memories = {
        name: _memory(way, large, *([] if name == "large" else [pairing.small]))
        for name, way in ways.items()
        if memory and not name.startswith("scored")
    }
    timings = take_turns(ways, rounds, device)

    def described(name: str) -> dict[str, Any]:
        return {
            "time": timings[name].to_dict(),
            "time_over_large": ratio(timings[name], timings["large"]),
            "memory": memories.get(name),
        }

    presets = {}
    for name in PRESETS:
        scored, exits = timings[f"scored-{name}"], timings["exit"]
        rounds_of = list(zip(scored.samples, exits.samples, timings["large"].samples, strict=True))
        presets[name] = {
            **_kept_by_preset(large, name),
            "guided": described(f"guided-{name}"),
            "scored": described(f"scored-{name}"),
            "by_exit_share": {
                f"{share:g}": spread([(share * out + (1 - share) * on) / alone for on, out, alone in rounds_of])
                for share in EXIT_SHARES
            },
            "break_even_share": _break_even_share(ratio(scored, timings["large"])["median"], described("exit")),
        }
    return {
        **_sizes(large, pairing.inputs),
        "answer_tokens": answer_tokens,
        "large": described("large"),
        "exit": described("exit"),
        "presets": presets,
    }


def _kept_by_preset(model: PreTrainedModel, name: str) -> dict[str, Any]:
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    layer, kept = resolve_prune_layer(PRESETS[name]["prune_layer"], num_layers), PRESETS[name]["retention_ratio"]
    return {
        "retention_ratio": kept,
        "prune_layer": layer,
        "average_retention": average_retention(kept, layer, num_layers),
    }


def _break_even_share(scored: float, exits: dict[str, Any]) -> float | None:
    """The share of exits at which both ways take the same time; 0 if the pair is always faster, `None` if never."""
    out = exits["time_over_large"]["median"]
    if scored <= 1:
        return 0.0
    return None if out >= 1 else (scored - 1) / (scored - out)


# --------------------------------------------------------------------------------------------------------- break-even


def measure_break_even(
    points: Iterable[tuple[float, Pairing, int]],
    acceptances: Sequence[float | None] = (None,),
    rounds: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Both models against the large one alone, at the preset "balanced", while one thing grows.

    Args:
        points (iterable of `float`, [`Pairing`] and `int`): What grows, the models and the question, and the length of
            the answer; each is made when it is its turn and forgotten after.
        acceptances (sequence of `float` or `None`, defaults to no drafts): How probably a draft's token is right;
            `None` is without drafts.
        rounds (`int`, defaults to 3): How often each way is timed.
        seed (`int`, defaults to 0): What answers and drafts are drawn from.

    Returns:
        `dict`: Under `series`, for each acceptance, the `points` with their `time_over_large`, and where the pair
        starts or stops to pay (`break_even`, see [`break_even`]).
    """
    found: dict[float | None, list[dict[str, Any]]] = {rate: [] for rate in acceptances}
    for value, pairing, answer_tokens in points:
        settings = {
            "max_new_tokens": answer_tokens,
            **_prescribed(pairing.large, pairing.inputs, answer_tokens, seed),
        }
        drafts = {
            rate: None if rate is None else _draft(pairing.large, pairing.inputs, answer_tokens, rate, seed)
            for rate in acceptances
        }
        ways: dict[str, Callable[[], Any]] = {
            "large": partial(pairing.large.generate, **pairing.inputs, **settings),
            **{str(rate): partial(_guided_by_hand, pairing, drafts[rate], settings) for rate in acceptances},
        }
        timings = take_turns(ways, rounds, pairing.large.device)
        for rate in acceptances:
            found[rate].append(
                {
                    "value": value,
                    "num_visual_tokens": visual_tokens_of(pairing.large.config, pairing.inputs).num_visual_tokens,
                    "answer_tokens": answer_tokens,
                    "time_over_large": ratio(timings[str(rate)], timings["large"]),
                    "large": timings["large"].to_dict(),
                    "pair": timings[str(rate)].to_dict(),
                }
            )
        del pairing, settings, drafts, ways  # the next point's models may need the room of these
    series = []
    for rate, measured in found.items():
        ratios = [point["time_over_large"]["median"] for point in measured]
        crossing = break_even([point["value"] for point in measured], ratios) if measured else None
        series.append({"acceptance": rate, "points": measured, "break_even": crossing})
    return {"series": series}


def _guided_by_hand(pairing: Pairing, draft: Tensor | None, settings: dict[str, Any]) -> None:
    """One guided answer with a draft that is not the small model's, whose own would never be right."""
    preset, small, large = PRESETS["balanced"], pairing.small, pairing.large
    seen = visual_tokens_of(small.config, pairing.for_small)
    with AttentionRecorder(small, seen) as recorder:
        small.generate(**pairing.for_small, max_new_tokens=settings["max_new_tokens"])
    tokens = visual_tokens_of(large.config, pairing.inputs)
    processors = ImportanceProcessorList([RetentionRatioProcessor(preset["retention_ratio"])])
    kept = processors.keep_mask(tokens, recorder.importance)
    with VisualTokenPruner(large, tokens.prompt_keep_mask(kept), preset["prune_layer"]):
        _verifier(large, draft).generate(**pairing.inputs, **settings)


def break_even(values: Sequence[float], ratios: Sequence[float]) -> dict[str, Any]:
    """Where a measured ratio crosses 1, on the straight line between its neighbours.

    Args:
        values (sequence of `float`): What grows, in ascending order.
        ratios (sequence of `float`): Time of the pair over time of the large model alone.

    Returns:
        `dict`: `pays` is `"always"` or `"never"` within what was measured, or `"above"` or `"below"` the value `at`;
        where it crosses several times, the last one.

    Raises:
        ValueError: If there are not as many ratios as values, or none.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.benchmark import break_even

        >>> break_even([256, 768, 1792], [1.5, 1.0, 0.8])
        {'pays': 'above', 'at': 768.0}
        >>> break_even([1, 16], [0.7, 0.9])
        {'pays': 'always', 'at': None}

        ```
    """
    if not values or len(values) != len(ratios):
        raise ValueError(f"There are {len(values)} values and {len(ratios)} ratios: pass as many, and at least one.")
    at = None
    neighbours = list(zip(values, ratios, strict=True))
    for (left, before), (right, after) in pairwise(neighbours):
        if (before < 1) != (after < 1):
            at = float(left + (right - left) * (1 - before) / (after - before))
    if at is None:
        return {"pays": "always" if ratios[-1] < 1 else "never", "at": None}
    return {"pays": "above" if ratios[-1] < 1 else "below", "at": at}


# ------------------------------------------------------------------------------------------------------------- growth


def measure_growth(
    points: Iterable[tuple[PreTrainedModel, float, dict[str, Tensor], int]], rounds: int = 3, memory: bool = True
) -> dict[str, Any]:
    """What guidance costs while prompts, batches or answers grow, and by which power of what grows.

    Args:
        points (iterable): The small model, what grows, the inputs and the length of the answer; each is made when it
            is its turn and forgotten after.
        rounds (`int`, defaults to 3): How often each way is timed.
        memory (`bool`, defaults to `True`): Whether memory is measured, too.

    Returns:
        `dict`: Under `points` what [`measure_guidance`] finds at each; under `power_laws`, by way, the exponents of
        `time`, `working_memory` and `extra_memory` (over plain), each with the number of points.
    """
    measured = [
        {"value": value, **_compare_guidance(small, inputs, answer_tokens, rounds, memory, whole=False)}
        for small, value, inputs, answer_tokens in points
    ]
    laws: dict[str, dict[str, Any]] = {}
    for name in ("plain", "capture", "published"):
        there = [point for point in measured if name in _there(point["ways"])]
        values = [point["value"] for point in there]
        costs = [point["ways"][name] for point in there]
        laws[name] = {
            "time": power_law(values, [cost["time"]["median_ms"] for cost in costs]),
            "working_memory": power_law(values, [(cost["memory"] or {}).get("working_bytes", 0) for cost in costs]),
            "extra_memory": power_law(values, [cost["extra_memory_bytes"] or 0 for cost in costs]),
        }
    return {"points": measured, "power_laws": laws}


def power_law(values: Sequence[float], costs: Sequence[float]) -> dict[str, Any] | None:
    """The exponent of the power law that fits best: a line through the logarithms, by least squares.

    Args:
        values (sequence of `float`): What grows.
        costs (sequence of `float`): What it costs; those that are not above 0 are left out.

    Returns:
        `dict`: `exponent` and `num_points`; `None` with fewer than two points.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.benchmark import power_law

        >>> law = power_law([1, 2, 4], [3, 12, 48])
        >>> round(law["exponent"], 6), law["num_points"]
        (2.0, 3)

        ```
    """
    pairs = [(value, cost) for value, cost in zip(values, costs, strict=True) if value > 0 and cost > 0]
    if len({value for value, _ in pairs}) < 2:
        return None
    logs = np.log(np.array(pairs, dtype=float))
    exponent, _ = np.polyfit(logs[:, 0], logs[:, 1], deg=1)
    return {"exponent": float(exponent), "num_points": len(pairs)}


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
