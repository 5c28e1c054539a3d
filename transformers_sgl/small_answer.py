"""Running the small model: its answer is the draft, its attention the importance of the visual tokens.

One `generate` call of the small model gives the draft, the importance and the confidence. The consistency costs one
more pass, which reads the prompt again with most visual tokens dropped; the vision encoder does not run again. With
`guidance="prompt"` it only reads: one pass, which gives the importance alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from transformers_sgl.architectures import attention_modules, check_supported, visual_token_ids
from transformers_sgl.batching import append_tokens, without_placeholders
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.hooks.attention_recorder import AttentionRecorder
from transformers_sgl.hooks.context import HookContext
from transformers_sgl.hooks.drafter import Drafter
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.tokens import early_exit
from transformers_sgl.tokens.importance_process import ImportanceProcessorList, RetentionRatioProcessor
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.transformers_interface import cache_name, cache_of, extended_inputs, view_of

__all__ = ["SmallAnswer", "ask", "guiding_layers", "guiding_queries"]

# Whatever the large model does: the draft is the small model's best guess, and reproducible.
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "cache_implementation": "dynamic"}


@dataclass(frozen=True)
class SmallAnswer:
    """What the small model tells about a batch of prompts, in its own tokens.

    Attributes:
        draft_sequences (`Tensor` of shape `(batch, draft_length)`): The small model's answers in its own vocabulary,
            without the prompts; of length 0 where it only read.
        draft_mask (`Tensor` of shape `(batch, draft_length)`): `True` for an answer's tokens, its end of sequence
            included.
        ended (`Tensor` of shape `(batch,)`): `True` where an answer came to its end, `False` where it was cut off.
        ended_with_eos (`Tensor` of shape `(batch,)`): `True` where that end is an end-of-sequence token.
        importance (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): The attention each visual token
            received, in float32; 0 in padding.
        confidence (`Tensor` of shape `(batch,)`, *optional*): How sure the small model was.
        consistency (`Tensor` of shape `(batch,)`, *optional*): How probable its answer stays with few visual tokens.
        features (`Tensor` of shape `(batch, num_visual_tokens, width)`, *optional*): What its decoder was given for
            each visual token; 0 in padding.
        drafter (`Drafter`, *optional*): The small model, ready to go on from any point of its answers.
    """

    draft_sequences: Tensor
    draft_mask: Tensor
    ended: Tensor
    ended_with_eos: Tensor
    importance: Tensor | None = None
    confidence: Tensor | None = None
    consistency: Tensor | None = None
    features: Tensor | None = None
    drafter: Drafter | None = None

    @property
    def has_draft(self) -> bool:
        """Whether the small model has written."""
        return self.draft_sequences.shape[1] > 0

    @property
    def decision_score(self) -> Tensor | None:
        """The mean of both scores, of shape `(batch,)`; `None` where they were not computed."""
        if self.confidence is None or self.consistency is None:
            return None
        return early_exit.decision_score(self.confidence, self.consistency)

    def to(self, device: torch.device) -> SmallAnswer:
        """The same on another device."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        moved: dict[str, Any] = {name: each.to(device) for name, each in values.items() if isinstance(each, Tensor)}
        return replace(self, **moved)


def ask(
    small: PreTrainedModel,
    inputs: dict[str, Any],
    visual_tokens: VisualTokens,
    generation_config: SGLGenerationConfig,
    ranks: bool = True,
    scores: bool = False,
    features: bool = False,
    max_answer_tokens: int | None = None,
    logits_processor: Iterable[LogitsProcessor] = (),
    stopping_criteria: Iterable[StoppingCriteria] = (),
    **settings: Any,
) -> SmallAnswer:
    """Lets the small model answer first, greedily, and records its attention (paper, section 3.2).

    `inputs` are the arguments of its `generate`, with `input_ids` of shape `(batch, small_prompt_length)`; they win
    over `settings`. `ranks` asks for the importance, together with `features` also for those of the visual tokens, and
    `scores` for confidence and consistency. With `max_answer_tokens` it is kept ready to draft for answers of up to so
    many; `logits_processor` and `stopping_criteria` also hold for the draft. The
    result is on the small model's device.

    Raises:
        ValueError: If a sample has no token whose attention could rank its visual tokens.
    """
    inputs, visual_tokens = _beside(small, inputs, visual_tokens)
    settings = {**settings, **_GREEDY, **inputs, "return_dict_in_generate": False}
    if generation_config.guidance == "prompt":
        return _guide_by_prompt(small, settings, visual_tokens, generation_config, ranks, features)
    with ExitStack() as stack:
        recorder = None
        if ranks or scores:
            recorder = stack.enter_context(_attention_recorder(small, visual_tokens, generation_config, features))
        draft = stack.enter_context(_DraftRecorder(small)) if scores else None
        watch = _EndWatch(settings.get("eos_token_id", small.generation_config.eos_token_id), stopping_criteria)
        watch.recorder = recorder
        loop = _LoopRecorder() if max_answer_tokens else None
        sequences = type(small).generate(
            small if loop is None else view_of(small, loop),
            **settings,
            logits_processor=LogitsProcessorList([*logits_processor, *([draft] if draft else ())]),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
    draft_sequences = sequences[:, visual_tokens.prompt_length :]
    draft_mask = watch.mask(draft_sequences)

    found = SmallAnswer(draft_sequences, draft_mask, watch.ended, watch.ended_with_eos)
    importance = None if recorder is None else _of_queries(recorder, guiding_queries(generation_config))
    if loop is not None and max_answer_tokens is not None:
        drafter = loop.drafter(
            small, draft_sequences, {id(each) for each in (*logits_processor, draft)}, watch, max_answer_tokens
        )
        if drafter is not None and importance is not None:
            keep_mask = _most_important(visual_tokens, importance, generation_config.draft_retention_ratio)
            drafter = drafter.pruned(keep_mask)
        found = replace(found, drafter=drafter)
    if recorder is None or importance is None:
        return found
    if ranks:
        _check_ranked(visual_tokens, importance, "the small model wrote a single token", "allow a longer answer")
        found = replace(found, importance=importance, features=recorder.features)
    if draft is None:
        return found
    log_probs = _log_probs_when_pruned(
        small, draft, draft_sequences, visual_tokens, importance, generation_config.consistency_retention_ratio
    )
    return replace(
        found,
        confidence=early_exit.confidence(draft.log_probs, draft_mask),
        consistency=early_exit.consistency(log_probs, draft_mask, generation_config.consistency_reduction),
    )


def guiding_queries(settings: SGLGenerationConfig) -> str:
    """The name of the queries whose attention counts under these settings."""
    return settings.guidance_queries or ("prompt" if settings.guidance == "prompt" else "both")


def guiding_layers(small: PreTrainedModel, settings: SGLGenerationConfig) -> list[int]:
    """The indices of the decoder layers whose attention counts under these settings, in order."""
    layers = sorted(attention_modules(small))
    return layers[: max(1, round((settings.guidance_layers or 1.0) * len(layers)))]


def _guide_by_prompt(
    small: PreTrainedModel,
    arguments: dict[str, Any],
    visual_tokens: VisualTokens,
    settings: SGLGenerationConfig,
    ranks: bool,
    features: bool,
) -> SmallAnswer:
    """One pass of the small model, which reads the prompts; `arguments` are those of its `generate`."""
    nothing = visual_tokens.positions.new_zeros(visual_tokens.batch_size, 0)
    ended = nothing.new_zeros(len(nothing), dtype=torch.bool)
    found = SmallAnswer(nothing, nothing.bool(), ended, ended)
    if not ranks:
        return found
    with _attention_recorder(small, visual_tokens, settings, features) as recorder:
        type(small).generate(small, **{**arguments, "max_new_tokens": 1})  # chosen from the pass that reads
    _check_ranked(
        visual_tokens, recorder.importance, 'with `guidance="prompt"` nothing follows', 'set `guidance="answer"`'
    )
    return replace(found, importance=recorder.importance, features=recorder.features)


def _beside(
    small: PreTrainedModel, inputs: dict[str, Any], visual_tokens: VisualTokens
) -> tuple[dict[str, Any], VisualTokens]:
    """Inputs and visual tokens on the small model's device."""
    if small.device.type == "meta":  # with offloaded weights, accelerate's hooks move the inputs
        return inputs, visual_tokens
    moved = {name: value.to(small.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return moved, visual_tokens.to(small.device)


def _attention_recorder(
    small: PreTrainedModel, visual_tokens: VisualTokens, settings: SGLGenerationConfig, features: bool
) -> AttentionRecorder:
    """A recorder of the layers and queries that the settings name."""
    # Prompt and answer apart, for samples that lack the wanted queries and are ranked by the others.
    queries: Literal["prompt", "last", "both"] = "prompt" if settings.guidance == "prompt" else "both"
    if guiding_queries(settings) == "last":
        queries = "last"
    return AttentionRecorder(small, visual_tokens, queries, guiding_layers(small, settings), features)


def _check_ranked(visual_tokens: VisualTokens, importance: Tensor, cause: str, cure: str) -> None:
    """Raises if a sample has visual tokens, and none of them received any attention."""
    if (visual_tokens.valid.any(dim=1) & ~importance.any(dim=1)).any():
        raise ValueError(
            f"Nothing ranks the visual tokens of a sample: its prompt ends with the image and {cause}, so put the "
            f"question after the image or {cure}."
        )


def _of_queries(recorder: AttentionRecorder, queries: str) -> Tensor:
    """The importance that the wanted queries give; `(batch, num_visual_tokens)`.

    A sample without such queries is ranked by the others: an answer of one token is never read again, so it has no
    generated queries, and a prompt that ends with its image has no prompt queries.
    """
    wanted = {
        "prompt": recorder.prompt_importance,
        "last": recorder.prompt_importance,
        "generated": recorder.generated_importance,
        "both": recorder.importance,
    }[queries]
    return torch.where(wanted.any(dim=1, keepdim=True), wanted, recorder.importance)


def _log_probs_when_pruned(
    small: PreTrainedModel,
    draft: _DraftRecorder,
    draft_sequences: Tensor,
    visual_tokens: VisualTokens,
    importance: Tensor,
    retention_ratio: float,
) -> Tensor:
    """The draft's log-probabilities from one teacher-forced pass, pruned at layer 0; `(batch, draft_length)`.

    Only the most important visual tokens are seen (paper, section 3.3).
    """
    keep_mask = _most_important(visual_tokens, importance, retention_ratio)
    length = draft_sequences.shape[1]
    token_type = check_supported(small.config).answer_token_type
    to_read = without_placeholders(draft_sequences, visual_token_ids(small.config))
    inputs = append_tokens(draft.prompt_inputs, to_read, partial(extended_inputs, small), token_type)
    with draft.features, VisualTokenPruner(small, keep_mask, prune_layer=0):
        logits = small(**{**inputs, cache_name(): None, "use_cache": False, "logits_to_keep": length + 1}).logits
    return early_exit.token_log_probs(logits[:, -length - 1 : -1], draft_sequences.to(logits.device)).to(
        draft_sequences.device
    )


def _most_important(visual_tokens: VisualTokens, importance: Tensor, retention_ratio: float) -> Tensor:
    """The prompts' tokens without the visual tokens that matter less; `(batch, prompt_length)`."""
    process = ImportanceProcessorList([RetentionRatioProcessor(retention_ratio)])
    return visual_tokens.prompt_keep_mask(process.keep_mask(visual_tokens, importance))


class _LoopRecorder:
    """Keeps what drafting on needs of the small model's decoding loop, and changes nothing; see [`view_of`]."""

    def __init__(self) -> None:
        self._prompt_inputs: dict[str, Any] | None = None
        self._cache: Cache | None = None
        self._processors = LogitsProcessorList()

    def run_loop(
        self, view: Any, loop: Callable[..., Any], input_ids: Tensor, stopping_criteria: Any, **kwargs: Any
    ) -> Any:
        """Runs the loop, with a look at its cache and its processors."""
        self._cache, self._processors = cache_of(kwargs), kwargs["logits_processor"]
        return loop(view, input_ids=input_ids, stopping_criteria=stopping_criteria, **kwargs)

    def run_pass(self, forward: Callable[..., Any], extend: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """Runs the model, with a look at the inputs of its first pass."""
        self._prompt_inputs = self._prompt_inputs or dict(inputs)
        return forward(**inputs)

    def drafter(
        self, small: PreTrainedModel, written: Tensor, own: set[int], watch: _EndWatch, max_answer_tokens: int
    ) -> Drafter | None:
        """The small model after what it has written; `own` are processors that are not the loop's, by identity."""
        if self._prompt_inputs is None or written.shape[1] == 0:
            return None
        rules = LogitsProcessorList(each for each in self._processors if id(each) not in own)
        return Drafter.after(small, self._prompt_inputs, self._cache, written, rules, watch.end_ids, max_answer_tokens)


class _FeatureMemo(HookContext):
    """Lets a model's vision encoder see an image once, however often the model is given it.

    Newer versions of transformers encode images before the first pass; then there is nothing to remember.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        owners = (model, model.base_model)
        self._owner = next((each for each in reversed(owners) if hasattr(each, "get_image_features")), model)
        self._features: dict[str, Any] = {}

    def _register(self, stack: ExitStack) -> None:
        for name in ("get_image_features", "get_video_features"):
            if hasattr(self._owner, name) and name not in vars(self._owner):
                object.__setattr__(self._owner, name, self._remembering(name, getattr(self._owner, name)))
                stack.callback(vars(self._owner).pop, name)

    def _remembering(self, name: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(encode)  # `generate` reads the signature
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if not self.is_around():
                return encode(*args, **kwargs)
            if name not in self._features:
                self._features[name] = encode(*args, **kwargs)
            return self._features[name]

        return remembered


class _DraftRecorder(HookContext, LogitsProcessor):
    """Collects what scoring a draft needs while the small model writes it.

    Attributes:
        prompt_inputs (`dict`): The inputs of its first pass.
        features (`_FeatureMemo`): The vision encoder's output.
    """

    prompt_inputs: dict[str, Any]

    def __init__(self, small: PreTrainedModel) -> None:
        self.features = _FeatureMemo(small)
        self._small = small
        self._log_probs: list[Tensor] = []  # one of shape (batch,) for each step
        self._logits: Tensor | None = None  # (batch, vocab_size), of the step that is running
        self._has_prompt = False

    @property
    def log_probs(self) -> Tensor:
        """How probable each token was when it was written; `(batch, draft_length)`."""
        return torch.stack(self._log_probs, dim=1)

    def _register(self, stack: ExitStack) -> None:
        stack.enter_context(self.features)
        self._add_hook(stack, self._small.register_forward_pre_hook, self._note_prompt, with_kwargs=True)
        self._add_hook(stack, self._small.register_forward_hook, self._note_logits)

    def _note_prompt(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._has_prompt:
            self.prompt_inputs = dict(kwargs)
            self._has_prompt = True

    def _note_logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._logits = output.logits[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Runs as the last logits processor: sees what is chosen, and changes nothing.

        The probability is the model's own, before processors reshaped it: a forced token counts with the model's own
        trust.
        """
        assert self._logits is not None
        self._log_probs.append(early_exit.token_log_probs(self._logits.to(scores.device), scores.argmax(dim=-1)))
        return scores


class _EndWatch(StoppingCriteria):
    """Ends an answer where it has to end, and remembers where that was.

    Attributes:
        recorder ([`AttentionRecorder`], *optional*): Told of ends, so that padding after an answer does not count.
        ended (`Tensor` of shape `(batch,)`): Which answers have ended.
        ended_with_eos (`Tensor` of shape `(batch,)`): Which of them with an end-of-sequence token.
    """

    ended: Tensor
    ended_with_eos: Tensor
    recorder: AttentionRecorder | None = None

    def __init__(self, eos_token_id: int | list[int] | None, criteria: Iterable[StoppingCriteria]) -> None:
        self._eos = torch.tensor([] if eos_token_id is None else eos_token_id).reshape(-1)
        self._criteria = StoppingCriteriaList(criteria)
        self._lengths: Tensor | None = None  # (batch,)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which samples end with this token; `(batch,)`."""
        self._eos = self._eos.to(input_ids.device)  # once: a copy to the device waits for it
        is_eos = torch.isin(input_ids[:, -1], self._eos)
        ends = is_eos | self._criteria(input_ids, scores, **kwargs) if self._criteria else is_eos
        if self._lengths is None:
            self.ended, self._lengths = torch.zeros_like(ends), torch.zeros_like(ends, dtype=torch.long)
            self.ended_with_eos = self.ended
        self._lengths += ~self.ended
        self.ended_with_eos = self.ended_with_eos | (is_eos & ~self.ended)
        self.ended = self.ended | ends
        if self.recorder is not None:
            self.recorder.finish(self.ended)
        return ends

    @property
    def end_ids(self) -> list[int]:
        """The end-of-sequence tokens."""
        return [int(each) for each in self._eos.tolist()]

    def mask(self, draft_sequences: Tensor) -> Tensor:
        """`True` for the tokens that belong to an answer; `(batch, draft_length)`."""
        position = torch.arange(draft_sequences.shape[1], device=draft_sequences.device)
        assert self._lengths is not None
        return position < self._lengths[:, None]
