"""Dropping visual tokens in the middle of a decoder.

Floor 1. The layers below `prune_layer` run on the whole prompt; the layers from there on see only the kept tokens,
and so their caches are shorter. Everything is done by forward pre-hooks that change what a layer is handed:

    hidden states        gathered once, at `prune_layer`
    rotary embeddings    gathered at every layer from there on, because the model's own loop hands each layer the
                         originals, as are all other arguments with one row per token; kept tokens keep their original
                         positions
    position ids         gathered, or withheld from flash attention, which looks for gaps in them and would take a
                         pruned prompt for several packed ones
    attention mask       in the prefill, the rows and columns of the kept tokens, so that whatever pattern the mask
                         has survives; while decoding, made anew from the tokens' original positions

In a batch the kept tokens of each sample are aligned to the right, so that the last column is the last token of
every sample, whatever was padded or dropped; the columns in front that only fill up are masked.

A layer with a sliding window looks as far back as it would have in the whole prompt. A layer that mixes its tokens by
a linear recurrence or a convolution is handed the kept tokens as if the others had never been there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from transformers_sgl.architectures import (
    AttentionPattern,
    attention_implementation,
    attention_modules,
    attention_pattern,
    check_prunable,
    check_supported,
    decoder,
    decoder_layers,
    key_sources,
)
from transformers_sgl.generation_config_sgl import resolve_prune_layer
from transformers_sgl.hook_context import HookContext
from transformers_sgl.transformers_interface import PER_TOKEN_ARGUMENTS, cache_of, needs_position_ids

__all__ = ["VisualTokenPruner"]


class VisualTokenPruner(HookContext):
    """Lets a model's upper decoder layers see only some of the prompt's tokens (paper, section 3.2).

    It works on any supported transformers model, alone, for `generate` and for `forward` (without `labels`, because
    the logits are those of the kept tokens), with greedy search, sampling and beams, with a dynamic cache or none, and
    with padding on either side. Inside the `with`, the model takes exactly the prompts that `keep_mask` describes.
    Outside it, the model is what it was.

    Args:
        model (`PreTrainedModel`): The model to prune.
        keep_mask (`Tensor` of shape `(batch, prompt_length)`): `True` for prompt tokens to keep, `False` for dropped
            tokens and for padding; see [`VisualTokens.prompt_keep_mask`]. Or a function that returns it, asked when
            the prefill reaches `prune_layer`, so that the layers below can have a say.
        prune_layer (`int` or `float`, defaults to 9/48): The first decoder layer that sees fewer tokens: an index, or
            a fraction of the depth in `[0, 1)`.

    Raises:
        ValueError: If the model cannot be pruned, the layer does not exist or a prompt would keep no token; while
            running, if the model is given other prompts, a static cache or an attention mask that cannot be cut.

    Example:
        ```python
        >>> import torch
        >>> from transformers import AutoModelForImageTextToText
        >>> from transformers_sgl import VisualTokenPruner
        >>> from transformers_sgl.hub import embedded_pair
        >>> from transformers_sgl.transformers_interface import cache_of

        >>> large = AutoModelForImageTextToText.from_pretrained(embedded_pair() / "large")
        >>> prompt = torch.arange(20, 32)[None]  # any twelve tokens
        >>> keep = torch.ones(1, 12, dtype=torch.bool)
        >>> keep[:, 4:8] = False
        >>> with VisualTokenPruner(large, keep, prune_layer=2):
        ...     cache = cache_of(large(prompt))
        >>> [layer.get_seq_length() for layer in cache.layers[:4]]
        [12, 12, 8, 8]

        ```
    """

    def __init__(
        self, model: PreTrainedModel, keep_mask: Tensor | Callable[[], Tensor], prune_layer: int | float = 9 / 48
    ) -> None:
        architecture = check_supported(model.config)
        layers = list(decoder_layers(model))
        self.prune_layer = resolve_prune_layer(prune_layer, len(layers))
        check_prunable(model.config, self.prune_layer)
        self._model = model
        self._decoder = decoder(model)
        self._per_token = {**PER_TOKEN_ARGUMENTS, **architecture.per_token_arguments}
        self._key_sources = key_sources(model.config)
        self._deepstack = architecture.deepstack
        self._implementation = attention_implementation(model)
        attention = attention_modules(model)
        if "flash" in self._implementation and any(needs_position_ids(module) for module in attention.values()):
            raise ValueError(
                f"This {model.config.model_type!r} model's attention reads the positions of its tokens, and flash "
                "attention would take the gaps in them for the borders of several prompts: load the large model with "
                "'sdpa' or 'eager'."
            )
        # Where attention is, what a token sees there; elsewhere `None`.
        self._patterns = {
            layer: attention_pattern(model, index) if index in attention else None
            for index, layer in enumerate(layers)
            if index >= self.prune_layer
        }
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._attention_indices = sorted(attention)
        self._choose = keep_mask if callable(keep_mask) else None
        self._kept = None if callable(keep_mask) else _KeptTokens.from_mask(keep_mask)
        # Of the forward pass that is running:
        self._start_cut: Callable[[_KeptTokens], _Cut] | None = None
        self._cuts: dict[torch.device, _Cut] = {}  # by device
        self._added: dict[int, Tensor] = {}  # what deepstack adds to the inputs of pruned layers
        self._positions_given = True

    def _register(self, stack: ExitStack) -> None:
        stack.callback(self._cuts.clear)
        stack.callback(self._added.clear)
        stack.callback(setattr, self, "_start_cut", None)
        if self.prune_layer == 0:
            hook = self._model.register_forward_pre_hook(self._note_positions, with_kwargs=True)
            stack.callback(hook.remove)
        stack.callback(self._decoder.register_forward_pre_hook(self._start_pass, with_kwargs=True).remove)
        for layer in self._patterns:
            stack.callback(layer.register_forward_pre_hook(self._prune_layer_inputs, with_kwargs=True).remove)

    def _note_positions(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Model pre-hook: whether the model was told its positions, or has to count them."""
        self._positions_given = kwargs.get("position_ids") is not None

    def _start_pass(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decoder pre-hook: what the decoder does by itself must fit a shorter prompt."""
        kwargs = dict(kwargs)
        inputs: Any = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        past = self._past_length(cache_of(kwargs))
        self._cuts.clear()
        self._start_cut = partial(_KeptTokens.cut, past=past, inputs=inputs, query_length=inputs.shape[1])
        if self._kept is not None and self.prune_layer == 0 and past and not self._positions_given:
            # The model counts from the cache of the first layer, which is short of the dropped tokens.
            position_ids = kwargs.get("position_ids")
            kwargs["position_ids"] = (
                self._cut(inputs.device).positions if position_ids is None else position_ids + self._kept.num_dropped
            )
        self._added.clear()
        if self._deepstack is not None and kwargs.get(self._deepstack[1]) is not None:
            places, added = (kwargs[name] for name in self._deepstack)
            # Either layers are named before which something is added, or something is added behind the first layers.
            # The model goes on to add what comes before the tokens are dropped; the rest is ours.
            if isinstance(added, dict):
                kwargs[self._deepstack[1]] = {
                    index: each for index, each in added.items() if index <= self.prune_layer
                }
            else:
                kwargs[self._deepstack[1]] = added[: self.prune_layer]
                added = dict(enumerate(added, start=1))
            for index, each in added.items():
                if index > self.prune_layer:
                    whole = each.new_zeros(*inputs.shape[:2], each.shape[-1])
                    whole[places.reshape(inputs.shape[:2])] = each
                    self._added[index] = whole
        if self._choose is None:  # what does not fit is found before the lower layers have run
            self._cut(inputs.device)
        return args, kwargs

    def _cut(self, device: torch.device) -> _Cut:
        """What this pass must be cut down to; with a device map each device gets its own copy of the indices, once."""
        if not self._cuts:
            assert self._start_cut is not None
            if self._kept is None:
                assert self._choose is not None
                self._kept = _KeptTokens.from_mask(self._choose())
            self._cuts[device] = self._start_cut(self._kept)
        cut = self._cuts.get(device) or next(iter(self._cuts.values()))
        if device != cut.device:
            cut = self._cuts.setdefault(device, replace(cut, device=device, memo={}))
        return cut

    def _prune_layer_inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Layer pre-hook: hands a layer the kept tokens only."""
        kwargs = {**dict(zip(_parameter_names(layer.__class__.forward), args, strict=False)), **kwargs}
        hidden_states = kwargs.pop("hidden_states")
        cut = self._cut(hidden_states.device)
        if self._index[layer] == self.prune_layer:
            hidden_states = cut.rows_of(hidden_states)
        if self._index[layer] in self._added:
            hidden_states = hidden_states + cut.rows_of(self._added[self._index[layer]]).to(hidden_states)

        num_queries = hidden_states.shape[-2]  # fewer where the model itself goes on with the last tokens only
        if "flash" in self._implementation:
            kwargs["position_ids"] = None
        for name, axis in self._per_token.items():
            whole = kwargs.get(name)
            if whole is not None and not cut.past:  # while decoding, every token stays
                rows = partial(cut.last_rows_of, num=num_queries, axis=axis)
                kwargs[name] = cut.once((name, num_queries), whole, partial(_map_tensors, rows, whole))
        mask, pattern = kwargs.get("attention_mask"), self._patterns[layer]
        if pattern is None:
            kwargs["attention_mask"] = cut.padding_mask()
        else:
            num_keys = self._num_keys(cache_of(kwargs), layer, num_queries, cut)
            form = (pattern, num_queries, num_keys, self._implementation, hidden_states.dtype)
            kwargs["attention_mask"] = cut.once(form, mask, partial(cut.mask, mask, *form))
        return (hidden_states,), kwargs

    def _past_length(self, cache: Cache | None) -> int:
        """How many tokens of the whole sequence lie before this pass, to judge by the cache."""
        if cache is None:
            return 0
        if cache.is_compileable:
            raise ValueError(
                "Pruning makes the caches of the layers differ in length, which a static cache cannot hold: leave "
                "`cache_implementation` unset, or set it to 'dynamic'."
            )
        index = self._attention_indices[0]
        length = int(cache.get_seq_length(index))
        if length == 0 or index < self.prune_layer or self._kept is None:
            return length
        return length + self._kept.num_dropped

    def _num_keys(self, cache: Cache | None, layer: nn.Module, num_queries: int, cut: _Cut) -> int:
        """How many keys the layer's attention will have before it, its own included."""
        index = self._index[layer]
        source = self._key_sources.get(index, index)
        if cache is None:
            return cut.key_positions.shape[1]
        if source == index:
            return int(cache.get_mask_sizes(num_queries, index)[0])
        # The lower layer has run, so its cache holds this pass's tokens already.
        length = int(cache.get_seq_length(source))
        window = (self._patterns[layer] or AttentionPattern()).window
        return length if window is None else min(length, cut.end - cut.past + window - 1)


@dataclass(frozen=True)
class _KeptTokens:
    """The kept tokens of a batch of prompts, aligned to the right.

    Attributes:
        starts (`Tensor` of shape `(batch,)`): The first kept position.
        positions (`Tensor` of shape `(batch, num_kept)`): Prompt positions in ascending order, 0 where only filling.
        valid (`Tensor` of shape `(batch, num_kept)`, or `None`): `False` where only filling; `None` if no sample
            needs filling, which lets the fast attention kernels run without a mask.
        prompt_length (`int`): The number of columns of the prompts.
    """

    starts: Tensor
    positions: Tensor
    valid: Tensor | None
    prompt_length: int

    @classmethod
    def from_mask(cls, keep_mask: Tensor) -> _KeptTokens:
        """From `(batch, prompt_length)` booleans."""
        if keep_mask.dim() != 2 or keep_mask.dtype != torch.bool:
            raise ValueError(
                "`keep_mask` must be a boolean tensor of shape (batch, prompt_length), but it is "
                f"{keep_mask.dtype} of shape {tuple(keep_mask.shape)}."
            )
        counts = keep_mask.sum(dim=1)
        if counts.numel() == 0 or int(counts.min()) == 0:
            raise ValueError("`keep_mask` keeps no token of a prompt: keep at least the prompt's text.")
        num_kept = int(counts.max())
        # A stable sort puts the kept positions last, in order; the fillers before them are pointed at position 0.
        positions = torch.argsort(keep_mask.long(), dim=1, stable=True)[:, -num_kept:]
        valid = torch.arange(num_kept, device=keep_mask.device) >= num_kept - counts[:, None]
        positions = positions.masked_fill(~valid, 0)
        starts = keep_mask.long().argmax(dim=1)
        return cls(starts, positions, None if bool(valid.all()) else valid, keep_mask.shape[1])

    @property
    def num_dropped(self) -> int:
        """How many columns of the prompts are gone."""
        return self.prompt_length - self.positions.shape[1]

    def cut(self, past: int, inputs: Tensor, query_length: int) -> _Cut:
        """What a forward pass must be cut down to.

        Args:
            past (`int`): The tokens of the whole sequence before this pass.
            inputs (`Tensor` of shape `(batch, ...)`): The pass's input; tells batch size and device.
            query_length (`int`): The number of tokens in this pass, before the cut.

        Returns:
            `_Cut`: The rows and columns that remain.
        """
        end = past + query_length
        # Beams and `num_return_sequences` repeat each prompt, one copy after the other.
        repeats, remainder = divmod(inputs.shape[0], self.positions.shape[0])
        if remainder or end < self.prompt_length or 0 < past < self.prompt_length:
            raise ValueError(
                f"The model was given {inputs.shape[0]} sequences of {end} tokens, but the tokens to keep were chosen "
                f"for {self.positions.shape[0]} prompts of {self.prompt_length}: pass those prompts, whole (no "
                "`prefill_chunk_size`, no cache of an earlier call)."
            )
        return _Cut(self, repeats, past, end, inputs.device)


@dataclass(frozen=True)
class _Cut:
    """One forward pass, cut down to the kept tokens.

    A decoding step mostly needs none of its tensors, so they are made when they are asked for.

    Attributes:
        kept (`_KeptTokens`): The kept tokens of the prompts.
        repeats (`int`): How many sequences there are of each prompt.
        past (`int`): The whole sequence's tokens before this pass.
        end (`int`): The whole sequence's tokens after it.
        device (`torch.device`): Where the tensors shall be.
        memo (`dict`): What was computed for one layer and is the same for others.
    """

    kept: _KeptTokens
    repeats: int
    past: int
    end: int
    device: torch.device
    memo: dict[Any, tuple[Any, Any]] = field(default_factory=dict)

    @cached_property
    def starts(self) -> Tensor:
        """Where each prompt begins behind its padding; `(batch,)`."""
        return self.kept.starts.to(self.device).repeat_interleave(self.repeats, dim=0)

    @cached_property
    def key_positions(self) -> Tensor:
        """Where the remaining keys stood in the whole sequence; `(batch, num_keys)`."""
        kept = self.kept.positions.to(self.device)
        since = torch.arange(self.kept.prompt_length, self.end, device=self.device).expand(kept.shape[0], -1)
        return torch.cat([kept, since], dim=1).repeat_interleave(self.repeats, dim=0)

    @cached_property
    def key_valid(self) -> Tensor | None:
        """Which of them are tokens; `(batch, num_keys)`, or `None` if all are."""
        if self.kept.valid is None:
            return None
        valid = self.kept.valid.to(self.device)
        since = valid.new_ones(valid.shape[0], self.end - self.kept.prompt_length)
        return torch.cat([valid, since], dim=1).repeat_interleave(self.repeats, dim=0)

    @property
    def rows(self) -> slice:
        """Which of the keys are this pass's own tokens, its queries."""
        return slice(self.past - self.kept.num_dropped if self.past else 0, None)

    @property
    def positions(self) -> Tensor:
        """The positions of this pass's tokens before the cut, as a decoder counts them; `(1, query_length)`."""
        return torch.arange(self.past, self.end, device=self.device)[None]

    def once(self, form: Any, whole: Any, cut_down: Callable[[], Any]) -> Any:
        """What becomes of an argument that many layers are handed; computed for the first of them.

        Args:
            form (hashable): What else the result depends on.
            whole (any): The argument.
            cut_down (`Callable`): Computes the result.

        Returns:
            any: The result.
        """
        known, result = self.memo.get(form, (self, None))
        if known is not whole:
            result = cut_down()
            self.memo[form] = whole, result  # an argument of one layer alone gives way to the next layer's
        return result

    def rows_of(self, tensor: Tensor, axis: int = -2) -> Tensor:
        """The remaining rows of `(..., batch or 1, query_length, ...)`, whose tokens lie along `axis`."""
        if self.past:  # a decoding step: every token stays
            return tensor
        index = self.key_positions[:, self.rows].to(tensor.device)
        index = index.reshape(*index.shape, *(1,) * (-1 - axis))
        if tensor.shape[axis - 1] != index.shape[0]:
            tensor = tensor.expand(*tensor.shape[: axis - 1], index.shape[0], *tensor.shape[axis:])
        return torch.take_along_dim(tensor, index.expand(*tensor.shape[: axis - 1], *index.shape), dim=axis)

    def last_rows_of(self, tensor: Tensor, num: int, axis: int) -> Tensor:
        """The remaining rows, or the tensor itself where the model has cut it to its last `num` already."""
        is_cut = tensor.shape[axis] == num != self.end - self.past
        return tensor if is_cut else self.rows_of(tensor, axis)

    def padding_mask(self) -> Tensor | None:
        """The mask of a layer without attention; `(batch, num_queries)`, or `None` if nothing is padding."""
        return None if self.key_valid is None else self.key_valid[:, self.rows].long()

    def mask(
        self,
        attention_mask: Any,
        pattern: AttentionPattern,
        num_queries: int,
        num_keys: int,
        implementation: str,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """The attention mask of a pruned layer, in the form that the model's attention function takes.

        Args:
            attention_mask (`Tensor` or `None`): The mask of an unpruned layer: 4-D boolean or additive, 2-D, or none.
            pattern (`AttentionPattern`): Which of the tokens before it a token sees in this layer.
            num_queries (`int`): How many tokens the layer reads, the last ones.
            num_keys (`int`): How many keys the layer has; with a sliding window perhaps only the last ones.
            implementation (`str`): The name of the attention function.
            dtype (`torch.dtype`): The dtype of an additive mask.

        Returns:
            `Tensor` or `None`: The cut mask.
        """
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4)
        ):
            raise ValueError(
                f"Pruning cannot cut an attention mask of type {type(attention_mask).__name__}: load the large model "
                "with attn_implementation='sdpa', 'flash_attention_2' or 'eager'."
            )
        if "flash" in implementation:
            # Chunks that are shorter than the prompt are refused by transformers.
            if (pattern.window or self.end) < self.end:
                raise ValueError(
                    f"Pruning a layer that sees only {pattern.window} tokens does not work with "
                    f"attn_implementation={implementation!r}, which would count them among the kept tokens: load the "
                    "large model with 'sdpa' or 'eager'."
                )
            return None if self.key_valid is None else self.key_valid
        is_additive = implementation.endswith("eager")
        if self.past:
            if num_queries == 1 and self.kept.valid is None and pattern == AttentionPattern():
                return None
            return _in_form(self._allowed(pattern)[:, :, -num_queries:, -num_keys:], dtype if is_additive else None)
        if attention_mask is None or attention_mask.dim() == 2:
            if self.key_valid is None and not is_additive:
                return None  # plain causal attention, which the fast kernels do best without a mask
            return _in_form(self._allowed(pattern)[:, :, -num_queries:], dtype if is_additive else None)
        # Sliding and bidirectional patterns survive, because the mask is cut and not made anew. With a device map it
        # still lies where the model made it.
        attention_mask = attention_mask.to(self.device)
        attention_mask = attention_mask.expand(self.key_positions.shape[0], -1, -1, -1).transpose(0, 1)
        cut = self.last_rows_of(attention_mask, num_queries, axis=-2)
        cut = self.rows_of(cut.transpose(-1, -2)).transpose(-1, -2).transpose(0, 1)
        fillers = self._self_attending_fillers()
        fillers = None if fillers is None else fillers[:, :, -num_queries:]
        if self.key_valid is None or fillers is None:
            return cut
        allowed = (cut if cut.dtype == torch.bool else cut >= 0) & self.key_valid[:, None, None, :] | fillers
        if cut.dtype == torch.bool:
            return allowed
        return cut.masked_fill(~allowed, torch.finfo(cut.dtype).min).masked_fill(fillers, 0)

    def _allowed(self, pattern: AttentionPattern) -> Tensor:
        """Causal attention among the remaining tokens; boolean `(batch, 1, num_queries, num_keys)`."""
        order = torch.arange(self.key_positions.shape[1], device=self.device)
        allowed = (order <= order[self.rows, None])[None]
        # Chunks are counted from a prompt's first token; a window does not mind where positions begin.
        key_positions = self.key_positions - self.starts[:, None]
        query, key = key_positions[:, self.rows, None], key_positions[:, None, :]
        if pattern.window is not None:
            allowed = allowed & (key > query - pattern.window)
        if pattern.chunk is not None:
            allowed = allowed & (key // pattern.chunk == query // pattern.chunk)
        fillers = self._self_attending_fillers()
        allowed = allowed[:, None].expand(self.key_positions.shape[0], -1, -1, -1)
        if self.key_valid is None or fillers is None:
            return allowed
        return allowed & self.key_valid[:, None, None, :] | fillers

    def _self_attending_fillers(self) -> Tensor | None:
        """Lets a filling row attend to itself, because a softmax over nothing is NaN in some kernels."""
        if self.key_valid is None:
            return None
        order = torch.arange(self.key_positions.shape[1], device=self.device)
        itself = order == order[self.rows, None]  # (num_queries, num_keys)
        return (itself & ~self.key_valid[:, self.rows, None])[:, None]


def _in_form(allowed: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A boolean mask as it is, or as an additive one of that dtype."""
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _map_tensors(function: Any, value: Any) -> Any:
    """Applies a function to a tensor, or to each of several."""
    return function(value) if isinstance(value, Tensor) else type(value)(function(each) for each in value)


@cache
def _parameter_names(forward: Any) -> list[str]:
    """The names of the positional arguments of a method."""
    parameters = list(signature(forward).parameters.values())[1:]
    return [each.name for each in parameters if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
