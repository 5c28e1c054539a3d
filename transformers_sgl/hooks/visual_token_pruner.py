"""Dropping visual tokens in a decoder: some before its first layer, others in the middle.

The layers below `prune_layer` run on the whole prompt, or on what a first step has left of it; the layers from there
on see only the kept tokens, and so their caches are shorter. Everything is done by forward pre-hooks that change what
a layer is handed:

    hidden states        gathered once for each step, at its first layer
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
from dataclasses import replace
from functools import partial
from threading import local
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
from transformers_sgl.hooks.context import HookContext
from transformers_sgl.hooks.kept_tokens import Cut, KeptTokens
from transformers_sgl.hooks.layer_arguments import map_tensors, named_arguments
from transformers_sgl.transformers_interface import PER_TOKEN_ARGUMENTS, cache_of, needs_position_ids

__all__ = ["VisualTokenPruner"]


class VisualTokenPruner(HookContext):
    """Lets a model's upper decoder layers see only some of the prompt's tokens (paper, section 3.2).

    It works on any supported transformers model, alone, for `generate` and for `forward` (without `labels`, because
    the logits are those of the kept tokens), with greedy search, sampling and beams, with a dynamic cache or none, and
    with padding on either side. Inside the `with`, the model takes exactly the prompts that `keep_mask` describes.

    Other threads may use the model meanwhile; their calls are not pruned. A thread that is to be inside runs in a copy
    of the context: `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`.

    Args:
        model (`PreTrainedModel`): The model to prune.
        keep_mask (`Tensor` of shape `(batch, prompt_length)`): `True` for prompt tokens to keep, `False` for dropped
            tokens and for padding; see [`VisualTokens.prompt_keep_mask`]. Or a function that returns it, called when
            the prefill reaches `prune_layer`, so that it can use the layers below.
        prune_layer (`int` or `float`, defaults to 9/48): The first decoder layer that sees fewer tokens: an index, or
            a fraction of the depth in `[0, 1)`.
        first_keep_mask (`Tensor` of shape `(batch, prompt_length)`, *optional*): What the layers below `prune_layer`
            see, where that is not the whole prompt: `True` at least wherever `keep_mask` is. The tokens that it lacks
            are gone before the first layer, as if the vision tower had never made them.

    Raises:
        ValueError: If the model cannot be pruned, the layer does not exist, a prompt would keep no token, or a token
            would be dropped first and kept later; while running, if the model is given other prompts, a static cache
            or an attention mask that cannot be cut.

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
        >>> first = keep.clone()
        >>> first[:, 4:6] = True
        >>> with VisualTokenPruner(large, keep, prune_layer=2, first_keep_mask=first):
        ...     cache = cache_of(large(prompt))
        >>> [layer.get_seq_length() for layer in cache.layers[:4]]
        [10, 10, 8, 8]

        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keep_mask: Tensor | Callable[[], Tensor],
        prune_layer: int | float = 9 / 48,
        first_keep_mask: Tensor | None = None,
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
        self._first_mask, self._first = first_keep_mask, None
        if first_keep_mask is not None:
            first = KeptTokens.from_mask(first_keep_mask, "first_keep_mask")
            self._first = first if self.prune_layer > 0 else None
        self._start = self.prune_layer if first_keep_mask is None else 0  # the first layer that lacks tokens
        # The pattern of each layer with attention; `None` for the others.
        self._patterns = {
            layer: attention_pattern(model, index) if index in attention else None
            for index, layer in enumerate(layers)
            if index >= self._start
        }
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._attention_indices = sorted(attention)
        self._choose = keep_mask if callable(keep_mask) else None
        self._kept = None if callable(keep_mask) else self._checked(keep_mask)
        self._pass = _Pass()

    def _checked(self, keep_mask: Tensor) -> KeptTokens:
        """The tokens that stay from `prune_layer` on; raises `ValueError` if the first step has dropped any."""
        kept, first = KeptTokens.from_mask(keep_mask), self._first_mask
        if first is not None and first.shape != keep_mask.shape:
            raise ValueError(
                f"`keep_mask` and `first_keep_mask` describe the same prompts, but they have the shapes "
                f"{tuple(keep_mask.shape)} and {tuple(first.shape)}: pass both as (batch, prompt_length)."
            )
        if first is not None and bool((keep_mask & ~first.to(keep_mask.device)).any()):
            raise ValueError(
                "`keep_mask` keeps tokens that `first_keep_mask` has dropped before the first layer: keep them in "
                "both, or pass `keep_mask & first_keep_mask`."
            )
        return kept

    def _register(self, stack: ExitStack) -> None:
        stack.callback(setattr, self, "_pass", _Pass())
        if self._start == 0:
            self._add_hook(stack, self._model.register_forward_pre_hook, self._note_positions, with_kwargs=True)
        self._add_hook(stack, self._decoder.register_forward_pre_hook, self._start_pass, with_kwargs=True)
        for layer in self._patterns:
            self._add_hook(stack, layer.register_forward_pre_hook, self._prune_layer_inputs, with_kwargs=True)

    def _note_positions(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Model pre-hook: notes whether the model was given its positions, or has to count them."""
        self._pass.positions_given = kwargs.get("position_ids") is not None

    def _start_pass(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decoder pre-hook: fits what the decoder does by itself to a shorter prompt."""
        kwargs = dict(kwargs)
        inputs: Any = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        past = self._past_length(cache_of(kwargs))
        self._pass.cuts = {}
        self._pass.start_cut = partial(KeptTokens.cut, past=past, inputs=inputs, query_length=inputs.shape[1])
        if self._start == 0 and past and not self._pass.positions_given:
            # The model counts from the cache of the first layer, which lacks the dropped tokens.
            cut, position_ids = self._cut(0, inputs.device), kwargs.get("position_ids")
            kwargs["position_ids"] = cut.positions if position_ids is None else position_ids + cut.kept.num_dropped
        self._pass.added = {}
        if self._deepstack is not None and kwargs.get(self._deepstack[1]) is not None:
            places, added = (kwargs[name] for name in self._deepstack)
            # Features are added before the layers that a dict names, or after the first layers. The model still adds
            # those before the tokens are dropped; the hooks add the rest.
            if isinstance(added, dict):
                kwargs[self._deepstack[1]] = {index: each for index, each in added.items() if index <= self._start}
            else:
                kwargs[self._deepstack[1]] = added[: self._start]
                added = dict(enumerate(added, start=1))
            for index, each in added.items():
                if index > self._start:
                    whole = each.new_zeros(*inputs.shape[:2], each.shape[-1])
                    whole[places.reshape(inputs.shape[:2])] = each
                    self._pass.added[index] = whole
        if self._first is not None:  # raises before the lower layers have run
            self._cut(0, inputs.device)
        if self._choose is None:
            self._cut(self.prune_layer, inputs.device)
        return args, kwargs

    def _kept_at(self, index: int) -> KeptTokens | None:
        """The tokens that a layer sees; `None` if all, or if they are still to be chosen."""
        return self._first if index < self.prune_layer else self._kept

    def _cut(self, index: int, device: torch.device) -> Cut:
        """The cut of this pass for a layer; with a device map each device gets its own copy of the indices, once."""
        cuts = self._pass.cuts.setdefault(index >= self.prune_layer, {})
        if not cuts:
            kept = self._kept_at(index)
            if kept is None:
                assert self._choose is not None
                kept = self._kept = self._checked(self._choose())
            assert self._pass.start_cut is not None
            cuts[device] = self._pass.start_cut(kept)
        cut = cuts.get(device) or next(iter(cuts.values()))
        if device != cut.device:
            cut = cuts.setdefault(device, replace(cut, device=device, memo={}))
        return cut

    def _prune_layer_inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Layer pre-hook: hands a layer the kept tokens only."""
        kwargs = named_arguments(layer, args, kwargs)
        hidden_states, index = kwargs.pop("hidden_states"), self._index[layer]
        cut = self._cut(index, hidden_states.device)
        if index in (self._start, self.prune_layer):
            earlier = None if index == self._start else self._cut(index - 1, hidden_states.device)
            hidden_states = cut.rows_of(hidden_states, earlier=earlier)
        if index in self._pass.added:
            hidden_states = hidden_states + cut.rows_of(self._pass.added[index]).to(hidden_states)

        num_queries = hidden_states.shape[-2]  # fewer where the model itself continues with the last tokens only
        if "flash" in self._implementation:
            kwargs["position_ids"] = None
        for name, axis in self._per_token.items():
            whole = kwargs.get(name)
            if whole is not None and not cut.past:  # while decoding, every token stays
                rows = partial(cut.last_rows_of, num=num_queries, axis=axis)
                kwargs[name] = cut.once((name, num_queries), whole, partial(map_tensors, rows, whole))
        mask, pattern = kwargs.get("attention_mask"), self._patterns[layer]
        if pattern is None:
            kwargs["attention_mask"] = cut.padding_mask()
        else:
            num_keys = self._num_keys(cache_of(kwargs), layer, num_queries, cut)
            form = (pattern, num_queries, num_keys, self._implementation, hidden_states.dtype)
            kwargs["attention_mask"] = cut.once(form, mask, partial(cut.mask, mask, *form))
        return (hidden_states,), kwargs

    def _past_length(self, cache: Cache | None) -> int:
        """The tokens of the whole sequence before this pass, by the cache."""
        if cache is None:
            return 0
        if cache.is_compileable:
            raise ValueError(
                "Pruning makes the caches of the layers differ in length, which a static cache cannot hold: leave "
                "`cache_implementation` unset, or set it to 'dynamic'."
            )
        index = self._attention_indices[0]
        length = int(cache.get_seq_length(index))
        kept = self._kept_at(index)
        return length if length == 0 or kept is None else length + kept.num_dropped

    def _num_keys(self, cache: Cache | None, layer: nn.Module, num_queries: int, cut: Cut) -> int:
        """The number of keys that the layer's attention will have, its own included."""
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


class _Pass(local):
    """The forward pass that is running; each thread has its own."""

    def __init__(self) -> None:
        self.start_cut: Callable[[KeptTokens], Cut] | None = None
        self.cuts: dict[bool, dict[torch.device, Cut]] = {}  # by device; below `prune_layer` and from there on
        self.added: dict[int, Tensor] = {}  # deepstack features for pruned layers
        self.positions_given = True
