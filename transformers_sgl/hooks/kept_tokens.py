"""The tokens of a batch of prompts that stay, and the cuts of a forward pass for them.

Pure tensors: the pruner's hooks hand each layer what is computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from transformers_sgl.architectures import AttentionPattern

__all__ = ["Cut", "KeptTokens"]


@dataclass(frozen=True)
class KeptTokens:
    """The kept tokens of a batch of prompts, aligned to the right.

    Attributes:
        starts (`Tensor` of shape `(batch,)`): The first kept position.
        positions (`Tensor` of shape `(batch, num_kept)`): Prompt positions in ascending order, 0 in fillers.
        valid (`Tensor` of shape `(batch, num_kept)`, or `None`): `False` for fillers; `None` if no sample needs any,
            so that the fast attention kernels run without a mask.
        prompt_length (`int`): The number of columns of the prompts.
    """

    starts: Tensor
    positions: Tensor
    valid: Tensor | None
    prompt_length: int

    @classmethod
    def from_mask(cls, keep_mask: Tensor, name: str = "keep_mask") -> KeptTokens:
        """From `(batch, prompt_length)` booleans, which the user knows by that name."""
        if keep_mask.dim() != 2 or keep_mask.dtype != torch.bool:
            raise ValueError(
                f"`{name}` must be a boolean tensor of shape (batch, prompt_length), but it is "
                f"{keep_mask.dtype} of shape {tuple(keep_mask.shape)}."
            )
        counts = keep_mask.sum(dim=1)
        if counts.numel() == 0 or int(counts.min()) == 0:
            raise ValueError(f"`{name}` keeps no token of a prompt: keep at least the prompt's text.")
        num_kept = int(counts.max())
        # A stable sort puts the kept positions last, in order; the fillers before them are pointed at position 0.
        positions = torch.argsort(keep_mask.long(), dim=1, stable=True)[:, -num_kept:]
        valid = torch.arange(num_kept, device=keep_mask.device) >= num_kept - counts[:, None]
        positions = positions.masked_fill(~valid, 0)
        starts = keep_mask.long().argmax(dim=1)
        return cls(starts, positions, None if bool(valid.all()) else valid, keep_mask.shape[1])

    @property
    def num_dropped(self) -> int:
        """The number of dropped columns."""
        return self.prompt_length - self.positions.shape[1]

    def cut(self, past: int, inputs: Tensor, query_length: int) -> Cut:
        """The cut of a pass over `query_length` tokens after `past` others; `inputs` tells batch size and device."""
        end = past + query_length
        # Beams and `num_return_sequences` repeat each prompt, one copy after the other.
        repeats, remainder = divmod(inputs.shape[0], self.positions.shape[0])
        if remainder or end < self.prompt_length or 0 < past < self.prompt_length:
            raise ValueError(
                f"The model was given {inputs.shape[0]} sequences of {end} tokens, but the tokens to keep were chosen "
                f"for {self.positions.shape[0]} prompts of {self.prompt_length}: pass those prompts, whole (no "
                "`prefill_chunk_size`, no cache of an earlier call)."
            )
        return Cut(self, repeats, past, end, inputs.device)


@dataclass(frozen=True)
class Cut:
    """One forward pass, cut down to the kept tokens.

    Its tensors are made when they are asked for, because a decoding step needs few of them.

    Attributes:
        kept (`KeptTokens`): The kept tokens of the prompts.
        repeats (`int`): The number of sequences of each prompt.
        past (`int`): The whole sequence's tokens before this pass.
        end (`int`): The whole sequence's tokens after it.
        device (`torch.device`): The device of the tensors.
        memo (`dict`): Results for one layer that other layers can reuse.
    """

    kept: KeptTokens
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
        """The remaining keys' positions in the whole sequence; `(batch, num_keys)`."""
        kept = self.kept.positions.to(self.device)
        since = torch.arange(self.kept.prompt_length, self.end, device=self.device).expand(kept.shape[0], -1)
        return torch.cat([kept, since], dim=1).repeat_interleave(self.repeats, dim=0)

    @cached_property
    def key_valid(self) -> Tensor | None:
        """The keys that are tokens and not fillers; `(batch, num_keys)`, or `None` if all are."""
        if self.kept.valid is None:
            return None
        valid = self.kept.valid.to(self.device)
        since = valid.new_ones(valid.shape[0], self.end - self.kept.prompt_length)
        return torch.cat([valid, since], dim=1).repeat_interleave(self.repeats, dim=0)

    @property
    def ascending(self) -> Tensor:
        """The keys' positions, in ascending order because those of fillers are -1; `(batch, num_keys)`."""
        valid = self.key_valid
        return self.key_positions if valid is None else self.key_positions.masked_fill(~valid, -1)

    @property
    def rows(self) -> slice:
        """The keys that are this pass's own tokens, its queries."""
        return slice(self.past - self.kept.num_dropped if self.past else 0, None)

    @property
    def positions(self) -> Tensor:
        """The positions of this pass's tokens before the cut, as a decoder counts them; `(1, query_length)`."""
        return torch.arange(self.past, self.end, device=self.device)[None]

    def once(self, form: Any, whole: Any, cut_down: Callable[[], Any]) -> Any:
        """What `cut_down` makes of the argument `whole` of many layers, computed once for each `form`."""
        known, result = self.memo.get(form, (self, None))
        if known is not whole:
            result = cut_down()
            self.memo[form] = whole, result  # an argument of one layer alone gives way to the next layer's
        return result

    def rows_of(self, tensor: Tensor, axis: int = -2, earlier: Cut | None = None) -> Tensor:
        """The remaining rows of `(..., batch or 1, query_length, ...)`, whose tokens lie along `axis`.

        Of a tensor that an `earlier` cut has left only some rows, the remaining ones of those.
        """
        if self.past:  # a decoding step: every token stays
            return tensor
        index = self.key_positions if earlier is None else torch.searchsorted(earlier.ascending, self.key_positions)
        index = index.to(tensor.device)
        index = index.reshape(*index.shape, *(1,) * (-1 - axis))
        if tensor.shape[axis - 1] != index.shape[0]:
            tensor = tensor.expand(*tensor.shape[: axis - 1], index.shape[0], *tensor.shape[axis:])
        return torch.take_along_dim(tensor, index.expand(*tensor.shape[: axis - 1], *index.shape), dim=axis)

    def last_rows_of(self, tensor: Tensor, num: int, axis: int) -> Tensor:
        """The remaining rows, or the tensor itself where the model has already cut it to its last `num`."""
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

        `attention_mask` is that of an unpruned layer: 4-D boolean or additive (then of `dtype`), 2-D, or none. The
        layer reads the last `num_queries` tokens and has `num_keys` keys, with a sliding window perhaps only the last
        ones.
        """
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4)
        ):
            raise ValueError(
                f"Pruning cannot cut an attention mask of type {type(attention_mask).__name__}: load the large model "
                "with attn_implementation='sdpa', 'flash_attention_2' or 'eager'."
            )
        if "flash" in implementation:
            # transformers itself refuses chunks that are shorter than the prompt.
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
                return None  # plain causal attention, which needs no mask in the fast kernels
            return _in_form(self._allowed(pattern)[:, :, -num_queries:], dtype if is_additive else None)
        # Sliding and bidirectional patterns survive, because the mask is cut and not rebuilt. With a device map it is
        # still on the device where the model made it.
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
        """Lets a filler attend to itself, because a softmax over nothing is NaN in some kernels."""
        if self.key_valid is None:
            return None
        order = torch.arange(self.key_positions.shape[1], device=self.device)
        itself = order == order[self.rows, None]  # (num_queries, num_keys)
        return (itself & ~self.key_valid[:, self.rows, None])[:, None]


def _in_form(allowed: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A boolean mask, or the additive one of that dtype."""
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
