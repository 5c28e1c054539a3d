"""The story of one `generate` call.

Read [`generate`] from top to bottom: it is the method. Each step is one call into the file that knows it.
"""

from __future__ import annotations

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
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import ModelOutput

from transformers_sgl.answer_rules import AnswerRules
from transformers_sgl.architectures import check_prunable, check_supported, decoder_layers
from transformers_sgl.batching import (
    WholeBatchStreamer,
    merge_answers,
)
from transformers_sgl.clock import now_ms
from transformers_sgl.generation_config_sgl import (
    PRESETS,
    SGLGenerationConfig,
    average_retention,
    resolve_prune_layer,
)
from transformers_sgl.guidance import guide
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.prompt import Prompt
from transformers_sgl.tokens.early_exit import exits_early
from transformers_sgl.tokens.importance_process import (
    ImportanceProcessor,
    ImportanceProcessorList,
)
from transformers_sgl.tokens.importance_transfer import ImportanceTransfer, split_boxes
from transformers_sgl.tokens.vocabulary import Vocabularies
from transformers_sgl.transformers_interface import (
    CACHE_NAMES,
    CacheUnderBothNames,
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


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        """The shapes of tensors instead of their values, which would fill pages."""
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in self.items())})"

    def average_retention(self, num_layers: int) -> Tensor:
        """Visual tokens that the large model processed, averaged over its layers (paper, section 4.1).

        Args:
            num_layers (`int`): The number of the large model's decoder layers.

        Returns:
            `Tensor` of shape `(batch,)`: Fractions in float64: 1 where nothing was pruned, 0 for an early exit.
        """
        if self.keep_mask is None or self.prune_layer is None or self.num_visual_tokens is None:
            found = [1.0] * len(self.sequences)
        else:
            counts = zip(self.keep_mask.sum(dim=1).tolist(), self.num_visual_tokens.tolist(), strict=True)
            found = [average_retention(kept / max(1, number), self.prune_layer, num_layers) for kept, number in counts]
        retention = torch.tensor(found, dtype=torch.float64)
        return retention if self.exited_early is None else retention.masked_fill(self.exited_early.cpu(), 0.0)


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
    rules = AnswerRules.of(settings, generate_kwargs, vocabularies, large_inputs)
    prompt = _find_prompt(large, large_inputs)
    if prompt is not None:
        found["num_visual_tokens"] = prompt.visual_tokens.counts
    is_guided = bool(processors) or rules.may_exit or rules.can_use_draft(large_inputs)
    if not is_guided or (prompt is not None and prompt.visual_tokens.num_visual_tokens == 0):
        with _one_at_a_time(large):
            # Of the class, here and below: a repository's `custom_generate` lies on the model, and may have called us.
            output = type(large).generate(large, **large_inputs, **generate_kwargs)
        clock.lap("large_ms")
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        return _result(sequences, output, found, settings, clock)

    # 2. Refuse what cannot be done, before anything has run.
    check_supported(small.config)
    rules.check_guidable(large_inputs)
    if processors:
        check_prunable(large.config, prune_layer)
        rules.check_prunable(large_inputs)
    if rules.may_exit:
        rules.check_exits()
    prompts = large_inputs["input_ids"]
    prompt = prompt or Prompt.of(large.config, large_inputs)
    small_prompt = Prompt.of(small.config, small_inputs)
    if processors:
        transfer = ImportanceTransfer.between(
            large.config, small.config, prompt.visual_tokens, small_prompt.visual_tokens, boxes
        )
        found["importance_transfer"] = transfer.kind

    # 3. The small model answers first: a draft, how far to trust it, and where it looked.
    draft_settings = rules.draft_settings(small.generation_config)
    with _one_at_a_time(small):
        guidance = guide(
            small,
            small_prompt.inputs,
            small_prompt.visual_tokens,
            settings,
            ranks=bool(processors),
            scores=rules.scores_draft,
            **draft_settings,
        ).to(prompts.device)
    if guidance.importance is not None:
        guidance = replace(guidance, importance=transfer(guidance.importance))
    for name in ("draft_sequences", "importance", "confidence", "consistency", "decision_score"):
        found[name] = getattr(guidance, name)
    clock.lap("guidance_ms")

    # 4. Where the draft can be trusted, it is the answer.
    draft, draft_mask = rules.in_large_vocabulary(
        guidance.draft_sequences, guidance.draft_mask, guidance.ended_with_eos
    )
    complete = found["draft_complete"] = rules.is_complete(guidance.ended, draft_mask.sum(dim=1))
    exits = torch.zeros_like(complete)
    if rules.may_exit and guidance.decision_score is not None and settings.early_exit_threshold is not None:
        exits = exits_early(guidance.decision_score, settings.early_exit_threshold, complete)
    found["exited_early"] = exits
    early = draft[:, : int((draft_mask.sum(dim=1) * exits).max())]
    streamer = generate_kwargs.get("streamer")
    if streamer is not None and exits.any():
        streamer = WholeBatchStreamer(streamer, prompts, early, exits, rules.pad_token_id)
        generate_kwargs["streamer"] = streamer

    # 5. The other samples go on as a smaller batch. The ranking becomes a choice of tokens, and the large model reads
    # the prompt and the draft, keeps what matters, and writes.
    rest, output, late = ~exits, None, None
    verifier = DraftVerifier(large)
    if rest.any():
        if exits.any():
            prompt = prompt.select(rest)
            generate_kwargs["generation_config"] = rules.counting_new_tokens(generation_config)
        if settings.verify_draft is not False and vocabularies.shared is not None:
            verifier = DraftVerifier(large, draft[rest], draft_mask[rest])
        with ExitStack() as stack:
            stack.enter_context(_one_at_a_time(large))
            visual_tokens = prompt.visual_tokens
            if guidance.importance is not None and visual_tokens.num_visual_tokens > 0:
                importance = guidance.importance[rest, : visual_tokens.num_visual_tokens]
                keep_mask = processors.keep_mask(visual_tokens, importance)
                stack.enter_context(VisualTokenPruner(large, visual_tokens.prompt_keep_mask(keep_mask), prune_layer))
                found["prune_layer"] = prune_layer
                found["keep_mask"] = _scatter(keep_mask, rest, guidance.importance.shape[1])
            output = verifier.generate(**prompt.inputs, **generate_kwargs)
        sequences = output if isinstance(output, Tensor) else output["sequences"]
        late = sequences[:, prompt.inputs["input_ids"].shape[1] :]
        clock.lap("large_ms")
    elif streamer is not None:
        streamer.end()
    found["num_large_forward_passes"] = verifier.num_forward_passes
    if verifier.num_accepted is not None:
        found["num_draft_tokens_accepted"] = torch.zeros_like(rest, dtype=torch.long)
        found["num_draft_tokens_accepted"][rest] = verifier.num_accepted.to(rest.device)

    # 6. The whole batch again, with the prompts as they were passed.
    answers = merge_answers(early, late, exits, rules.pad_token_id)
    prompts = prompts.repeat_interleave(answers.shape[0] // prompts.shape[0], dim=0)
    return _result(torch.cat([prompts, answers], dim=1), output, found, settings, clock)


def read_arguments(
    inputs: Tensor | None, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> tuple[SGLGenerationConfig, dict[str, Any], dict[str, Any]]:
    """Sorts the arguments of a call that looks like stock `generate`.

    Args:
        inputs (`Tensor` of shape `(batch, prompt_length)`, *optional*): The prompts, if not passed as `input_ids`.
        generation_config (`GenerationConfig`, *optional*): Settings; they are not changed.
        kwargs (`dict`): The keyword arguments; a `preset` stands for its settings, and single ones win over it.

    Returns:
        `tuple` of [`SGLGenerationConfig`], `dict` and `dict`: The settings, the model inputs, and the arguments of
        stock `generate` that are neither.
    """
    settings = SGLGenerationConfig.from_generation_config(generation_config)
    preset = kwargs.get("preset")
    if preset is not None:
        SGLGenerationConfig.from_preset(preset)  # raises if there is none of that name
        kwargs = {**PRESETS[preset], **kwargs}
    kwargs = {name: value for name, value in kwargs.items() if name != "preset"}
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


def _find_prompt(model: PreTrainedModel, inputs: dict[str, Any]) -> Prompt | None:
    """A model's prompts; `None` where only a part of them, or only embeddings, were passed."""
    input_ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if input_ids is None or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        return None
    return Prompt.of(model.config, inputs)


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


def _shown(value: Any) -> str:
    """A field of an output as it is printed."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {number:.1f}' for name, number in value.items())}}}"
    return repr(value) if isinstance(value, int | str) else f"<{type(value).__name__}>"


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
        self._devices = devices
        self._started = self._last = now_ms(*devices)
        self._laps = {"guidance_ms": 0.0, "large_ms": 0.0}

    def lap(self, name: str) -> None:
        """Names the time since the last lap."""
        now = now_ms(*self._devices)
        self._laps[name] = now - self._last
        self._last = now

    @property
    def timings(self) -> dict[str, float]:
        """The laps and their total."""
        return {**self._laps, "total_ms": self._last - self._started}
