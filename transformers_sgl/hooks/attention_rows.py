"""Some rows of an attention matrix, computed from the arguments of an attention function.

The whole matrix never exists: rows are computed in blocks, and summed.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AttentionScores", "received_attention"]

# Rows of attention held at a time. A block is then about as large as the layer's own queries, and the model itself
# holds several tensors of that size.
_MAX_BLOCK_ROWS = 128


class AttentionScores:
    """How a layer's queries and keys become attention, from the arguments of its attention function.

    The mask tells the keys that a query may attend to: `None` means all before it, `(batch, key_length)` those of them
    that are not padding (flash attention), `(batch or 1, heads or 1, query_length, key_length)` is the whole matrix,
    boolean (sdpa) or additive (eager).
    """

    def __init__(
        self,
        module: nn.Module,
        head_dim: int,
        attention_mask: Tensor | None,
        implementation: str,
        arguments: dict[str, Any],
    ) -> None:
        self.attention_mask = attention_mask
        scaling = arguments.get("scaling")
        self.scaling = head_dim**-0.5 if scaling is None else scaling
        self.softcap = arguments.get("softcap")
        self.sinks = arguments.get("s_aux")  # (heads,): the logit of attending to nothing
        is_causal = arguments.get("is_causal")
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        self.is_causal = attention_mask.dim() == 2 if attention_mask is not None else is_causal
        # Only flash attention is told of a sliding window; the others find it in their masks.
        self.window = arguments.get("sliding_window") if "flash" in implementation else None

    def of_last(self, num: int) -> AttentionScores:
        """The same for the last `num` queries of several decoding steps; these arguments are the last step's."""
        together = copy(self)
        if self.attention_mask is not None and self.attention_mask.dim() == 4:
            together.attention_mask = self.attention_mask[:, :, -1:]
        together.is_causal = self.is_causal or num > 1
        return together

    def __call__(self, query: Tensor, key: Tensor, behind: int = 0) -> Tensor:
        """The attention of consecutive queries, `(batch, heads, rows, key_length)` in float32.

        `query` has the shape `(batch, heads, rows, head_dim)`, `key` `(batch, key_value_heads, key_length, head_dim)`;
        `behind` is how many of the keys, and of the mask's rows, come after the last query.
        """
        batch_size, num_heads, num_rows, width = query.shape
        # The heads that share a key are grouped, so no key has to be repeated.
        grouped = (query * self.scaling).reshape(batch_size, key.shape[1], -1, width)
        scores = torch.matmul(grouped, key.transpose(-1, -2)).view(batch_size, num_heads, num_rows, key.shape[2])
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        self._mask(scores, behind)
        if self.sinks is None:
            return torch.softmax(scores, dim=-1, dtype=torch.float32)
        sinks = self.sinks.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]

    def _mask(self, scores: Tensor, behind: int) -> None:
        """Masks the keys that may not be seen in `(batch, heads, rows, key_length)`, in place."""
        mask, (num_rows, num_keys) = self.attention_mask, scores.shape[2:]
        # The lowest number instead of minus infinity: a padding query, which sees nothing at all, must not be NaN.
        lowest = torch.finfo(scores.dtype).min
        first = num_keys - behind - num_rows  # the first query's own key
        if self.is_causal and first + 1 < num_keys:
            later = torch.ones(num_rows, num_keys - first - 1, dtype=torch.bool, device=scores.device).triu()
            scores[..., first + 1 :].masked_fill_(later, lowest)
        if self.window is not None and (mask is None or mask.dim() == 2):
            position = torch.arange(num_keys, device=scores.device)
            own = position[first : first + num_rows, None]
            scores.masked_fill_(position <= own - self.window, lowest)
        if mask is None:
            return
        if mask.dim() == 2:
            scores.masked_fill_(~mask.bool()[:, None, None, :], lowest)
            return
        if mask.shape[2] > 1:
            mask = mask[:, :, mask.shape[2] - behind - num_rows : mask.shape[2] - behind]
        if mask.dtype == torch.bool:
            scores.masked_fill_(~mask, lowest)
        else:
            scores.add_(mask).clamp_(min=lowest)


def received_attention(query: Tensor, key: Tensor, scores: AttentionScores, behind: int, weights: Tensor) -> Tensor:
    """The attention that every key gets from consecutive queries, summed over both; `(batch, key_length)`.

    Arguments as in [`AttentionScores`]; `weights`, `(batch, rows)`, is `True` for the rows that count in a sample.
    """
    received = torch.zeros(query.shape[0], key.shape[2], dtype=torch.float32, device=key.device)
    num_rows = query.shape[2]
    for start in range(0, num_rows, _MAX_BLOCK_ROWS):
        stop = min(start + _MAX_BLOCK_ROWS, num_rows)
        attention = scores(query[:, :, start:stop], key, behind + num_rows - stop)
        received += attention.mul_(weights[:, None, start:stop, None]).sum(dim=(1, 2))
    return received
