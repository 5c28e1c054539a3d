"""Continuing a conversation: what a later turn reuses of the earlier ones.

The layers below the prune layer have seen every token, so their keys and values are those of the whole conversation
read at once. The layers above have seen only what mattered for the earlier questions, and read the conversation anew.
For this, the hidden states that enter the prune layer are kept beside the cache: one layer's width for each token.

The model is given the whole conversation and an empty cache, as if for the first time, but without the pixels. It
makes positions and masks itself. Forward pre-hooks then leave out what is known:

    first layer          the earlier turns' keys and values go into the caches of the layers below the prune layer
    those layers         are handed the new tokens only
    prune layer          is handed the earlier hidden states in front of the new ones

What is known of a prompt is the beginning that it shares with the earlier turns, token by token.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from transformers_sgl.architectures import (
    attention_implementation,
    attention_modules,
    attention_pattern,
    check_supported,
    decoder,
    decoder_layers,
)
from transformers_sgl.hooks.context import HookContext
from transformers_sgl.hooks.kept_tokens import Cut, KeptTokens
from transformers_sgl.hooks.layer_arguments import map_tensors, named_arguments
from transformers_sgl.prompt import Prompt
from transformers_sgl.transformers_interface import PER_TOKEN_ARGUMENTS, cache_of, held_keys_and_values

__all__ = ["ConversationCache", "ConversationTurn", "EarlierTurns"]

_CURE = "pass the whole conversation without this cache."
_LEFT_OUT = "its lower layers lack the visual tokens that were left out before the first one, as by the vision tower"
_FEATURES_ABOVE = "layers from `prune_layer` on are given visual features of their own"


@dataclass(frozen=True)
class EarlierTurns:
    """What a batch of conversations has left behind, beside the keys and values in its cache.

    Attributes:
        input_ids (`Tensor` of shape `(batch, length)`): The tokens that the model has read, padding included.
        mask (`Tensor` of shape `(batch, length)`): `True` for tokens, `False` for padding.
        images (`dict`): The image inputs.
        layer (`int`): The layers below this one have seen every token.
        hidden_states (`Tensor` of shape `(..., batch, length, hidden_size)`): What entered that layer.
    """

    input_ids: Tensor
    mask: Tensor
    images: dict[str, Any]
    layer: int
    hidden_states: Tensor


class ConversationCache(DynamicCache):
    """The cache of a pruned call: its upper layers lack visual tokens, so no model can go on with it as it is.

    The pair's `generate` continues it, given the whole conversation. Everything else is refused.

    Attributes:
        turns ([`EarlierTurns`], *optional*): What the next turn can reuse.
        obstacle (`str`): Why it can reuse nothing, where there are no `turns`.
    """

    turns: EarlierTurns | None = None
    obstacle: str = ""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `ValueError`, whichever model tries to add tokens."""
        raise ValueError(
            "This cache comes from a pruned call, so its upper layers lack visual tokens that the next question may "
            "need: give it to the pair's `generate` together with the whole conversation, or leave it out."
        )

    def held(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the layers that have seen every token, `(batch, heads, length, head_dim)` each."""
        found = (held_keys_and_values(self, index) for index in range(self.turns.layer if self.turns else 0))
        return [each for each in found if each is not None]

    def check(self, prompt: Prompt | None, prune_layer: int | None, uses_cache: bool) -> None:
        """Raises `ValueError` if the prompts, pruned from `prune_layer` on, do not continue this conversation."""
        if self.turns is None:
            raise ValueError(f"This cache of a pruned call cannot be continued, because {self.obstacle}: {_CURE}")
        if prompt is None:
            raise ValueError(
                "The cache of a pruned call is continued with the whole conversation, but only a part of it was "
                "passed: pass `input_ids` and `attention_mask` of all turns, and the images, as without a cache."
            )
        if prompt.inputs.get("inputs_embeds") is not None:
            raise ValueError(f"A conversation is continued by its ids, but `inputs_embeds` were passed: {_CURE}")
        if not uses_cache:
            raise ValueError(
                "A cache is passed to be continued, but `use_cache=False` forbids it: leave one of them out."
            )
        if prune_layer is not None and prune_layer < self.turns.layer:
            raise ValueError(
                f"This cache holds every token only of the layers below {self.turns.layer}, but `prune_layer` is "
                f"{prune_layer}: set prune_layer={self.turns.layer}, or {_CURE}"
            )
        number = len(prompt.inputs["input_ids"])
        if number != len(self.turns.input_ids):
            raise ValueError(
                f"This cache holds {len(self.turns.input_ids)} conversations, but there are {number} prompts: {_CURE}"
            )
        if not _equal(_images(prompt), self.turns.images):
            raise ValueError(f"The images are not those of the conversation that this cache holds: {_CURE}")
        columns = self.columns(prompt)
        if bool((prompt.visual_tokens.last_position >= columns.shape[1]).any()):
            raise ValueError(
                "The prompts do not begin as the conversations that this cache holds, beyond their images and as far "
                "from their ends as the longest new question of the batch: pass the earlier turns as they were, or "
                f"{_CURE}"
            )

    def columns(self, prompt: Prompt, chosen: Tensor | None = None) -> Tensor:
        """The columns of this cache that hold the prompts' first columns; `(batch, num_known)`, 0 in padding.

        `prompt` may hold only the conversations that are `chosen`, `(batch,)`. The same number of new columns follows
        in every prompt, at least one.
        """
        assert self.turns is not None
        ids, mask = prompt.inputs["input_ids"].cpu(), prompt.visual_tokens.prompt_mask.cpu()
        # Fewer columns than were recorded if the cache has been cropped since.
        length = min(keys.shape[-2] for keys in (self.turns.hidden_states, *(keys for keys, _ in self.held())))
        rows = slice(None) if chosen is None else chosen.cpu()
        earlier_ids, earlier_mask = (each.cpu()[rows, :length] for each in (self.turns.input_ids, self.turns.mask))
        width, starts = ids.shape[1], mask.long().argmax(dim=1).tolist()
        places = [row.nonzero()[:, 0] for row in earlier_mask]
        num_new = 1
        for row, start in enumerate(starts):
            known = min(len(places[row]), width - start)
            agrees = earlier_ids[row, places[row][:known]] == ids[row, start : start + known]
            num_new = max(num_new, width - start - int(agrees.long().cumprod(dim=0).sum()))
        columns = torch.zeros(len(ids), width - num_new, dtype=torch.long)
        for row, start in enumerate(starts):
            columns[row, start:] = places[row][: max(0, width - num_new - start)]
        return columns


class ConversationTurn(HookContext):
    """One call of a conversation: continues the earlier turns, and records what the next one can reuse.

    Args:
        model (`PreTrainedModel`): The model that continues.
        prompt ([`Prompt`]): The whole conversations that it reads.
        layer (`int`, *optional*): The layer from which on they will be pruned, where the cache is wanted.
        earlier ([`ConversationCache`], *optional*): The earlier turns, whose `check` the prompts have passed.
        chosen (`Tensor` of shape `(batch,)`, *optional*): `True` for those of its conversations that are continued.
        sees_all (`bool`, defaults to `True`): Whether the layers below `layer` see every token of the prompts. Where
            they do not, the cache cannot be continued.

    Attributes:
        inputs (`dict`): The arguments of the model's `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        layer: int | None,
        earlier: ConversationCache | None = None,
        chosen: Tensor | None = None,
        sees_all: bool = True,
    ) -> None:
        self.inputs, self._earlier, self._covers_all = prompt.inputs, earlier, chosen is None or bool(chosen.all())
        self._skipper = self._recorder = None
        if earlier is not None and earlier.turns is not None:
            self.inputs = {name: value for name, value in prompt.inputs.items() if not _is_pixels(name)}
            self._skipper = _Skipper(model, prompt, earlier, chosen)
            layer = earlier.turns.layer if layer is None else layer
        if layer is not None:
            self._recorder = _Recorder(model, prompt, layer, sees_all)

    def _register(self, stack: ExitStack) -> None:
        for each in (self._skipper, self._recorder):
            if each is not None:
                stack.enter_context(each)

    def finish(self, output: Any) -> None:
        """Makes the cache of the model's `generate`, which returned `output`, one that the next turn can continue.

        As in stock `generate`, the cache of the earlier turns takes in the new one; not where only some of its
        conversations went on.
        """
        cache = None if self._recorder is None else self._recorder.finish(output)
        if self._earlier is not None and self._covers_all and cache is not None and cache.turns is not None:
            self._earlier.__dict__.update(cache.__dict__)


class _Recorder(HookContext):
    """Keeps the hidden states that enter a layer, beside a cache in which the layers below it see every token."""

    def __init__(self, model: PreTrainedModel, prompt: Prompt, layer: int, sees_all: bool) -> None:
        self._prompt, self._layer, self._sees_all = prompt, layer, sees_all
        self._decoder, self._module = decoder(model), decoder_layers(model)[layer]
        self._counted = min(attention_modules(model))  # the layer whose cache tells how many tokens there are
        self._architecture = check_supported(model.config)
        self._states: list[Tensor] = []  # (..., batch, tokens, hidden_size) each
        self._num_recorded = 0
        self._num_dropped = 0  # tokens that the counted layer's cache lacks
        self._obstacle = ""
        if self._architecture.answer_token_type is not None and layer > 0:
            self._obstacle = "the tokens of a prompt attend to those after them, which the next turn changes"
        if prompt.inputs.get("inputs_embeds") is not None:
            self._obstacle = "it was read from `inputs_embeds`, which the next turn cannot be compared with"
        self._cache: Cache | None = None
        # Of the forward pass that is running:
        self._past = self._width = 0  # tokens before it, and in it

    def _register(self, stack: ExitStack) -> None:
        self._add_hook(stack, self._decoder.register_forward_pre_hook, self._start_pass, with_kwargs=True)
        if not self._sees_all:
            return
        self._add_hook(stack, self._decoder.register_forward_hook, self._end_pass)
        self._add_hook(stack, self._module.register_forward_pre_hook, self._record, with_kwargs=True)

    def finish(self, output: Any) -> ConversationCache | None:
        """Makes the cache of the model's `generate`, which returned `output`, a [`ConversationCache`], in place."""
        cache: Any = self._cache
        if not isinstance(cache, DynamicCache):
            return None
        cache.__class__ = ConversationCache
        cache.turns, cache.obstacle = None, self._find_obstacle(cache)
        if not cache.obstacle:
            ids = output if isinstance(output, Tensor) else output["sequences"]
            mask = self._prompt.visual_tokens.prompt_mask
            length = self._num_recorded
            cache.turns = EarlierTurns(
                ids[:, :length],
                nn.functional.pad(mask, (0, length - mask.shape[1]), value=True),
                _images(self._prompt),
                self._layer,
                torch.cat(self._states, dim=-2),
            )
        return cache

    def _start_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decoder pre-hook: finds the tokens of the whole sequence that this pass reads."""
        inputs: Any = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = kwargs.get("input_ids", args[0] if args else None)
        self._width, self._cache = inputs.shape[1], cache_of(kwargs)
        held = 0 if self._cache is None else int(self._cache.get_seq_length(self._counted))
        self._past = held + self._num_dropped if held else 0
        added = None if self._architecture.deepstack is None else kwargs.get(self._architecture.deepstack[1])
        if added is not None and (max(added, default=0) if isinstance(added, dict) else len(added)) > self._layer:
            self._obstacle = _FEATURES_ABOVE

    def _end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Decoder hook: finds how many tokens the cache lacks."""
        if self._cache is not None and not self._past:
            self._num_dropped = self._width - int(self._cache.get_seq_length(self._counted))

    def _record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Layer pre-hook: keeps the hidden states that enter the prune layer."""
        if self._cache is not None:
            kwargs = named_arguments(layer, args, kwargs)
            self._cut_back(self._past)
            self._states.append(kwargs["hidden_states"])
            self._num_recorded += self._states[-1].shape[-2]
            for name in self._architecture.per_token_arguments:
                if isinstance(kwargs.get(name), Tensor) and kwargs[name].is_floating_point():
                    self._obstacle = _FEATURES_ABOVE

    def _cut_back(self, length: int) -> None:
        """Forgets recorded tokens that a draft has been wrong about."""
        while self._num_recorded > length:
            last = self._states.pop()
            rest = last[..., : max(0, length - self._num_recorded + last.shape[-2]), :]
            self._num_recorded -= last.shape[-2] - rest.shape[-2]
            if rest.shape[-2]:
                self._states.append(rest)

    def _find_obstacle(self, cache: Cache) -> str:
        """Why the next turn can reuse nothing of this call; empty if it can."""
        if not self._sees_all:
            return _LEFT_OUT
        length = int(cache.get_seq_length(self._counted)) + self._num_dropped
        self._cut_back(length)
        held = [held_keys_and_values(cache, index) for index in range(self._layer)]
        if self._states and self._states[0].shape[-3] != self._prompt.visual_tokens.batch_size:
            return "it holds several answers to one prompt"
        if self._num_recorded != length or any(each is None or each[0].shape[-2] != length for each in held):
            return "a layer below `prune_layer` holds only a window or a sum of the tokens"
        return self._obstacle


class _Skipper(HookContext):
    """Leaves out of a model's first pass what earlier turns have computed."""

    def __init__(
        self, model: PreTrainedModel, prompt: Prompt, earlier: ConversationCache, chosen: Tensor | None
    ) -> None:
        assert earlier.turns is not None
        self._model, self._prompt_mask = model, prompt.visual_tokens.prompt_mask
        self._turns, self._held = earlier.turns, earlier.held()
        rows = torch.arange(len(earlier.turns.input_ids))
        self._rows = (rows if chosen is None else rows[chosen.cpu()])[:, None]
        self._columns = earlier.columns(prompt, chosen)
        self._num_known = self._columns.shape[1]
        self._per_token = {**PER_TOKEN_ARGUMENTS, **check_supported(model.config).per_token_arguments}
        self._implementation = attention_implementation(model)
        self._is_done = False
        # Of the forward pass that is running:
        self._cache: Any = None
        self._cut: Cut | None = None

    def _register(self, stack: ExitStack) -> None:
        self._add_hook(stack, decoder(self._model).register_forward_pre_hook, self._start_pass, with_kwargs=True)
        self._add_hook(stack, decoder(self._model).register_forward_hook, self._end_pass)
        for index, layer in enumerate(decoder_layers(self._model)[: self._turns.layer + 1]):
            leave_out = partial(self._leave_out_known, index)
            self._add_hook(stack, layer.register_forward_pre_hook, leave_out, with_kwargs=True)

    def _start_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decoder pre-hook: notes the cache to fill."""
        self._cache = cache_of(kwargs)

    def _end_pass(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Decoder hook: all further passes read new tokens only."""
        self._is_done, self._cache, self._cut = True, None, None

    def _leave_out_known(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Layer pre-hook: hands lower layers the new tokens, and the layer above them earlier and new ones."""
        if self._is_done:
            return None
        kwargs = named_arguments(layer, args, kwargs)
        hidden_states = kwargs.pop("hidden_states")
        repeats = hidden_states.shape[-3] // len(self._columns)  # beams
        if index == 0:
            hidden_states = hidden_states[..., self._num_known :, :]
            for lower, held in enumerate(self._held):
                self._cache.update(*(self._known(each, repeats) for each in held), lower)
        if index == self._turns.layer:
            rows, columns = self._places(repeats, self._turns.hidden_states.device)
            known = self._turns.hidden_states[..., rows, columns, :].to(hidden_states)
            return (torch.cat([known, hidden_states], dim=-2),), kwargs

        num_new = hidden_states.shape[-2]
        for name, axis in self._per_token.items():
            if kwargs.get(name) is not None:
                kwargs[name] = map_tensors(partial(self._new_rows, axis=axis, num_new=num_new), kwargs[name])
        mask = kwargs.get("attention_mask")
        if "flash" in self._implementation:
            kwargs["position_ids"] = None  # their start would be taken for the border of another prompt
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            kwargs["attention_mask"] = mask[..., -num_new:, :]
        else:  # the model leaves it to the attention function to be causal, which it is for whole prompts only
            end, pattern = self._num_known + num_new, attention_pattern(self._model, index)
            form = (pattern, num_new, end, self._implementation, hidden_states.dtype)
            cut = self._whole(repeats, end, hidden_states.device)
            kwargs["attention_mask"] = cut.once(form, None, partial(cut.mask, None, *form))
        return (hidden_states,), kwargs

    def _known(self, keys: Tensor, repeats: int) -> Tensor:
        """The known tokens' keys or values; `(batch, heads, num_known, head_dim)`."""
        rows, columns = self._places(repeats, keys.device)
        return keys[rows, ..., columns, :].movedim(1, -2)

    def _places(self, repeats: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column of each known token in the earlier turns; `(batch, 1)` and `(batch, num_known)`."""
        rows, columns = (each.repeat_interleave(repeats, dim=0).to(device) for each in (self._rows, self._columns))
        return rows, columns

    def _new_rows(self, tensor: Tensor, axis: int, num_new: int) -> Tensor:
        """The new tokens' rows of a tensor with one for each token along `axis`."""
        is_whole = tensor.shape[axis] == self._num_known + num_new
        return tensor.narrow(axis, self._num_known, num_new) if is_whole else tensor

    def _whole(self, repeats: int, end: int, device: torch.device) -> Cut:
        """The cut of a pass that reads the new tokens, and drops none."""
        if self._cut is None:
            mask = self._prompt_mask.to(device)
            positions = torch.arange(mask.shape[1], device=device).expand(len(mask), -1)
            kept = KeptTokens(mask.long().argmax(dim=1), positions, None if bool(mask.all()) else mask, mask.shape[1])
            self._cut = Cut(kept, repeats, self._num_known, end, device)
        return self._cut


def _images(prompt: Prompt) -> dict[str, Any]:
    """The image inputs among a model's inputs."""
    names = check_supported(prompt.config).inputs
    return {name: prompt.inputs[name] for name in names if prompt.inputs.get(name) is not None}


def _is_pixels(name: str) -> bool:
    """Whether an image input holds pixels, and does not only tell how they are arranged."""
    return "pixel" in name or "patches" in name


def _equal(one: Any, other: Any) -> bool:
    """Whether two inputs, or collections of them, have the same values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other.to(one.device))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
