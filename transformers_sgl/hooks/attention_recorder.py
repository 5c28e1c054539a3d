"""Captures the attention that visual tokens receive, beside the model's own attention kernel.

While an [`AttentionRecorder`] is active, the decoder's attention function is its own (`sdpa`, `flash_attention_2`,
`eager`, ...) with this listener. Next to the kernel's output that computes only the attention rows that
matter: the queries after the last visual token. Each layer's rows are summed to `(batch, num_visual_tokens)` and
dropped: for the prompt at once, for generated tokens together at the end, because the cache keeps the keys anyway and
a decoding step need only remember its query. Layers without attention contribute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from threading import get_ident
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from transformers_sgl.architectures import (
    AttentionPattern,
    attention_implementation,
    attention_modules,
    attention_pattern,
    decoder,
    decoder_layers,
)
from transformers_sgl.hooks.attention_listening import listen
from transformers_sgl.hooks.attention_rows import AttentionScores, received_attention
from transformers_sgl.hooks.context import HookContext
from transformers_sgl.hooks.layer_arguments import named_arguments
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.transformers_interface import cache_of, held_keys

__all__ = ["AttentionRecorder"]


class AttentionRecorder(HookContext):
    """Sums the attention that each visual token receives while a model reads and writes (paper, section 3.2).

    The importance of visual token `v` is the sum over all layers and heads of the attention that it gets from the
    prompt tokens after the last visual token, and from the generated tokens, in float32 and per sample:
    `A[v] = sum_layers sum_heads (sum_q attn[q, v] + sum_g attn[g, v])`.

    It works on any supported transformers model, alone, and does not slow its attention kernel down. Padding queries
    do not count, nor do those after a sample's end of sequence. Until the end of the `with`, the keys in the model's
    cache are kept. Other threads may use the model meanwhile, unheard; a thread that is to be heard runs in a copy of
    the context: `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`.

    Args:
        model (`PreTrainedModel`): The model to record.
        visual_tokens (`VisualTokens`): Where the visual tokens stand in the prompts that it will be given.
        queries (`str`, *optional*, defaults to `"both"`): Whose attention to record: that of the `"prompt"`, of its
            `"last"` token alone, of the `"generated"` tokens, or of `"both"`, prompt and generated.
        layers (collection of `int`, *optional*): The decoder layers to record; all by default.
        records_features (`bool`, *optional*, defaults to `False`): Whether to keep what the decoder is given for each
            visual token, as `features` of shape `(batch, num_visual_tokens, width)`, 0 in padding.

    Raises:
        ValueError: If the model's architecture or attention implementation cannot be recorded, or none of `layers` has
            attention; while running, if the model is given other prompts than `visual_tokens` describes, several
            beams, or a static cache.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> from transformers_sgl import AttentionRecorder, VisualTokens
        >>> from transformers_sgl.hub import embedded_pair

        >>> small = AutoModelForImageTextToText.from_pretrained(embedded_pair() / "small")
        >>> image = small.config.image_token_id
        >>> prompt = torch.tensor([[20, *[image] * 64, 21, 22]])
        >>> visual_tokens = VisualTokens.from_input_ids(prompt, image)
        >>> with AttentionRecorder(small, visual_tokens) as recorder:
        ...     _ = small.generate(prompt, pixel_values=torch.zeros(1, 3, 64, 64), max_new_tokens=4)
        >>> recorder.importance.shape
        torch.Size([1, 64])

        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        visual_tokens: VisualTokens,
        queries: Literal["prompt", "last", "generated", "both"] = "both",
        layers: Collection[int] | None = None,
        records_features: bool = False,
    ) -> None:
        self.model = model
        self.visual_tokens = visual_tokens
        self.queries = queries
        self.features: Tensor | None = None  # (batch, num_visual_tokens, width)
        self._records_features = records_features
        self._decoder = decoder(model)
        self._index = {
            module: index for index, module in attention_modules(model).items() if layers is None or index in layers
        }
        self._patterns = {module: attention_pattern(model, index) for module, index in self._index.items()}
        self._sees_all = {module for module, pattern in self._patterns.items() if pattern == AttentionPattern()}
        if not self._patterns:
            raise ValueError(
                f"`layers` is {layers!r}, but the decoder layers with attention are "
                f"{sorted(attention_modules(model))}: name some of them."
            )
        attention_implementation(model)  # raises if it cannot be recorded

        zeros = torch.zeros(visual_tokens.positions.shape, dtype=torch.float32, device=visual_tokens.positions.device)
        self.prompt_importance: Tensor = zeros  # (batch, num_visual_tokens)
        self._generated_importance: Tensor = zeros.clone()  # (batch, num_visual_tokens)

        # Prompt queries that count: after the sample's last visual token, and not padding. (batch, prompt_length)
        after = torch.arange(visual_tokens.prompt_length, device=zeros.device) > visual_tokens.last_position[:, None]
        self._prompt_queries = after & visual_tokens.prompt_mask & visual_tokens.valid.any(dim=1, keepdim=True)
        if queries == "last":
            behind = self._prompt_queries.flip(1).cumsum(dim=1).flip(1)
            self._prompt_queries = self._prompt_queries & (behind == 1)
        # Prompt rows before this one count in no sample and are never computed.
        self._unfinished = visual_tokens.valid.any(dim=1)  # (batch,): samples whose generated tokens still count
        self._counted: list[Tensor] = []  # the same at each generated token, (batch, 1 or more)
        self._waiting: dict[nn.Module, _WaitingQueries] = {}  # generated tokens that are not recorded yet
        ends = visual_tokens.last_position[self._unfinished]
        self._first_row = int(ends.min()) + 1 if ends.numel() else visual_tokens.prompt_length
        self._end_ids = torch.tensor(_end_of_sequence_ids(model), device=zeros.device)
        self._num_seen = 0  # tokens in the forward passes so far, the current one included
        self._num_recorded = 0  # tokens in the passes before the current one
        self._first = self._end = 0  # positions of the current pass's tokens
        self._num_layers = 0  # layers of the current pass that have been recorded
        self._cache: Cache | None = None  # of the current pass
        self._threads: list[int] = []  # the first is the one that runs the call

    @property
    def generated_importance(self) -> Tensor:
        """The generated tokens' part of the importance so far: `(batch, num_visual_tokens)` in float32."""
        for module in list(self._waiting):
            self._record_waiting(module)
        return self._generated_importance

    @property
    def importance(self) -> Tensor:
        """The importance so far: `(batch, num_visual_tokens)` in float32, 0 in padding."""
        return self.prompt_importance + self.generated_importance

    def finish(self, finished: Tensor) -> None:
        """Stops counting samples that have `finished`, `(batch,)`, other than by an end of sequence."""
        self._unfinished = self._unfinished & ~finished.to(self._unfinished.device)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Records waiting queries, and removes the hooks."""
        try:
            if kind is None:
                _ = self.generated_importance
        finally:
            super().__exit__(kind, error, traceback)

    def _register(self, stack: ExitStack) -> None:
        listen(stack, self, self._patterns, attention_modules(self.model).values(), self._decoder.config)
        stack.callback(self._waiting.clear)
        self._add_hook(stack, self.model.register_forward_pre_hook, self._note_ends, with_kwargs=True)
        self._add_hook(stack, self._decoder.register_forward_pre_hook, self._start_pass, with_kwargs=True)
        self._add_hook(stack, self._decoder.register_forward_hook, self._finish_pass)
        if self._records_features:
            first = decoder_layers(self.model)[0]
            self._add_hook(stack, first.register_forward_pre_hook, self._start_layer, with_kwargs=True)

    def _note_ends(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Model pre-hook: a sample that reads an end-of-sequence token has finished."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is not None and self._num_seen > 0:
            newest = input_ids[:, -1].to(self._end_ids.device)
            self._unfinished = self._unfinished & ~torch.isin(newest, self._end_ids)

    def _start_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decoder pre-hook: finds the tokens of the whole sequence that this pass reads."""
        inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            raise ValueError("Attention cannot be recorded of a decoder that is called without its inputs.")
        if not self._threads:
            self._threads.append(get_ident())
        if self._threads[0] != get_ident():
            raise ValueError("Another thread runs the call that is being recorded: use a new recorder for each call.")
        self._cache = cache_of(kwargs)
        self._first = 0 if self._cache is None else int(self._cache.get_seq_length())
        self._end = self._first + inputs.shape[1]
        self._num_recorded = self._num_seen
        self._num_layers = 0
        self._check(inputs.shape[0])
        num_generated = self._end - max(self._num_recorded, self.visual_tokens.prompt_length)
        if num_generated > 0:
            self._counted.append(self._unfinished[:, None].expand(-1, num_generated))
        if inputs.is_floating_point():
            self._note_features(inputs)
        self._num_seen = self._end

    def _start_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the first layer: a decoder that is given token ids embeds them, and the images, itself."""
        if self.features is None:
            self._note_features(named_arguments(layer, args, kwargs)["hidden_states"])

    def _note_features(self, inputs: Tensor) -> None:
        """Keeps what the decoder is given in its first pass, `(batch, length, width)`, for each visual token."""
        if not self._records_features or self.features is not None:
            return
        tokens = self.visual_tokens.to(inputs.device)
        rows = inputs.detach().gather(1, tokens.positions[..., None].expand(-1, -1, inputs.shape[-1]))
        self.features = (rows * tokens.valid[..., None]).to(self.prompt_importance.device)

    def _finish_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Decoder hook: raises if a layer was not recorded, which would look like less importance."""
        if self._num_layers < len(self._patterns):
            raise ValueError(
                "The model's attention implementation was changed while it was being recorded, or is not one of "
                "transformers' attention functions: change it before, and give each model a configuration object of "
                "its own."
            )

    def record(self, module: nn.Module, query: Tensor, key: Tensor, scores: Callable[[], AttentionScores]) -> None:
        """Adds one layer's attention on the visual tokens; called by the attention function.

        `query` has the shape `(batch, heads, query_length, head_dim)`, `key`
        `(batch, key_value_heads, key_length, head_dim)`: the last ones, rotated. `scores` returns how they become
        attention.
        """
        end, first_query = self._end, self._end - query.shape[2]  # positions in the whole sequence
        if key.shape[2] > end:
            raise ValueError(
                f"The cache holds {key.shape[2]} tokens, but only {end} have been seen: attention cannot be recorded "
                "with a static cache or a prompt that is continued, so leave `cache_implementation` unset and start "
                "with the whole prompt."
            )
        pattern = self._patterns[module]
        if key.shape[2] < end and key.shape[2] < min(end, pattern.window or pattern.chunk or end):
            raise ValueError(
                "Attention cannot be recorded while tokens are pruned: let the recorder and the pruner follow each "
                "other, not enclose each other."
            )
        self._num_layers += 1

        # Without a cache every pass repeats the tokens of the last one, which have been counted.
        new = max(first_query, self._num_recorded)
        start, stop = max(new, self._first_row), min(end, self.visual_tokens.prompt_length)
        if start < stop and self.queries != "generated":
            rows = query[:, :, start - first_query : stop - first_query]
            counted = self._prompt_queries[:, start:stop]
            self.prompt_importance += self._received(rows, key, scores(), counted, stop, end)
        start = max(new, self.visual_tokens.prompt_length)
        if start < end and self.queries not in ("prompt", "last"):
            rows = query if start == first_query else query[:, :, start - first_query :]
            waiting = self._waiting.get(module)
            if not self._can_wait(module, key):
                self._record_waiting(module)
                counted = self._unfinished[:, None].expand(-1, end - start)
                self._generated_importance += self._received(rows, key, scores(), counted, end, end)
            elif waiting is not None and waiting.end == start:
                waiting.queries.append(rows)
                waiting.key, waiting.scores, waiting.end = key, scores, end
            else:
                self._record_waiting(module)
                self._waiting[module] = _WaitingQueries(start, [rows], key, scores, end)

    def _can_wait(self, module: nn.Module, key: Tensor) -> bool:
        """Whether queries may be recorded later: no earlier key is lost, and the cache holds the keys itself."""
        return module in self._sees_all and held_keys(self._cache, self._index[module]) is key

    def _record_waiting(self, module: nn.Module) -> None:
        """Adds the attention of the queries that wait in a layer."""
        waiting = self._waiting.pop(module, None)
        if waiting is not None:
            start, end = (each - self.visual_tokens.prompt_length for each in (waiting.start, waiting.end))
            counted = torch.cat(self._counted, dim=1)[:, start:end]
            self._generated_importance += self._received(
                torch.cat(waiting.queries, dim=2),
                waiting.key,
                waiting.scores().of_last(end - start),
                counted,
                waiting.end,
                waiting.end,
            )

    def _received(
        self, query: Tensor, key: Tensor, scores: AttentionScores, counted: Tensor, query_end: int, key_end: int
    ) -> Tensor:
        """The attention that visual tokens get from some query rows; `(batch, num_visual_tokens)`.

        The two ends are the positions after the last query and the last key.
        """
        tokens = self.visual_tokens.to(key.device)
        # A sliding window has lost the first keys, which get no attention.
        columns = tokens.positions - (key_end - key.shape[2])
        seen = tokens.valid & (columns >= 0)
        per_key = received_attention(query, key, scores, key_end - query_end, counted.to(key.device))
        per_token = per_key.gather(1, columns.clamp(min=0)) * seen
        return per_token.to(self.prompt_importance.device)

    def _check(self, batch_size: int) -> None:
        """Raises if the forward pass does not continue the prompts of the visual tokens."""
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


@dataclass
class _WaitingQueries:
    """Queries of consecutive generated tokens in one layer: from position `start`, and before `end`.

    `queries` have the shape `(batch, heads, 1 or more, head_dim)`; `key` holds all keys up to the last query.
    """

    start: int
    queries: list[Tensor]
    key: Tensor
    scores: Callable[[], AttentionScores]
    end: int


def _end_of_sequence_ids(model: PreTrainedModel) -> list[int]:
    """The ids after which a sample has finished; without an end of sequence, the padding id."""
    settings = getattr(model, "generation_config", None)
    for name in ("eos_token_id", "pad_token_id"):
        ids = getattr(settings, name, None)
        if ids is not None:
            return ids if isinstance(ids, list) else [ids]
    return []
