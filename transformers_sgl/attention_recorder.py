"""Capturing the attention that visual tokens receive, beside the model's own attention kernel.

Floor 1. While an [`AttentionRecorder`] is active, the decoder's attention function is its own (`sdpa`,
`flash_attention_2`, `eager`, ...) wrapped in `_recording_attention`, which computes, next to the kernel's output, only
those rows of the attention matrix that matter: the queries after the last visual token. Each layer's rows are summed
to `(batch, num_visual_tokens)` on arrival and dropped. Layers without attention, which mix their tokens by a linear
recurrence or a convolution, tell nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_sgl.architectures import attention_implementation, attention_modules, attention_pattern, decoder
from transformers_sgl.hook_context import HookContext
from transformers_sgl.visual_tokens import VisualTokens

__all__ = ["AttentionRecorder"]

_PREFIX = "sgl_recording_"
# The largest block of attention weights to hold at a time, in elements: 64 MiB of float32.
_MAX_BLOCK_ELEMENTS = 1 << 24
# Who listens to an attention module. Attention functions are told nothing but the module that called them.
_LISTENERS: WeakKeyDictionary[nn.Module, tuple[AttentionRecorder, ...]] = WeakKeyDictionary()


class AttentionRecorder(HookContext):
    """Sums the attention that each visual token receives while a model reads and writes (paper, section 3.2).

    The importance of visual token `v` is the sum over all layers and heads of the attention that it gets from the
    prompt tokens after the last visual token, and from the generated tokens, in float32 and per sample:
    `A[v] = sum_layers sum_heads (sum_q attn[q, v] + sum_g attn[g, v])`.

    It works on any supported transformers model, alone, and does not slow its attention kernel down. Queries that are
    padding, or that follow a sample's end of sequence while the rest of its batch goes on, do not count.

    Args:
        model (`PreTrainedModel`): The model to watch.
        visual_tokens (`VisualTokens`): Where the visual tokens stand in the prompts that it will be given.
        queries (`str`, *optional*, defaults to `"both"`): Whose attention to record: that of the `"prompt"`, of its
            `"last"` token alone, of the `"generated"` tokens, or of `"both"`, prompt and generated.
        layers (collection of `int`, *optional*): The decoder layers to record; all by default.

    Raises:
        ValueError: If the model's architecture or attention implementation cannot be recorded, or none of `layers` has
            attention; while running, if the model is given other prompts than `visual_tokens` describes, several
            beams, or a static cache.

    Example:
        ```python
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from transformers_sgl import AttentionRecorder, VisualTokens
        >>> from transformers_sgl.hub import embedded_pair

        >>> folder = embedded_pair() / "small"
        >>> small = AutoModelForImageTextToText.from_pretrained(folder)
        >>> processor = AutoProcessor.from_pretrained(folder)
        >>> chat = [{"role": "user", "content": [
        ...     {"type": "image", "path": str(embedded_pair() / "example.png")},
        ...     {"type": "text", "text": "describe the red triangle."},
        ... ]}]
        >>> inputs = processor.apply_chat_template(
        ...     chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ... )
        >>> visual_tokens = VisualTokens.from_input_ids(inputs["input_ids"], small.config.image_token_id)
        >>> with AttentionRecorder(small, visual_tokens) as recorder:
        ...     _ = small.generate(**inputs, max_new_tokens=4)
        >>> recorder.importance.shape
        torch.Size([1, 320])

        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        visual_tokens: VisualTokens,
        queries: Literal["prompt", "last", "generated", "both"] = "both",
        layers: Collection[int] | None = None,
    ) -> None:
        self.model = model
        self.visual_tokens = visual_tokens
        self.queries = queries
        self._decoder = decoder(model)
        self._patterns = {
            module: attention_pattern(model, index)
            for index, module in attention_modules(model).items()
            if layers is None or index in layers
        }
        if not self._patterns:
            raise ValueError(
                f"`layers` is {layers!r}, but the decoder layers with attention are "
                f"{sorted(attention_modules(model))}: name some of them."
            )
        attention_implementation(model)  # raises if it cannot be recorded

        zeros = torch.zeros(visual_tokens.positions.shape, dtype=torch.float32, device=visual_tokens.positions.device)
        self.prompt_importance: Tensor = zeros  # (batch, num_visual_tokens)
        self.generated_importance: Tensor = zeros.clone()  # (batch, num_visual_tokens)

        # Prompt queries that count: after the sample's last visual token, and not padding. (batch, prompt_length)
        after = torch.arange(visual_tokens.prompt_length, device=zeros.device) > visual_tokens.last_position[:, None]
        self._prompt_queries = after & visual_tokens.prompt_mask & visual_tokens.valid.any(dim=1, keepdim=True)
        if queries == "last":
            behind = self._prompt_queries.flip(1).cumsum(dim=1).flip(1)
            self._prompt_queries = self._prompt_queries & (behind == 1)
        # Prompt rows before this one count in no sample and are never computed.
        self._unfinished = visual_tokens.valid.any(dim=1)  # (batch,): samples whose generated tokens still count
        ends = visual_tokens.last_position[self._unfinished]
        self._first_row = int(ends.min()) + 1 if ends.numel() else visual_tokens.prompt_length
        self._end_ids = torch.tensor(_end_of_sequence_ids(model), device=zeros.device)
        self._num_seen = 0  # tokens in the forward passes so far, the current one included
        self._num_recorded = 0  # tokens in the passes before the current one
        self._first = self._end = 0  # positions of the current pass's tokens
        self._num_layers = 0  # layers of the current pass that have been recorded

    @property
    def importance(self) -> Tensor:
        """What has been recorded so far: `(batch, num_visual_tokens)` in float32, 0 where a sample has fewer."""
        return self.prompt_importance + self.generated_importance

    def finish(self, finished: Tensor) -> None:
        """Stops counting samples that have finished otherwise than by their model's own end of sequence.

        Args:
            finished (`Tensor` of shape `(batch,)`): `True` where the tokens from here on do not count.
        """
        self._unfinished = self._unfinished & ~finished.to(self._unfinished.device)

    def _register(self, stack: ExitStack) -> None:
        stack.callback(self._restore_attention)  # comes last, after nobody listens any more
        stack.callback(self.model.register_forward_pre_hook(self._note_ends, with_kwargs=True).remove)
        stack.callback(self._decoder.register_forward_pre_hook(self._start_pass, with_kwargs=True).remove)
        stack.callback(self._decoder.register_forward_hook(self._finish_pass).remove)
        for module in self._patterns:
            stack.callback(_listen(module, self))
        config: Any = self._decoder.config
        config._attn_implementation = _recording_implementation(config._attn_implementation)

    def _restore_attention(self) -> None:
        """Puts the model's own attention function back, unless another recorder still needs the recording one."""
        if not any(_LISTENERS.get(module) for module in self._patterns):
            config: Any = self._decoder.config
            config._attn_implementation = config._attn_implementation.removeprefix(_PREFIX)

    def _note_ends(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Model pre-hook: a sample that reads an end-of-sequence token has finished, whatever it is fed after."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is not None and self._num_seen > 0:
            newest = input_ids[:, -1].to(self._end_ids.device)
            self._unfinished = self._unfinished & ~torch.isin(newest, self._end_ids)

    def _start_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decoder pre-hook: which tokens of the whole sequence this pass reads."""
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            raise ValueError("Attention cannot be recorded of a decoder that is called without its inputs.")
        cache = kwargs.get("past_key_values")
        self._first = 0 if cache is None else int(cache.get_seq_length())
        self._end = self._first + inputs.shape[1]
        self._num_recorded = self._num_seen
        self._num_layers = 0
        self._check(inputs.shape[0])
        self._num_seen = self._end

    def _finish_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Decoder hook: what nobody recorded must not pass for unimportant."""
        if self._num_layers == 0:
            raise ValueError(
                "The model's attention implementation was changed while it was being recorded, or is not one of "
                "transformers' attention functions: change it before, and give each model a configuration object of "
                "its own."
            )

    def record(self, module: nn.Module, query: Tensor, key: Tensor, scores: _AttentionScores) -> None:
        """Adds one layer's attention on the visual tokens; called by the attention function.

        Args:
            module (`nn.Module`): The layer's attention.
            query (`Tensor` of shape `(batch, heads, query_length, head_dim)`): The last queries of this pass, rotated.
            key (`Tensor` of shape `(batch, key_value_heads, key_length, head_dim)`): The last keys, rotated.
            scores (`_AttentionScores`): How queries and keys become attention.
        """
        end, first_query, first_key = self._end, self._end - query.shape[2], self._end - key.shape[2]
        if first_key < 0:
            raise ValueError(
                f"The cache holds {key.shape[2]} tokens, but only {end} have been seen: attention cannot be recorded "
                "with a static cache or a prompt that is continued, so leave `cache_implementation` unset and start "
                "with the whole prompt."
            )
        pattern = self._patterns[module]
        if key.shape[2] < min(end, pattern.window or pattern.chunk or end):
            raise ValueError(
                "Attention cannot be recorded while tokens are pruned: let the recorder and the pruner follow each "
                "other, not enclose each other."
            )
        self._num_layers += 1
        tokens = self.visual_tokens.to(key.device)
        # A sliding window has lost the first keys; and they get no attention.
        columns = tokens.positions - first_key
        seen = tokens.valid & (columns >= 0)

        def received(start: int, stop: int, counted: Tensor) -> Tensor:
            rows = slice(start - first_query, stop - first_query)
            per_key = _received_attention(query, key, scores, rows, counted.to(key.device))
            per_token = per_key.gather(1, columns.clamp(min=0)) * seen  # (batch, num_visual_tokens)
            return per_token.to(self.prompt_importance.device)

        # Without a cache every pass repeats the tokens of the last one: they have been counted.
        new = max(first_query, self._num_recorded)
        start, stop = max(new, self._first_row), min(end, tokens.prompt_length)
        if start < stop and self.queries != "generated":
            self.prompt_importance += received(start, stop, self._prompt_queries[:, start:stop])
        start = max(new, tokens.prompt_length)
        if start < end and self.queries not in ("prompt", "last"):
            counted = self._unfinished[:, None].expand(-1, end - start)
            self.generated_importance += received(start, end, counted)

    def _check(self, batch_size: int) -> None:
        """Raises if the forward pass does not continue the prompts that the visual tokens belong to."""
        tokens = self.visual_tokens
        if batch_size != tokens.batch_size:
            raise ValueError(
                f"The model runs on a batch of {batch_size}, but the visual tokens belong to {tokens.batch_size} "
                "prompts: record one sequence per prompt (num_beams=1, num_return_sequences=1)."
            )
        if self._first > self._num_recorded:
            raise ValueError(
                f"The cache holds {self._first} tokens, but only {self._num_recorded} have been seen: attention "
                "cannot be recorded with a static cache or a prompt that is continued, so leave "
                "`cache_implementation` unset and start with the whole prompt."
            )
        if self._end < tokens.prompt_length or (self._first == 0 and self._end <= self._num_recorded):
            raise ValueError(
                f"The model reads {self._end} tokens, but the prompts have {tokens.prompt_length} and may be read "
                "only once: pass the prompts that the visual tokens were found in, whole, and use a new recorder for "
                "each call."
            )


def _listen(module: nn.Module, recorder: AttentionRecorder) -> Callable[[], None]:
    """Adds a listener to an attention module, and returns how it is removed."""
    _LISTENERS[module] = (*_LISTENERS.get(module, ()), recorder)

    def stop() -> None:
        left = tuple(each for each in _LISTENERS.get(module, ()) if each is not recorder)
        if left:
            _LISTENERS[module] = left
        else:
            _LISTENERS.pop(module, None)

    return stop


def _end_of_sequence_ids(model: PreTrainedModel) -> list[int]:
    """The ids after which a sample has finished; without an end of sequence, the padding that follows it."""
    settings = getattr(model, "generation_config", None)
    for name in ("eos_token_id", "pad_token_id"):
        ids = getattr(settings, name, None)
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []


def _recording_implementation(implementation: str) -> str:
    """The name of the attention function that does the same and records; registered with transformers when new."""
    if implementation.startswith(_PREFIX):  # recorders may be nested: one wrapper serves them all
        return implementation
    name = _PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
        AttentionInterface.register(name, functools.partial(_recording_attention, implementation))
    return name


def _recording_attention(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function `implementation` of transformers, which also tells the recorders what it is given."""
    forward = _attention_function(implementation, module)
    listeners = _LISTENERS.get(module, ())
    if listeners:
        if kwargs.get("position_bias") is not None:
            raise ValueError(
                "Attention cannot be recorded, because this model adds a bias for positions to it: use a small model "
                "with plain softmax attention."
            )
        scores = _AttentionScores(module, query, key, attention_mask, implementation, kwargs)
        for recorder in listeners:
            recorder.record(module, query, key, scores)
    # Flash attention looks its kernel up by the name on the configuration: there it must find its own.
    config: Any = module.config
    recording_implementation = config._attn_implementation
    config._attn_implementation = implementation
    try:
        return forward(module, query, key, value, attention_mask, *args, **kwargs)
    finally:
        config._attn_implementation = recording_implementation


def _attention_function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of that name; "eager" is not registered, each modeling file has its own."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


class _AttentionScores:
    """How a layer's queries and keys become attention, told by the arguments of its attention function.

    Which keys a query may attend to is told by the mask: `None` means all before it, `(batch, key_length)` those of
    them that are not padding (flash attention), `(batch or 1, heads or 1, query_length, key_length)` is the whole
    matrix, boolean (sdpa) or additive (eager).
    """

    def __init__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        attention_mask: Tensor | None,
        implementation: str,
        arguments: dict[str, Any],
    ) -> None:
        self.attention_mask = attention_mask
        self.offset = key.shape[2] - query.shape[2]
        self.key_length = key.shape[2]
        scaling = arguments.get("scaling")
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap = arguments.get("softcap")
        self.sinks = arguments.get("s_aux")  # (heads,): the logit of attending to nothing
        is_causal = arguments.get("is_causal")
        self.is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # Only flash attention is told of a sliding window; the others find it in their masks.
        self.window = arguments.get("sliding_window") if "flash" in implementation else None

    def __call__(self, query: Tensor, key: Tensor, rows: slice) -> Tensor:
        """The attention of some query rows; `(batch, key_value_heads, group, rows, key_length)` in float32."""
        grouped = query[:, :, rows].unflatten(1, (key.shape[1], -1))  # (batch, key_value_heads, group, rows, head_dim)
        scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)) * self.scaling
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = self._masked(scores, rows)
        if self.sinks is None:
            return torch.softmax(scores, dim=-1, dtype=torch.float32)
        sinks = self.sinks.to(scores).reshape(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]

    def _masked(self, scores: Tensor, rows: slice) -> Tensor:
        mask = self.attention_mask
        if mask is None or mask.dim() == 2:
            if mask is None and not self.is_causal:
                return scores
            position = torch.arange(self.key_length, device=scores.device)
            own = position[rows.start + self.offset : rows.stop + self.offset, None]
            allowed = position <= own
            if self.window is not None:
                allowed = allowed & (position > own - self.window)
            if mask is not None:
                allowed = allowed & mask.bool()[:, None, None, None, :]
            return scores.masked_fill(~allowed, float("-inf"))
        block = mask[:, :, rows].unsqueeze(2)  # (batch or 1, heads or 1, 1, rows, key_length)
        if block.shape[1] > 1:
            block = mask[:, :, rows].unflatten(1, scores.shape[1:3])
        return scores.masked_fill(~block, float("-inf")) if block.dtype == torch.bool else scores + block


def _received_attention(query: Tensor, key: Tensor, scores: _AttentionScores, rows: slice, weights: Tensor) -> Tensor:
    """The attention that every key gets from these query rows, summed over heads and rows.

    Args:
        query (`Tensor` of shape `(batch, heads, query_length, head_dim)`): All queries.
        key (`Tensor` of shape `(batch, key_value_heads, key_length, head_dim)`): All keys.
        scores (`_AttentionScores`): How they become attention.
        rows (`slice`): The query rows to sum.
        weights (`Tensor` of shape `(batch, rows)`): 1 or `True` for the rows that count in a sample.

    Returns:
        `Tensor` of shape `(batch, key_length)`: The sums in float32.
    """
    batch_size, num_heads, _, _ = query.shape
    key_length = key.shape[2]
    received = torch.zeros(batch_size, key_length, dtype=torch.float32, device=key.device)
    block_rows = max(1, _MAX_BLOCK_ELEMENTS // (batch_size * num_heads * key_length))
    for start in range(rows.start, rows.stop, block_rows):
        block = slice(start, min(start + block_rows, rows.stop))
        attention = scores(query, key, block)
        counted = weights[:, block.start - rows.start : block.stop - rows.start]
        # A padding query may attend to nothing at all and is NaN then: it is set to zero, not multiplied by it.
        attention = attention.masked_fill(~counted.bool()[:, None, None, :, None], 0.0)
        received += attention.sum(dim=(1, 2, 3))
    return received
