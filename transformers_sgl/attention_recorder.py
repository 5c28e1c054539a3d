"""Capturing the attention that visual tokens receive, beside the model's own attention kernel.

Floor 1. While an [`AttentionRecorder`] is active, a hook on every self-attention module hands the recorder to the
attention function as one more keyword argument. The function is the model's own (`sdpa`, `flash_attention_2`,
`eager`, ...) wrapped in `_recording_attention`, which computes, next to the kernel's output, only those rows of the
attention matrix that matter: the queries after the last visual token. Each layer's rows are summed to
`(batch, num_visual_tokens)` on arrival and dropped.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_sgl.architectures import attention_implementation, attention_modules, decoder
from transformers_sgl.hook_context import HookContext
from transformers_sgl.visual_tokens import VisualTokens

__all__ = ["AttentionRecorder"]

_PREFIX = "sgl_recording_"
# The largest block of attention weights to hold at a time, in elements: 64 MiB of float32.
_MAX_BLOCK_ELEMENTS = 1 << 24


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
        queries (`str`, *optional*, defaults to `"both"`): Whose attention to record: that of the `"prompt"`, of the
            `"generated"` tokens, or of `"both"`.

    Raises:
        ValueError: If the model's architecture or attention implementation cannot be recorded; while running, if the
            model is given other prompts than `visual_tokens` describes, several beams, or a static cache.

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
        queries: Literal["prompt", "generated", "both"] = "both",
    ) -> None:
        self.model = model
        self.visual_tokens = visual_tokens
        self.queries = queries
        self._attention_modules = attention_modules(model)
        self._config = decoder(model).config
        attention_implementation(model)  # raises if it cannot be recorded

        zeros = torch.zeros(visual_tokens.positions.shape, dtype=torch.float32, device=visual_tokens.positions.device)
        self.prompt_importance: Tensor = zeros  # (batch, num_visual_tokens)
        self.generated_importance: Tensor = zeros.clone()  # (batch, num_visual_tokens)

        # Prompt queries that count: after the sample's last visual token, and not padding. (batch, prompt_length)
        after = torch.arange(visual_tokens.prompt_length, device=zeros.device) > visual_tokens.last_position[:, None]
        self._prompt_queries = after & visual_tokens.prompt_mask & visual_tokens.valid.any(dim=1, keepdim=True)
        # Prompt rows before this one count in no sample and are never computed.
        self._unfinished = visual_tokens.valid.any(dim=1)  # (batch,): samples whose generated tokens still count
        ends = visual_tokens.last_position[self._unfinished]
        self._first_row = int(ends.min()) + 1 if ends.numel() else visual_tokens.prompt_length
        self._end_ids = torch.tensor(_end_of_sequence_ids(model), device=zeros.device)
        self._num_recorded = 0  # tokens of the forward passes before the current one
        self._num_seen = 0  # tokens up to and including the current forward pass

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
        stack.callback(self._restore_attention)  # comes last, after the hooks are gone
        stack.callback(self.model.register_forward_pre_hook(self._start_forward, with_kwargs=True).remove)
        for module in self._attention_modules:
            stack.callback(module.register_forward_pre_hook(self._hand_over, with_kwargs=True).remove)
        self._config._attn_implementation = _recording_implementation(attention_implementation(self.model))

    def _restore_attention(self) -> None:
        """Puts the model's own attention function back, unless another recorder still needs the recording one."""
        hooks = [hook for module in self._attention_modules for hook in module._forward_pre_hooks.values()]
        if not any(isinstance(getattr(hook, "__self__", None), AttentionRecorder) for hook in hooks):
            self._config._attn_implementation = self._config._attn_implementation.removeprefix(_PREFIX)

    def _start_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Model pre-hook: a sample that reads an end-of-sequence token has finished, whatever it is fed after."""
        self._num_recorded = self._num_seen
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is not None and self._num_recorded > 0:
            newest = input_ids[:, -1].to(self._end_ids.device)
            self._unfinished = self._unfinished & ~torch.isin(newest, self._end_ids)

    def _hand_over(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Attention pre-hook: keyword arguments of the module reach its attention function untouched."""
        if not self._config._attn_implementation.startswith(_PREFIX):
            raise ValueError(
                "The model's attention implementation was changed while it was being recorded: change it before, and "
                "give each model a configuration object of its own."
            )
        return args, {**kwargs, "attention_recorders": [*kwargs.get("attention_recorders", ()), self]}

    def record(self, query: Tensor, key: Tensor, allowed: _AllowedKeys, scaling: float) -> None:
        """Adds one layer's attention on the visual tokens; called by the attention function.

        Args:
            query (`Tensor` of shape `(batch, heads, query_length, head_dim)`): The queries, rotated.
            key (`Tensor` of shape `(batch, key_value_heads, key_length, head_dim)`): The keys, rotated.
            allowed (`_AllowedKeys`): Which keys a block of queries may attend to.
            scaling (`float`): The factor on the dot products.
        """
        first, end = key.shape[2] - query.shape[2], key.shape[2]  # positions of the queries, in the whole sequence
        self._check(query.shape[0], first, end)
        self._num_seen = end
        tokens = self.visual_tokens.to(key.device)

        def received(start: int, stop: int, counted: Tensor) -> Tensor:
            rows = slice(start - first, stop - first)
            per_key = _received_attention(query, key, allowed, scaling, rows, counted.to(key.device))
            per_token = per_key.gather(1, tokens.positions) * tokens.valid  # (batch, num_visual_tokens)
            return per_token.to(self.prompt_importance.device)

        # Without a cache every pass repeats the tokens of the last one: they have been counted.
        new = max(first, self._num_recorded)
        start, stop = max(new, self._first_row), min(end, tokens.prompt_length)
        if start < stop and self.queries != "generated":
            self.prompt_importance += received(start, stop, self._prompt_queries[:, start:stop])
        start = max(new, tokens.prompt_length)
        if start < end and self.queries != "prompt":
            counted = self._unfinished[:, None].expand(-1, end - start)
            self.generated_importance += received(start, end, counted)

    def _check(self, batch_size: int, first: int, end: int) -> None:
        """Raises if the forward pass does not continue the prompts that the visual tokens belong to."""
        tokens = self.visual_tokens
        if batch_size != tokens.batch_size:
            raise ValueError(
                f"The model runs on a batch of {batch_size}, but the visual tokens belong to {tokens.batch_size} "
                "prompts: record one sequence per prompt (num_beams=1, num_return_sequences=1)."
            )
        if first > self._num_recorded:
            raise ValueError(
                f"The cache holds {first} tokens, but only {self._num_recorded} have been seen: attention cannot be "
                "recorded with a static cache or a prompt that is continued, so leave `cache_implementation` unset "
                "and start with the whole prompt."
            )
        if end < tokens.prompt_length or (first == 0 and end <= self._num_recorded):
            raise ValueError(
                f"The model reads {end} tokens, but the prompts have {tokens.prompt_length} and may be read only "
                "once: pass the prompts that the visual tokens were found in, whole, and use a new recorder for each "
                "call."
            )


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
    *,
    scaling: float | None = None,
    attention_recorders: Iterable[AttentionRecorder] = (),
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function `implementation` of transformers, which also tells the recorders what it is given."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    changed = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    for recorder in attention_recorders:
        if changed:
            raise ValueError(
                f"Attention cannot be recorded, because this model changes its attention by {', '.join(changed)}: use "
                "a small model with plain softmax attention."
            )
        recorder.record(query, key, _AllowedKeys(attention_mask, query.shape[2], key.shape[2]), scale)
    forward = _attention_function(implementation, module)
    # Flash attention looks its kernel up by the name on the configuration: there it must find its own.
    config: Any = module.config
    recording_implementation = config._attn_implementation
    config._attn_implementation = implementation
    try:
        return forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    finally:
        config._attn_implementation = recording_implementation


def _attention_function(implementation: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function of that name; "eager" is not registered, each modeling file has its own."""
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


class _AllowedKeys:
    """Which keys a block of queries may attend to, from any of the masks that transformers builds.

    `None` means plain causal attention, `(batch, key_length)` a padding mask on top of it (flash attention),
    `(batch or 1, heads or 1, query_length, key_length)` the whole matrix: boolean (sdpa) or additive (eager).
    """

    def __init__(self, attention_mask: Tensor | None, query_length: int, key_length: int) -> None:
        if attention_mask is not None and attention_mask.shape[-1] != key_length:
            raise ValueError(
                f"The attention mask covers {attention_mask.shape[-1]} keys, but there are {key_length}: attention "
                "cannot be recorded while tokens are pruned, or with a static or sliding-window cache, so leave "
                "`cache_implementation` unset."
            )
        self.attention_mask = attention_mask
        self.offset = key_length - query_length
        self.key_length = key_length

    def apply(self, scores: Tensor, rows: slice) -> Tensor:
        """Masks the scores `(batch, key_value_heads, group, rows, key_length)` of these query rows."""
        mask = self.attention_mask
        if mask is None or mask.dim() == 2:
            position = torch.arange(self.key_length, device=scores.device)
            causal = position <= position[rows.start + self.offset : rows.stop + self.offset, None]
            padding = True if mask is None else mask.bool()[:, None, None, None, :]
            return scores.masked_fill(~(causal & padding), float("-inf"))
        block = mask[:, :, rows].unsqueeze(2)  # (batch or 1, heads or 1, 1, rows, key_length)
        if block.shape[1] > 1:
            block = mask[:, :, rows].unflatten(1, scores.shape[1:3])
        return scores.masked_fill(~block, float("-inf")) if block.dtype == torch.bool else scores + block


def _received_attention(
    query: Tensor, key: Tensor, allowed: _AllowedKeys, scaling: float, rows: slice, weights: Tensor
) -> Tensor:
    """The attention that every key gets from these query rows, summed over heads and rows.

    Args:
        query (`Tensor` of shape `(batch, heads, query_length, head_dim)`): All queries.
        key (`Tensor` of shape `(batch, key_value_heads, key_length, head_dim)`): All keys.
        allowed (`_AllowedKeys`): Which keys a row may attend to.
        scaling (`float`): The factor on the dot products.
        rows (`slice`): The query rows to sum.
        weights (`Tensor` of shape `(batch, rows)`): 1 or `True` for the rows that count in a sample.

    Returns:
        `Tensor` of shape `(batch, key_length)`: The sums in float32.
    """
    batch_size, num_heads, _, _ = query.shape
    num_groups, key_length = key.shape[1], key.shape[2]
    received = torch.zeros(batch_size, key_length, dtype=torch.float32, device=key.device)
    block_rows = max(1, _MAX_BLOCK_ELEMENTS // (batch_size * num_heads * key_length))
    for start in range(rows.start, rows.stop, block_rows):
        block = slice(start, min(start + block_rows, rows.stop))
        grouped = query[:, :, block].unflatten(1, (num_groups, -1))  # (batch, key_value_heads, group, rows, head_dim)
        scores = torch.matmul(grouped, key.unsqueeze(2).transpose(-1, -2)) * scaling
        attention = torch.softmax(allowed.apply(scores, block), dim=-1, dtype=torch.float32)
        counted = weights[:, block.start - rows.start : block.stop - rows.start]
        # A padding query may attend to nothing at all and is NaN then: it is set to zero, not multiplied by it.
        attention = attention.masked_fill(~counted.bool()[:, None, None, :, None], 0.0)
        received += attention.sum(dim=(1, 2, 3))
    return received
