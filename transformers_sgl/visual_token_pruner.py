"""Dropping visual tokens in the middle of a decoder.

Floor 1. The layers below `prune_layer` run on the whole prompt; the layers from there on see only the kept tokens,
and so their caches are shorter. Everything is done by forward pre-hooks that change what a layer is handed:

    hidden states        gathered once, at `prune_layer`
    rotary embeddings    gathered at every layer from there on, because the model's own loop hands each layer the
                         originals; kept tokens keep their original positions
    position ids         withheld: beside the rotary embeddings their only use is that flash attention looks for gaps
                         in them, and would take a pruned prompt for several packed ones
    attention mask       the rows and columns of the kept tokens; while decoding, the columns only

In a batch the kept tokens of each sample are aligned to the right, so that the last column is the last token of
every sample, whatever was padded or dropped; the columns in front that only fill up are masked.

`prune_layer=0` is the simple case: the tokens are dropped before the decoder, which never hears of them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from transformers_sgl.architectures import attention_implementation, decoder, decoder_layers
from transformers_sgl.generation_config_sgl import resolve_prune_layer
from transformers_sgl.hook_context import HookContext

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
            tokens and for padding; see [`VisualTokens.prompt_keep_mask`].
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

        >>> large = AutoModelForImageTextToText.from_pretrained(embedded_pair() / "large")
        >>> prompt = torch.arange(20, 32)[None]  # any twelve tokens
        >>> keep = torch.ones(1, 12, dtype=torch.bool)
        >>> keep[:, 4:8] = False
        >>> with VisualTokenPruner(large, keep, prune_layer=2):
        ...     cache = large(prompt).past_key_values
        >>> [layer.get_seq_length() for layer in cache.layers[:4]]
        [12, 12, 8, 8]

        ```
    """

    def __init__(self, model: PreTrainedModel, keep_mask: Tensor, prune_layer: int | float = 9 / 48) -> None:
        self._decoder = decoder(model)
        layers = decoder_layers(model)
        self.prune_layer = resolve_prune_layer(prune_layer, len(layers))
        self._pruned_layers = list(layers)[self.prune_layer :]
        # Only eager attention, which has no notion of causality, cannot do without a mask.
        self._needs_mask = attention_implementation(model).endswith("eager")
        self._kept = _KeptTokens.from_mask(keep_mask)
        self._cuts: dict[torch.device, _Cut] = {}  # of the forward pass that is running, by device

    def _register(self, stack: ExitStack) -> None:
        stack.callback(self._cuts.clear)
        if self.prune_layer == 0:
            hook = self._decoder.register_forward_pre_hook(self._prune_decoder_inputs, with_kwargs=True)
            stack.callback(hook.remove)
        for layer in self._pruned_layers:
            prune = _withhold_position_ids if self.prune_layer == 0 else self._prune_layer_inputs
            stack.callback(layer.register_forward_pre_hook(prune, with_kwargs=True).remove)

    def _prune_layer_inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Layer pre-hook: hands a layer the kept tokens only."""
        hidden_states, *rest = args if args else (kwargs["hidden_states"],)
        if layer is self._pruned_layers[0]:
            self._cuts.clear()
            length = _cached_length(kwargs.get("past_key_values"), self.prune_layer)
            cut = self._kept.cut(length, hidden_states, hidden_states.shape[1])
            hidden_states = cut.rows_of(hidden_states)
        else:
            cut = next(iter(self._cuts.values()))
        # With a device map the layers lie on several devices; each gets its own copy of the indices, once.
        cut = self._cuts.setdefault(hidden_states.device, cut.to(hidden_states.device))

        _, kwargs = _withhold_position_ids(layer, args, kwargs)
        kwargs["position_embeddings"] = tuple(cut.rows_of(table) for table in kwargs["position_embeddings"])
        kwargs["attention_mask"] = cut.mask(kwargs.get("attention_mask"), hidden_states.dtype, self._needs_mask)
        if not args:
            return (), {**kwargs, "hidden_states": hidden_states}
        return (hidden_states, *rest), kwargs

    def _prune_decoder_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decoder pre-hook for `prune_layer=0`: the decoder is handed a shorter prompt, and told its positions."""
        kwargs = dict(kwargs)
        name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
        attention_mask = kwargs.get("attention_mask")
        cached_length = _cached_length(kwargs.get("past_key_values"), 0)
        if kwargs.get(name) is None or (attention_mask is not None and not _is_padding_mask(attention_mask)):
            raise ValueError(
                "Pruning at layer 0 needs keyword arguments and a 2-D attention mask or none, but the decoder was "
                "called differently: prune at layer 1 or later."
            )
        inputs = kwargs[name]
        cut = self._kept.cut(cached_length, inputs, inputs.shape[1])
        # The cache of layer 0 is short of the dropped tokens, so positions must not be counted from it.
        position_ids = kwargs.get("position_ids")
        kwargs["position_ids"] = cut.rows_of(cut.positions if position_ids is None else position_ids)
        kwargs[name] = cut.rows_of(inputs)
        # Without a mask and a cache, transformers too looks for gaps in the positions: a mask of ones forbids it.
        if cut.key_valid is not None:
            kwargs["attention_mask"] = cut.key_valid.long()
        elif kwargs.get("past_key_values") is None:
            kwargs["attention_mask"] = torch.ones_like(cut.key_positions)
        else:
            kwargs["attention_mask"] = None
        return args, kwargs


@dataclass(frozen=True)
class _KeptTokens:
    """The kept tokens of a batch of prompts, aligned to the right.

    Attributes:
        positions (`Tensor` of shape `(batch, num_kept)`): Prompt positions in ascending order, 0 where only filling.
        valid (`Tensor` of shape `(batch, num_kept)`, or `None`): `False` where only filling; `None` if no sample
            needs filling, which lets the fast attention kernels run without a mask.
        prompt_length (`int`): The number of columns of the prompts.
    """

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
        return cls(positions, None if bool(valid.all()) else valid, keep_mask.shape[1])

    def cut(self, cached_length: int, inputs: Tensor, query_length: int) -> _Cut:
        """What a forward pass must be cut down to.

        Args:
            cached_length (`int`): The tokens in the cache of the first pruned layer.
            inputs (`Tensor` of shape `(batch, ...)`): The layer's input; tells batch size and device.
            query_length (`int`): The number of tokens in this pass, before the cut.

        Returns:
            `_Cut`: The rows and columns that remain.
        """
        num_kept = self.positions.shape[1]
        # While decoding, the cache holds the kept prompt tokens and everything since; those stand behind the prompt.
        past = self.prompt_length + cached_length - num_kept if cached_length else 0
        end = past + query_length
        # Beams and `num_return_sequences` repeat each prompt, one copy after the other.
        repeats, remainder = divmod(inputs.shape[0], self.positions.shape[0])
        if remainder or end < self.prompt_length or (cached_length and cached_length < num_kept):
            raise ValueError(
                f"The model was given {inputs.shape[0]} sequences of {end} tokens, but the tokens to keep were chosen "
                f"for {self.positions.shape[0]} prompts of {self.prompt_length}: pass those prompts, whole (no "
                "`prefill_chunk_size`, no cache of an earlier call)."
            )
        since = torch.arange(self.prompt_length, end, device=self.positions.device)
        since = since.expand(self.positions.shape[0], -1)
        key_positions = torch.cat([self.positions, since], dim=1)
        key_valid = None if self.valid is None else torch.cat([self.valid, torch.ones_like(since).bool()], dim=1)
        cut = _Cut(
            key_positions=key_positions.repeat_interleave(repeats, dim=0),
            key_valid=None if key_valid is None else key_valid.repeat_interleave(repeats, dim=0),
            rows=slice(num_kept + past - self.prompt_length if past else 0, None),
            past=past,
            end=end,
        )
        return cut.to(inputs.device)


@dataclass(frozen=True)
class _Cut:
    """One forward pass, cut down to the kept tokens.

    Attributes:
        key_positions (`Tensor` of shape `(batch, num_keys)`): Where the remaining keys stood in the whole sequence.
        key_valid (`Tensor` of shape `(batch, num_keys)`, or `None`): Which of them are tokens; `None` if all are.
        rows (`slice`): Which of the keys are this pass's own tokens, its queries.
        past (`int`): The whole sequence's tokens before this pass.
        end (`int`): The whole sequence's tokens after it.
    """

    key_positions: Tensor
    key_valid: Tensor | None
    rows: slice
    past: int
    end: int

    @property
    def positions(self) -> Tensor:
        """The positions of this pass's tokens before the cut, as a decoder counts them; `(1, query_length)`."""
        return torch.arange(self.past, self.end, device=self.key_positions.device)[None]

    def to(self, device: torch.device) -> _Cut:
        """The same on another device."""
        if self.key_positions.device == device:
            return self
        valid = None if self.key_valid is None else self.key_valid.to(device)
        return replace(self, key_positions=self.key_positions.to(device), key_valid=valid)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The remaining rows of `(batch or 1, query_length, ...)`; shape `(batch, num_queries, ...)`."""
        if self.past:  # a decoding step: every token stays
            return tensor
        index = self.key_positions[:, self.rows].to(tensor.device)
        tensor = tensor.expand(index.shape[0], *tensor.shape[1:])
        return tensor.gather(
            1, index.view(*index.shape, *(1,) * (tensor.dim() - 2)).expand(*index.shape, *tensor.shape[2:])
        )

    def mask(self, attention_mask: Any, dtype: torch.dtype, needs_mask: bool) -> Tensor | None:
        """The attention mask of a pruned layer, in the form that the model's attention function takes.

        Args:
            attention_mask (`Tensor` or `None`): The mask of an unpruned layer: 4-D boolean or additive, 2-D, or none.
            dtype (`torch.dtype`): The dtype of an additive mask.
            needs_mask (`bool`): Whether the attention function cannot do without a mask.

        Returns:
            `Tensor` or `None`: The cut mask.
        """
        if attention_mask is None:
            if self.key_valid is None and not needs_mask:
                return None  # plain causal attention, which the fast kernels do best without a mask
            return _in_form(self._causal(), None if not needs_mask else dtype)
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
            raise ValueError(
                f"Pruning cannot cut an attention mask of type {type(attention_mask).__name__}: load the large model "
                "with attn_implementation='sdpa', 'flash_attention_2' or 'eager'."
            )
        if attention_mask.dim() == 2:  # flash attention: a padding mask
            return None if self.key_valid is None else self.key_valid
        # Sliding and bidirectional patterns survive, because the mask is cut and not made anew. With a device map it
        # still lies where the model made it.
        attention_mask = attention_mask.to(self.key_positions.device)
        batch_size = self.key_positions.shape[0]
        queries = self.key_positions[:, self.rows] - self.past
        cut = attention_mask.expand(batch_size, *attention_mask.shape[1:])
        heads = cut.shape[1]
        cut = cut.gather(2, queries[:, None, :, None].expand(-1, heads, -1, cut.shape[3]))
        cut = cut.gather(3, self.key_positions[:, None, None, :].expand(-1, heads, queries.shape[1], -1))
        fillers = self._self_attending_fillers()
        if self.key_valid is None or fillers is None:
            return cut
        allowed = (cut if cut.dtype == torch.bool else cut >= 0) & self.key_valid[:, None, None, :] | fillers
        if cut.dtype == torch.bool:
            return allowed
        return cut.masked_fill(~allowed, torch.finfo(cut.dtype).min).masked_fill(fillers, 0)

    def _causal(self) -> Tensor:
        """Plain causal attention among the remaining tokens; boolean `(batch, 1, num_queries, num_keys)`."""
        num_keys = self.key_positions.shape[1]
        order = torch.arange(num_keys, device=self.key_positions.device)
        causal = (order <= order[self.rows, None])[None, None]
        fillers = self._self_attending_fillers()
        if self.key_valid is None or fillers is None:
            return causal.expand(self.key_positions.shape[0], -1, -1, -1)
        return causal & self.key_valid[:, None, None, :] | fillers

    def _self_attending_fillers(self) -> Tensor | None:
        """Lets a filling row attend to itself, because a softmax over nothing is NaN in some kernels."""
        if self.key_valid is None:
            return None
        order = torch.arange(self.key_positions.shape[1], device=self.key_positions.device)
        itself = order == order[self.rows, None]  # (num_queries, num_keys)
        return (itself & ~self.key_valid[:, self.rows, None])[:, None]


def _in_form(allowed: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A boolean mask as it is, or as an additive one of that dtype."""
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def _cached_length(cache: Cache | None, layer: int) -> int:
    """The tokens that the cache holds for a layer."""
    if cache is None:
        return 0
    if cache.is_compileable:
        raise ValueError(
            "Pruning makes the caches of the layers differ in length, which a static cache cannot hold: leave "
            "`cache_implementation` unset, or set it to 'dynamic'."
        )
    return cache.get_seq_length(layer)


def _withhold_position_ids(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Layer pre-hook: a layer that gets rotary embeddings needs no position ids, and gaps in them mislead it."""
    return args, {**kwargs, "position_ids": None}


def _is_padding_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2
