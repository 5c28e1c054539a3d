"""The story of one `generate` call.

Read [`generate`] from top to bottom: it is the method. Each step is one call into the file that knows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from inspect import signature
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from transformers_sgl.architectures import check_prunable, check_supported, decoder_layers, visual_tokens_of
from transformers_sgl.batching import (
    WholeBatchStreamer,
    left_padded,
    merge_answers,
    pad_rows,
    row_owners,
    select_samples,
)
from transformers_sgl.generation_config_sgl import SGLGenerationConfig, resolve_prune_layer
from transformers_sgl.guidance import Guidance, guide
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.tokens.early_exit import exits_early
from transformers_sgl.tokens.importance_process import (
    ImportanceProcessor,
    ImportanceProcessorList,
)
from transformers_sgl.tokens.importance_transfer import ImportanceTransfer, split_boxes
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.tokens.vocabulary import Vocabularies
from transformers_sgl.transformers_interface import (
    CACHE_NAMES,
    CacheUnderBothNames,
    cache_of,
    with_installed_cache_name,
)
from transformers_sgl.versions import names_versions

__all__ = ["SGLGenerateOutput", "generate", "read_arguments"]

_SMALL_PREFIX = "small_"
# Arguments of stock `generate` that are neither settings nor model inputs.
_GENERATE_ARGUMENTS = {*signature(GenerationMixin.generate).parameters, "tokenizer", "assistant_tokenizer"}
_GENERATE_ARGUMENTS -= {"self", "inputs", "generation_config", "kwargs"}
# Plain inputs that are an object of one model.
_LARGE_ONLY = CACHE_NAMES
# Caches whose layers may differ in length, and that can be cut back; "hybrid", as older checkpoints have it, means
# nothing to transformers any more.
_DYNAMIC_CACHES = (None, "dynamic", "offloaded", "hybrid")
# What `generate` writes at the most where nobody said, as in transformers.
_DEFAULT_MAX_NEW_TOKENS = 20
# Settings that shape an answer, and so the draft, too: in any vocabulary, and where both models share one.
_SHAPING_SETTINGS = ("max_time", "no_repeat_ngram_size", "repetition_penalty")
_SHAPING_SETTINGS_BY_ID = ("bad_words_ids", "begin_suppress_tokens", "sequence_bias", "suppress_tokens")
_SHAPING_ARGUMENTS = ("logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria")


@dataclass
class SGLGenerateOutput(CacheUnderBothNames, GenerateDecoderOnlyOutput):
    """What guided generation returns with `return_dict_in_generate=True`: stock `generate`'s output, and more.

    The fields are the same whatever the settings; `None` where a part did not run or was not asked for.

    Attributes:
        sequences (`Tensor` of shape `(batch, prompt_length + answer_length)`): Prompts and answers in the large
            model's vocabulary, as from any `generate`.
        importance (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): The attention that each visual token
            received in the small model, in float32; handed over to the large model's visual tokens.
        importance_transfer (`str`, *optional*): How it was handed over: `"identity"`, token by token, or
            `"resampling"`, through image coordinates, where the models cut the images differently.
        keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for the visual tokens that the
            large model kept: none of a sample that exited early.
        num_visual_tokens (`Tensor` of shape `(batch,)`, *optional*): How many visual tokens each prompt has.
        prune_layer (`int`, *optional*): The first decoder layer of the large model that saw only the kept tokens.
        draft_sequences (`Tensor` of shape `(batch, draft_length)`, *optional*): The small model's own answers, in the
            small model's vocabulary.
        draft_complete (`Tensor` of shape `(batch,)`, *optional*): `True` where such an answer is whole; one that was
            cut off, or is too short, never exits early.
        exited_early (`Tensor` of shape `(batch,)`, *optional*): `True` where the small model's answer was returned and
            the large model not called.
        confidence (`Tensor` of shape `(batch,)`, *optional*): How sure the small model was of its answer.
        consistency (`Tensor` of shape `(batch,)`, *optional*): How probable its answer stays when it sees only the
            most important visual tokens.
        decision_score (`Tensor` of shape `(batch,)`, *optional*): The mean of both, to which `early_exit_threshold` is
            compared.
        num_draft_tokens_accepted (`Tensor` of shape `(batch,)`, *optional*): How many tokens of each draft the large
            model confirmed.
        num_large_forward_passes (`int`, *optional*): How often the large model ran, its prefill included.
        timings (`dict`, *optional*): Wall-clock milliseconds: `guidance_ms` (0 where the small model did not run),
            `large_ms` (0 where the large one did not) and `total_ms`.
        scores (`tuple` of `Tensor`, *optional*): This field and those below: as the large model's `generate` returns
            them, for the samples that it was called for.
        logits (`tuple` of `Tensor`, *optional*): As above.
        attentions (`tuple`, *optional*): As above; pruned layers have smaller matrices.
        hidden_states (`tuple`, *optional*): As above; pruned layers have shorter states.
        cache (`Cache`, *optional*): As above; pruned layers have shorter caches. The field has the name that the
            installed transformers gives it; the name on the other side of the renaming in 5.24 can be read, too.
        sequences_scores (`Tensor`, *optional*): As above, with beams.
        beam_indices (`Tensor`, *optional*): As above, with beams.
    """

    importance: Tensor | None = None
    importance_transfer: str | None = None
    keep_mask: Tensor | None = None
    num_visual_tokens: Tensor | None = None
    prune_layer: int | None = None
    draft_sequences: Tensor | None = None
    draft_complete: Tensor | None = None
    exited_early: Tensor | None = None
    confidence: Tensor | None = None
    consistency: Tensor | None = None
    decision_score: Tensor | None = None
    num_draft_tokens_accepted: Tensor | None = None
    num_large_forward_passes: int | None = None
    timings: dict[str, float] | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None


@names_versions()
def generate(
    large: PreTrainedModel,
    small: PreTrainedModel,
    inputs: dict[str, Any],
    generation_config: SGLGenerationConfig,
    vocabularies: Vocabularies,
    importance_processor: ImportanceProcessor | Iterable[ImportanceProcessor] | None = None,
    **generate_kwargs: Any,
) -> SGLGenerateOutput | Tensor:
    """Lets the small model answer first, and the large one where that is not enough, guided by the small one.

    Args:
        large (`PreTrainedModel`): The large model.
        small (`PreTrainedModel`): The small model.
        inputs (`dict`): The large model's inputs, with `input_ids` of shape `(batch, prompt_length)`; `small_*` keys
            replace or extend them for the small model. Where the models cut images differently, also
            `visual_token_boxes` of shape `(batch, num_visual_tokens, 5)` and, with the small model's own number of
            tokens, `small_visual_token_boxes`: for each visual token the number of the image within its sample, and
            left, top, right and bottom as fractions of that image; -1 in the places that only fill up. With these,
            plain tensors are the large model's alone.
        generation_config (`SGLGenerationConfig`): The resolved settings.
        vocabularies (`Vocabularies`): Whether the small model's tokens mean the same to the large one.
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
    inputs, boxes = split_boxes(inputs)
    large_inputs, small_inputs = _split(inputs, shares_tensors=boxes is None)
    generate_kwargs["generation_config"] = generation_config
    # What the large model's `generate` makes of it: where nothing is set, its checkpoint's own settings hold.
    settings = generation_config.resolved(large.generation_config)
    found: dict[str, Any] = {}

    # 1. Find the visual tokens. Without any, or where nothing asks for the small model, the large one runs alone.
    prune_layer = resolve_prune_layer(settings.prune_layer, len(decoder_layers(large)))
    processors = _processor_list(importance_processor, settings)
    may_exit = settings.early_exit_threshold is not None and settings.early_exit_threshold <= 1
    visual_tokens = _find_visual_tokens(large, large_inputs)
    if visual_tokens is not None:
        found["num_visual_tokens"] = visual_tokens.counts
    is_guided = bool(processors) or may_exit or _can_use_draft(large_inputs, settings, generate_kwargs, vocabularies)
    if not is_guided or (visual_tokens is not None and visual_tokens.num_visual_tokens == 0):
        with _one_at_a_time(large):
            # Of the class, here and below: a repository's `custom_generate` lies on the model, and may have called us.
            output = type(large).generate(large, **large_inputs, **generate_kwargs)
        clock.lap("large_ms")
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        return _result(sequences, output, found, settings, clock)

    # 2. Refuse what cannot be done, before anything has run.
    check_supported(small.config)
    _check_guidable(large_inputs)
    if processors:
        check_prunable(large.config, prune_layer)
        _check_prunable(large_inputs, settings, generate_kwargs)
    if may_exit:
        _check_exits(settings, generate_kwargs, vocabularies)
    prompts = large_inputs["input_ids"]
    large_inputs, visual_tokens = _prepared(large, large_inputs)
    small_inputs, small_tokens = _prepared(small, small_inputs)
    if processors:
        transfer = ImportanceTransfer.between(large.config, small.config, visual_tokens, small_tokens, boxes)
        found["importance_transfer"] = transfer.kind

    # 3. The small model answers first: a draft, how far to trust it, and where it looked.
    limits = _length_limits(settings, prompts.shape[1])
    draft_settings = _draft_settings(settings, small, limits, vocabularies, generate_kwargs, may_exit)
    with _one_at_a_time(small):
        guidance = guide(
            small,
            small_inputs,
            small_tokens,
            settings,
            ranks=bool(processors),
            scores=may_exit
            or bool(settings.return_dict_in_generate if settings.score_draft is None else settings.score_draft),
            **draft_settings,
        ).to(prompts.device)
    if guidance.importance is not None:
        guidance = replace(guidance, importance=transfer(guidance.importance))
    for name in ("draft_sequences", "importance", "confidence", "consistency", "decision_score"):
        found[name] = getattr(guidance, name)
    clock.lap("guidance_ms")

    # 4. Where the draft can be trusted, it is the answer.
    draft, draft_mask = _in_large_vocabulary(guidance, settings, vocabularies)
    complete = found["draft_complete"] = _is_complete(guidance.ended, draft_mask.sum(dim=1), limits)
    exits = torch.zeros_like(complete)
    if may_exit and guidance.decision_score is not None and settings.early_exit_threshold is not None:
        exits = exits_early(guidance.decision_score, settings.early_exit_threshold, complete)
    found["exited_early"] = exits
    early = draft[:, : int((draft_mask.sum(dim=1) * exits).max())]
    streamer = generate_kwargs.get("streamer")
    if streamer is not None and exits.any():
        streamer = WholeBatchStreamer(streamer, prompts, early, exits, _pad_token_id(settings))
        generate_kwargs["streamer"] = streamer

    # 5. The other samples go on as a smaller batch. The ranking becomes a choice of tokens, and the large model reads
    # the prompt and the draft, keeps what matters, and writes.
    rest, output, late = ~exits, None, None
    verifier = DraftVerifier(large)
    if rest.any():
        if exits.any():
            large_inputs = select_samples(large_inputs, rest, _row_owners(large, large_inputs))
            large_inputs, visual_tokens = _prepared(large, large_inputs)
            generate_kwargs["generation_config"] = _counting_new_tokens(generation_config, limits)
        if settings.verify_draft is not False and vocabularies.shared is not None:
            verifier = DraftVerifier(large, draft[rest], draft_mask[rest])
        with ExitStack() as stack:
            stack.enter_context(_one_at_a_time(large))
            if guidance.importance is not None and visual_tokens.num_visual_tokens > 0:
                importance = guidance.importance[rest, : visual_tokens.num_visual_tokens]
                keep_mask = processors.keep_mask(visual_tokens, importance)
                stack.enter_context(VisualTokenPruner(large, visual_tokens.prompt_keep_mask(keep_mask), prune_layer))
                found["prune_layer"] = prune_layer
                found["keep_mask"] = _scatter(keep_mask, rest, guidance.importance.shape[1])
            output = verifier.generate(**large_inputs, **generate_kwargs)
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        late = sequences[:, large_inputs["input_ids"].shape[1] :]
        clock.lap("large_ms")
    elif streamer is not None:
        streamer.end()
    found["num_large_forward_passes"] = verifier.num_forward_passes
    if verifier.num_accepted is not None:
        found["num_draft_tokens_accepted"] = torch.zeros_like(rest, dtype=torch.long)
        found["num_draft_tokens_accepted"][rest] = verifier.num_accepted.to(rest.device)

    # 6. The whole batch again, with the prompts as they were passed.
    answers = merge_answers(early, late, exits, _pad_token_id(settings))
    prompts = prompts.repeat_interleave(answers.shape[0] // prompts.shape[0], dim=0)
    return _result(torch.cat([prompts, answers], dim=1), output, found, settings, clock)


def read_arguments(
    inputs: Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[SGLGenerationConfig, dict[str, Any], dict[str, Any]]:
    """Sorts the arguments of a call that looks like stock `generate`.

    Args:
        inputs (`Tensor` of shape `(batch, prompt_length)`, *optional*): The prompts, if not passed as `input_ids`.
        generation_config (`GenerationConfig`, *optional*): Settings; they are not changed.
        kwargs (`dict`): The keyword arguments.

    Returns:
        `tuple` of [`SGLGenerationConfig`], `dict` and `dict`: The settings, the model inputs, and the arguments of
        stock `generate` that are neither.
    """
    settings = SGLGenerationConfig.from_generation_config(generation_config)
    model_inputs = with_installed_cache_name(settings.update(**kwargs))
    generate_kwargs = {name: model_inputs.pop(name) for name in _GENERATE_ARGUMENTS if name in model_inputs}
    if "tokenizer" in generate_kwargs:
        # transformers' server passes the processor, which stands for its tokenizer
        tokenizer = generate_kwargs["tokenizer"]
        generate_kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
    if inputs is not None:
        model_inputs["input_ids"] = inputs
    return settings, model_inputs, generate_kwargs


# The hooks of a call sit on the models, so threads that share a model take turns.
_LOCKS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


def _one_at_a_time(model: PreTrainedModel) -> Any:
    """The lock of a model, to be held while it runs."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, RLock())


def _split(inputs: dict[str, Any], shares_tensors: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of the large model and of the small one: plain keys go to both, `small_*` keys to the small one.

    Models of different families read different tensors, and the one could not make sense of the other's.
    """
    plain = {name: value for name, value in inputs.items() if not name.startswith(_SMALL_PREFIX)}
    own = {name.removeprefix(_SMALL_PREFIX): value for name, value in inputs.items() if name not in plain}
    shared = {
        name: value
        for name, value in plain.items()
        if name not in _LARGE_ONLY and (shares_tensors or not isinstance(value, (Tensor, list, tuple)))
    }
    return plain, {**shared, **own}


def _find_visual_tokens(model: PreTrainedModel, inputs: dict[str, Any]) -> VisualTokens | None:
    """The visual tokens of a model's prompts; `None` where only a part of them, or only embeddings, were passed."""
    input_ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if input_ids is None or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        return None
    return visual_tokens_of(model.config, inputs)


def _processor_list(
    own: ImportanceProcessor | Iterable[ImportanceProcessor] | None, settings: SGLGenerationConfig
) -> ImportanceProcessorList:
    """The user's processors, then those of the settings; empty if nothing would ever be dropped."""
    processors = ImportanceProcessorList(own if isinstance(own, Iterable) else [] if own is None else [own])
    for processor in processors:
        if not callable(processor):
            raise ValueError(
                f"`importance_processor` is or holds {processor!r}: pass an ImportanceProcessor, or a list of them."
            )
    processors += ImportanceProcessorList.of_settings(settings.retention_ratio, settings.min_tokens_per_image)
    return processors


def _is_greedy(settings: GenerationConfig) -> bool:
    return not settings.do_sample and settings.num_beams in (None, 1) and settings.num_return_sequences in (None, 1)


def _can_use_draft(
    inputs: dict[str, Any],
    settings: SGLGenerationConfig,
    generate_kwargs: dict[str, Any],
    vocabularies: Vocabularies,
) -> bool:
    """Whether the small model shall run even for its draft alone, and the large one can make use of it."""
    return (
        settings.verify_draft is True
        and _is_greedy(settings)
        and inputs.get("input_ids") is not None
        and cache_of(inputs) is None
        and settings.cache_implementation in _DYNAMIC_CACHES
        and not any(generate_kwargs.get(name) for name in ("assistant_model", "custom_generate"))
        and vocabularies.shared is not None
    )


def _check_guidable(inputs: dict[str, Any]) -> None:
    """Raises if the small model cannot be asked about these inputs."""
    cache = cache_of(inputs)
    if inputs.get("input_ids") is None:
        raise ValueError(
            "The small model's guidance needs visual tokens, which are found by their ids, but there are no "
            "`input_ids`: pass them, or set `retention_ratio=1.0` and no `early_exit_threshold` to run the large "
            "model alone."
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            f"The small model's guidance starts with the prompt, but the cache already holds "
            f"{cache.get_seq_length()} tokens: pass the whole conversation without a cache."
        )


def _check_exits(settings: SGLGenerationConfig, generate_kwargs: dict[str, Any], vocabularies: Vocabularies) -> None:
    """Raises if the small model's answer cannot stand for the large one's."""
    cure = "or set `early_exit_threshold` above 1, which never exits."
    if not _is_greedy(settings):
        raise ValueError(
            "An early exit returns the small model's one greedy answer, but sampling, beams or several answers were "
            f"asked for: set do_sample=False, num_beams=1 and num_return_sequences=1, {cure}"
        )
    if vocabularies.shared is None:
        raise ValueError(
            "An early exit returns the small model's tokens, but nothing tells whether they mean the same to the "
            f"large model: pass `tokenizer` and `small_tokenizer`, {cure}"
        )
    own = [name for name in _SHAPING_ARGUMENTS if generate_kwargs.get(name) is not None]
    own += [name for name in _SHAPING_SETTINGS_BY_ID if getattr(settings, name) is not None]
    if own and not vocabularies.shared:
        raise ValueError(
            f"An early exit cannot obey {', '.join(f'`{name}`' for name in own)}, because the small model writes in "
            f"another vocabulary: leave it out, {cure}"
        )


def _check_prunable(
    inputs: dict[str, Any], generation_config: SGLGenerationConfig, generate_kwargs: dict[str, Any]
) -> None:
    """Raises if a setting of stock `generate` does not go together with pruning."""
    cure = "or set `retention_ratio=1.0` to run the large model unpruned."
    cache = cache_of(inputs)
    if generation_config.cache_implementation not in _DYNAMIC_CACHES or (cache is not None and cache.is_compileable):
        raise ValueError(
            "Pruning needs a cache whose layers may differ in length, which a "
            f"{generation_config.cache_implementation or 'static'} cache cannot do: leave `cache_implementation` "
            f"unset, {cure}"
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


def _prepared(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], VisualTokens]:
    """A model's inputs, padded on the left, and where their visual tokens stand."""
    inputs = left_padded(inputs)
    return inputs, visual_tokens_of(model.config, inputs)


def _row_owners(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Which sample each row of the image inputs belongs to; inputs with one row per sample are left out."""
    owners = {}
    for name, kind in check_supported(model.config).inputs.items():
        if kind == "sample" or inputs.get(name) is None:
            continue
        if kind == "batch":
            raise ValueError(
                f"Some prompts of this batch exit early, but nothing tells to which prompts the rows of `{name}` "
                "belong: pass such prompts one at a time, or without `early_exit_threshold`."
            )
        tokens = visual_tokens_of(model.config, inputs, "video" if "video" in name or kind == "video" else "image")
        if not tokens.counts.any():  # some models write videos with the placeholders of images
            tokens = visual_tokens_of(model.config, inputs)
        of_images = kind in ("image", "video")
        weights = tokens.image_index.amax(dim=1) + 1 if of_images else tokens.counts
        sizes = inputs[kind].prod(dim=1) if kind in inputs else None
        owners[name] = row_owners(len(inputs[name]), weights, sizes)
    return owners


def _length_limits(settings: GenerationConfig, prompt_length: int) -> tuple[int, int]:
    """The fewest and the most tokens that an answer may have."""
    at_least = max(settings.min_new_tokens or 0, (settings.min_length or 0) - prompt_length)
    if settings.max_new_tokens is not None:
        return at_least, settings.max_new_tokens
    if settings.max_length is not None:
        return at_least, max(1, settings.max_length - prompt_length)
    return at_least, _DEFAULT_MAX_NEW_TOKENS


def _counting_new_tokens(settings: SGLGenerationConfig, limits: tuple[int, int]) -> SGLGenerationConfig:
    """The same settings for prompts of another length: limits that count the prompt would shift."""
    settings = SGLGenerationConfig.from_generation_config(settings)
    settings.update(min_new_tokens=limits[0] or None, max_new_tokens=limits[1], min_length=None, max_length=None)
    return settings


def _draft_settings(
    settings: SGLGenerationConfig,
    small: PreTrainedModel,
    limits: tuple[int, int],
    vocabularies: Vocabularies,
    generate_kwargs: dict[str, Any],
    may_exit: bool,
) -> dict[str, Any]:
    """What the draft must obey so that it can stand for an answer: arguments of the small model's `generate`."""
    names = [*_SHAPING_SETTINGS, *(_SHAPING_SETTINGS_BY_ID if vocabularies.shared else ())]
    shaping = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    shaping["max_new_tokens"] = settings.guidance_max_new_tokens or limits[1]
    if limits[0] > 0:
        shaping["min_new_tokens"] = min(limits[0], shaping["max_new_tokens"])
    # The small model stops where the large one would, and where it was trained to.
    eos = [*_eos_token_ids(small.generation_config), *(_eos_token_ids(settings) if vocabularies.shared else ())]
    if eos:
        shaping["eos_token_id"] = list(dict.fromkeys(eos))

    criteria = StoppingCriteriaList()
    if settings.stop_strings is not None:
        tokenizer = generate_kwargs.get("tokenizer")
        if tokenizer is None:
            raise ValueError("`stop_strings` are found in the text: pass `tokenizer=processor.tokenizer` as well.")
        if not vocabularies.shared and vocabularies.tokenizers is not None:
            tokenizer = vocabularies.tokenizers[1]
        criteria.append(StopStringCriteria(tokenizer, settings.stop_strings))
    # The user's own objects may keep a state, so the draft has to obey them only where it may become the answer.
    if may_exit:
        criteria += generate_kwargs.get("stopping_criteria") or []
        for name in ("logits_processor", "prefix_allowed_tokens_fn"):
            if generate_kwargs.get(name) is not None:
                shaping[name] = generate_kwargs[name]
    return {**shaping, "stopping_criteria": criteria}


def _in_large_vocabulary(
    guidance: Guidance, settings: GenerationConfig, vocabularies: Vocabularies
) -> tuple[Tensor, Tensor]:
    """The drafts as the large model would have written them; `(batch, draft_length)` each, ids and mask."""
    draft, mask = guidance.draft_sequences, guidance.draft_mask
    eos = _eos_token_ids(settings)
    if vocabularies.shared is False:
        rows = vocabularies.to_large(draft, mask, guidance.ended_with_eos, eos[0] if eos else None)
        ids, mask = (tensor.to(draft.device) for tensor in pad_rows(rows, _pad_token_id(settings)))
        return ids, mask
    draft = draft.masked_fill(~mask, _pad_token_id(settings))
    if eos:  # whatever ended the small model's answer, it is the large one's end that follows it
        last = (mask.sum(dim=1) - 1)[:, None]
        foreign = guidance.ended_with_eos & ~torch.isin(draft.gather(1, last)[:, 0], draft.new_tensor(eos))
        draft = draft.scatter(1, last, torch.where(foreign[:, None], eos[0], draft.gather(1, last)))
    return draft, mask


def _is_complete(ended: Tensor, lengths: Tensor, limits: tuple[int, int]) -> Tensor:
    """Which drafts are whole answers; `(batch,)`."""
    # One that was cut off is whole only where the large model's answer would be cut off, too.
    return torch.where(ended, lengths <= limits[1], lengths == limits[1]) & (lengths >= limits[0])


def _eos_token_ids(settings: GenerationConfig) -> list[int]:
    ids = settings.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _pad_token_id(settings: GenerationConfig) -> int:
    """What `generate` fills up finished answers with."""
    return settings.pad_token_id if settings.pad_token_id is not None else [*_eos_token_ids(settings), 0][0]


def _scatter(values: Tensor, chosen: Tensor, width: int) -> Tensor:
    """Rows of the chosen samples in a whole batch; `(batch, width)`, `False` elsewhere."""
    whole = values.new_zeros(chosen.shape[0], width)
    whole[chosen, : values.shape[1]] = values
    return whole


def _result(
    sequences: Tensor,
    output: ModelOutput | Tensor | None,
    found: dict[str, Any],
    settings: GenerationConfig,
    clock: _Clock,
) -> SGLGenerateOutput | Tensor:
    """The sequences, or beside them what the large model returned and what was found on the way."""
    if not settings.return_dict_in_generate:
        return sequences
    passed_on = {}
    if output is not None and not isinstance(output, Tensor):
        passed_on = {field.name: output[field.name] for field in fields(SGLGenerateOutput) if field.name in output}
    return SGLGenerateOutput(**{**passed_on, **found, "sequences": sequences, "timings": clock.timings})


class _Clock:
    """Wall-clock milliseconds of the steps, with the device's work waited for."""

    def __init__(self, *devices: torch.device) -> None:
        self._devices = {device for device in devices if device.type == "cuda"}
        self._started = self._last = self._now()
        self._laps = {"guidance_ms": 0.0, "large_ms": 0.0}

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
