"""The story of one `generate` call.

Floor 3. Read [`generate`] from top to bottom: it is the method. Each step is one call into the file that knows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from transformers_sgl.architectures import check_supported, decoder_layers, visual_token_ids
from transformers_sgl.generation_config_sgl import SGLGenerationConfig, resolve_prune_layer
from transformers_sgl.guidance import guide
from transformers_sgl.importance_process import (
    ImportanceProcessor,
    ImportanceProcessorList,
    RetentionRatioProcessor,
)
from transformers_sgl.visual_token_pruner import VisualTokenPruner
from transformers_sgl.visual_tokens import VisualTokens

__all__ = ["SGLGenerateOutput", "generate"]

_SMALL_PREFIX = "small_"
# Plain inputs that are an object of one model.
_LARGE_ONLY = ("past_key_values",)
# Caches whose layers may differ in length.
_PRUNABLE_CACHES = (None, "dynamic", "offloaded")
# What `generate` writes at the most where nobody said, as in transformers.
_DEFAULT_MAX_NEW_TOKENS = 20


@dataclass
class SGLGenerateOutput(ModelOutput):
    """What guided generation returns with `return_dict_in_generate=True`.

    The fields are the same whatever the settings; `None` where a part did not run or was not asked for.

    Attributes:
        sequences (`Tensor` of shape `(batch, prompt_length + answer_length)`): Prompts and answers in the large
            model's vocabulary, as from any `generate`.
        importance (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): The attention that each visual token
            received in the small model, in float32.
        keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for the visual tokens that the
            large model kept.
        num_visual_tokens (`Tensor` of shape `(batch,)`, *optional*): How many visual tokens each prompt has.
        prune_layer (`int`, *optional*): The first decoder layer of the large model that saw only the kept tokens.
        draft_sequences (`Tensor` of shape `(batch, draft_length)`, *optional*): The small model's own answers, in the
            small model's vocabulary.
        timings (`dict`, *optional*): Wall-clock milliseconds: `guidance_ms` (0 where the small model did not run),
            `large_ms` and `total_ms`.
        scores (`tuple` of `Tensor`, *optional*): This field and those below: as the large model's `generate` returns
            them.
        logits (`tuple` of `Tensor`, *optional*): As above.
        attentions (`tuple`, *optional*): As above; pruned layers have smaller matrices.
        hidden_states (`tuple`, *optional*): As above; pruned layers have shorter states.
        past_key_values (`Cache`, *optional*): As above; pruned layers have shorter caches.
        sequences_scores (`Tensor`, *optional*): As above, with beams.
        beam_indices (`Tensor`, *optional*): As above, with beams.
    """

    sequences: Tensor | None = None
    importance: Tensor | None = None
    keep_mask: Tensor | None = None
    num_visual_tokens: Tensor | None = None
    prune_layer: int | None = None
    draft_sequences: Tensor | None = None
    timings: dict[str, float] | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None
    hidden_states: tuple[Any, ...] | None = None
    past_key_values: Cache | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None


def generate(
    large: PreTrainedModel,
    small: PreTrainedModel,
    inputs: dict[str, Any],
    generation_config: SGLGenerationConfig,
    importance_processor: ImportanceProcessor | Iterable[ImportanceProcessor] | None = None,
    **generate_kwargs: Any,
) -> SGLGenerateOutput | Tensor:
    """Lets the large model write, guided by the small one.

    Args:
        large (`PreTrainedModel`): The large model.
        small (`PreTrainedModel`): The small model.
        inputs (`dict`): The large model's inputs, with `input_ids` of shape `(batch, prompt_length)`; `small_*` keys
            replace or extend them for the small model.
        generation_config (`SGLGenerationConfig`): The resolved settings.
        importance_processor ([`ImportanceProcessor`] or several, *optional*): The user's own; they run before the
            fixed ratio of `generation_config.retention_ratio`.
        **generate_kwargs: Arguments of the large model's `generate`: `streamer`, `logits_processor`, ...

    Returns:
        [`SGLGenerateOutput`] or `Tensor` of shape `(batch, prompt_length + answer_length)`: As
        `return_dict_in_generate` says.

    Raises:
        ValueError: If inputs or settings cannot be used, with cause and cure; the models stay as they were.
    """
    clock = _Clock(large.device, small.device)
    large_inputs, small_inputs = _split(inputs)
    settings = {"generation_config": generation_config, **generate_kwargs}
    found: dict[str, Any] = {}

    # 1. Find the visual tokens. Without any, or where all are kept, the large model runs alone and untouched.
    prune_layer = resolve_prune_layer(generation_config.prune_layer, len(decoder_layers(large)))
    processors = _processor_list(importance_processor, generation_config.retention_ratio)
    visual_tokens = _find_visual_tokens(large, large_inputs)
    if visual_tokens is not None:
        found["num_visual_tokens"] = visual_tokens.counts
    if not processors or (visual_tokens is not None and visual_tokens.num_visual_tokens == 0):
        with _one_at_a_time(large):
            return _result(large.generate(**large_inputs, **settings), found, clock)

    # 2. Refuse what cannot be pruned, before anything has run.
    check_supported(small.config)
    _check_prunable(large_inputs, generation_config, generate_kwargs)
    prompts = large_inputs["input_ids"]
    large_inputs, small_inputs = _left_padded(large_inputs), _left_padded(small_inputs)
    visual_tokens = VisualTokens.from_input_ids(
        large_inputs["input_ids"], visual_token_ids(large.config), large_inputs.get("attention_mask")
    )

    # 3. The small model answers first; where it looks ranks the visual tokens.
    max_new_tokens = _max_new_tokens(generation_config, visual_tokens.prompt_length)
    with _one_at_a_time(small):
        guidance = guide(small, small_inputs, visual_tokens, generation_config, max_new_tokens)
    found["prune_layer"] = prune_layer
    found["draft_sequences"] = guidance.draft_sequences
    importance = found["importance"] = guidance.importance.to(visual_tokens.valid.device)
    clock.lap("guidance_ms")

    # 4. The ranking becomes a choice.
    keep_mask = found["keep_mask"] = processors.keep_mask(visual_tokens, importance)

    # 5. The large model reads everything, keeps what matters, and writes.
    prompt_keep_mask = visual_tokens.prompt_keep_mask(keep_mask)
    with _one_at_a_time(large), VisualTokenPruner(large, prompt_keep_mask, prune_layer):
        output = large.generate(**large_inputs, **settings)
    return _result(output, found, clock, prompts)


# The hooks of a call sit on the models, so threads that share a model take turns.
_LOCKS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


def _one_at_a_time(model: PreTrainedModel) -> Any:
    """The lock of a model, to be held while it runs."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, RLock())


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of the large model and of the small one: plain keys go to both, `small_*` keys to the small one."""
    plain = {name: value for name, value in inputs.items() if not name.startswith(_SMALL_PREFIX)}
    own = {name.removeprefix(_SMALL_PREFIX): value for name, value in inputs.items() if name not in plain}
    return plain, {**{name: value for name, value in plain.items() if name not in _LARGE_ONLY}, **own}


def _find_visual_tokens(model: PreTrainedModel, inputs: dict[str, Any]) -> VisualTokens | None:
    """The visual tokens of a model's prompts; `None` where only a part of them, or only embeddings, were passed."""
    input_ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if input_ids is None or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        return None
    return VisualTokens.from_input_ids(input_ids, visual_token_ids(model.config), attention_mask)


def _processor_list(
    own: ImportanceProcessor | Iterable[ImportanceProcessor] | None, retention_ratio: float
) -> ImportanceProcessorList:
    """The user's processors, then the fixed ratio; empty if nothing would ever be dropped."""
    processors = ImportanceProcessorList(own if isinstance(own, Iterable) else [] if own is None else [own])
    for processor in processors:
        if not callable(processor):
            raise ValueError(
                f"`importance_processor` is or holds {processor!r}: pass an ImportanceProcessor, or a list of them."
            )
    if retention_ratio < 1:
        processors.append(RetentionRatioProcessor(retention_ratio))
    return processors


def _check_prunable(
    inputs: dict[str, Any], generation_config: SGLGenerationConfig, generate_kwargs: dict[str, Any]
) -> None:
    """Raises if a setting of stock `generate` does not go together with pruning."""
    cure = "or set `retention_ratio=1.0` to run the large model unpruned."
    cache = inputs.get("past_key_values")
    if inputs.get("input_ids") is None:
        raise ValueError(f"Pruning finds visual tokens by their ids, but there are no `input_ids`: pass them, {cure}")
    if generation_config.cache_implementation not in _PRUNABLE_CACHES or (cache is not None and cache.is_compileable):
        raise ValueError(
            "Pruning needs a cache whose layers may differ in length, which a "
            f"{generation_config.cache_implementation or 'static'} cache cannot do: leave `cache_implementation` "
            f"unset, {cure}"
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"Pruning starts with the prompt, but `past_key_values` already holds {cache.get_seq_length()} tokens: "
            "pass the whole conversation without a cache."
        )
    assisted = generate_kwargs.get("assistant_model") is not None or generation_config.prompt_lookup_num_tokens
    guided = (
        generation_config.guidance_scale not in (None, 1) or generate_kwargs.get("negative_prompt_ids") is not None
    )
    for name, is_set in (
        ("assisted decoding", assisted),
        ("prefill_chunk_size", generation_config.prefill_chunk_size),
        ("classifier-free guidance", guided),
    ):
        if is_set:
            raise ValueError(f"Pruning does not work together with {name}: leave it out, {cure}")


def _left_padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with all padding on the left, where `generate` needs it to continue a prompt."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != inputs["input_ids"].shape or bool(mask[:, -1].all()):
        return inputs
    order = torch.argsort(mask.long(), dim=1, stable=True)
    per_token = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == mask.shape]
    return {**inputs, **{name: inputs[name].gather(1, order.to(inputs[name].device)) for name in per_token}}


def _max_new_tokens(generation_config: SGLGenerationConfig, prompt_length: int) -> int:
    """The most tokens that the large model may write under these settings."""
    if generation_config.max_new_tokens is not None:
        return generation_config.max_new_tokens
    if generation_config.max_length is not None:
        return max(1, generation_config.max_length - prompt_length)
    return _DEFAULT_MAX_NEW_TOKENS


def _result(
    output: ModelOutput | Tensor, found: dict[str, Any], clock: _Clock, prompts: Tensor | None = None
) -> SGLGenerateOutput | Tensor:
    """What the large model returned, with the prompts as they were passed and what was found on the way."""
    clock.lap("large_ms")
    sequences = output if isinstance(output, Tensor) else output["sequences"]
    if prompts is not None:
        repeats = sequences.shape[0] // prompts.shape[0]
        sequences = sequences.clone()
        sequences[:, : prompts.shape[1]] = prompts.repeat_interleave(repeats, dim=0)
    if isinstance(output, Tensor):
        return sequences
    passed_on = {field.name: output[field.name] for field in fields(SGLGenerateOutput) if field.name in output}
    return SGLGenerateOutput(**{**passed_on, **found, "sequences": sequences, "timings": clock.timings})


class _Clock:
    """Wall-clock milliseconds of the steps, with the device's work waited for."""

    def __init__(self, *devices: torch.device) -> None:
        self._devices = {device for device in devices if device.type == "cuda"}
        self._started = self._last = self._now()
        self._laps: dict[str, float] = {"guidance_ms": 0.0}

    def lap(self, name: str) -> None:
        """Names the time since the last lap."""
        now = self._now()
        self._laps[name] = (now - self._last) * 1000
        self._last = now

    @property
    def timings(self) -> dict[str, float]:
        """The laps and their total."""
        return {**self._laps, "total_ms": (self._last - self._started) * 1000}

    def _now(self) -> float:
        for device in self._devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()
