"""Choosing visual tokens as a set: of important ones that show the same, a few are enough.

Pure tensors. These are steps like those of `importance_process`, for the last place among them. Beside importance they
read the tokens' features. Both choose greedily, one token of every sample at a time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from transformers_sgl.tokens.importance_process import (
    DROPPED,
    PROTECTED,
    ImportanceProcessor,
    ImportanceProcessorList,
    checked_ratio,
    token_budget,
)

if TYPE_CHECKING:
    from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = ["SELECTIONS", "ConditionalDPPProcessor", "FacilityLocationProcessor", "decoder_processors"]

# The most tokens that are all compared with each other.
_BLOCK_SIZE = 512
# After how many tokens of each block to ask whether more can be among the kept ones; each time waits for the device.
_CHECK_EVERY = 16


def decoder_processors(
    retention_ratio: float, min_tokens_per_image: int, selection: str = "top_k"
) -> ImportanceProcessorList:
    """What the settings ask for; empty where every token is kept.

    The arguments are those of [`ImportanceProcessorList.of_settings`]; `selection` is `"top_k"` or one of
    [`SELECTIONS`].
    """
    processors = ImportanceProcessorList.of_settings(retention_ratio, min_tokens_per_image)
    if selection in SELECTIONS and retention_ratio < 1:
        processors[-1] = SELECTIONS[selection](retention_ratio)
    return processors


class _GreedyProcessor(ImportanceProcessor):
    """Keeps a fixed fraction of each sample's visual tokens, chosen one after the other by importance and features."""

    needs_features = True

    def __init__(self, retention_ratio: float) -> None:
        self.retention_ratio = checked_ratio(retention_ratio)

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """Drops all but the chosen tokens; see [`ImportanceProcessor`]."""
        features = visual_tokens.features
        if features is None:
            raise ValueError(
                f"{type(self).__name__} compares the features of visual tokens, but there are none: pass "
                "`VisualTokens` with `features`, of the shape (batch, num_visual_tokens, width)."
            )
        if features.shape[:-1] != importance.shape:
            raise ValueError(
                f"The visual tokens' features have the shape {tuple(features.shape)}, but the importance "
                f"{tuple(importance.shape)}: pass one row of features per visual token."
            )
        if importance.shape[1] == 0:
            return importance
        budget = token_budget(visual_tokens, importance, self.retention_ratio)
        left = importance > DROPPED
        keeps_all = left.sum(dim=1) <= budget
        finite = importance.masked_fill(~importance.isfinite(), 0.0).float().clamp(min=0.0)
        relevance = finite / finite.amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        unit = normalize(features.to(importance.device).float().nan_to_num(0.0, 0.0, 0.0), dim=-1)
        chosen = self._choose(unit, relevance, importance == PROTECTED, left.clone(), budget.masked_fill(keeps_all, 0))
        chosen |= left & keeps_all[:, None]
        return importance.masked_fill(~chosen & ~importance.isnan(), DROPPED)  # NaN is refused by who called

    def _choose(self, unit: Tensor, relevance: Tensor, protected: Tensor, left: Tensor, wanted: Tensor) -> Tensor:
        """The `wanted`, `(batch,)`, tokens of those `left`; all else but `unit` is `(batch, num_visual_tokens)`.

        `unit` holds features of length 1, `(batch, num_visual_tokens, width)`; `relevance` is importance, at most 1.
        """
        raise NotImplementedError


class ConditionalDPPProcessor(_GreedyProcessor):
    """Keeps a fixed fraction of each sample's visual tokens: those that are important, and unlike each other.

    As many tokens are kept as by [`RetentionRatioProcessor`]. They are chosen one by one, greedily, so that the
    determinant of their kernel is the largest: the most probable set of a determinantal point process that is
    conditioned on the question by the importance (arXiv 2506.10967; greedy search as in arXiv 1709.05135). The kernel
    of tokens `i` and `j` is `importance[i] * importance[j] * (diversity * cosine(i, j) + (1 - diversity) * (i == j))`,
    with the cosine of their features. Each step takes the token of the largest `importance**2 * novelty`, where the
    novelty is 1 at first, and what the tokens chosen so far do not explain of it later; of equal ones the earlier.

    Protected tokens are chosen first. A token whose features are zero or not finite is unlike any other. The memory
    for `V` tokens with features of width `W` is that of `V * W` and `W * W` numbers, however many are kept.

    Args:
        retention_ratio (`float`): The fraction kept, in `(0, 1]`.
        diversity (`float`, *optional*, defaults to 0.9): How much likeness counts, at least 0 and below 1. With 0 the
            most important tokens are kept.

    Raises:
        ValueError: If an argument is out of range, or, when called, if the visual tokens have no features.

    Example:
        ```python
        >>> from dataclasses import replace
        >>> import torch
        >>> from transformers_sgl import ConditionalDPPProcessor, VisualTokens

        >>> tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 9, 5]]), token_ids=9)
        >>> tokens = replace(tokens, features=torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]))
        >>> ConditionalDPPProcessor(0.7)(tokens, torch.tensor([[0.5, 0.4, 0.3]]))
        tensor([[0.5000,   -inf, 0.3000]])

        ```
    """

    def __init__(self, retention_ratio: float, diversity: float = 0.9) -> None:
        super().__init__(retention_ratio)
        is_number = isinstance(diversity, (int, float)) and not isinstance(diversity, bool)
        if not is_number or not 0 <= diversity < 1:
            raise ValueError(f"`diversity` is {diversity!r}: pass a number of at least 0 and below 1.")
        self.diversity = diversity

    def _choose(self, unit: Tensor, relevance: Tensor, protected: Tensor, left: Tensor, wanted: Tensor) -> Tensor:
        """The greedy choice; see the base class."""
        relevance = relevance.masked_fill(protected, PROTECTED)
        # Scaled so that the product of two rows is what their tokens have in common.
        unit = unit * self.diversity**0.5
        own = 1 - self.diversity  # what of a token no other explains
        # The novelty of token i, given the chosen tokens Y, is `1 - |u_i|**2 + u_i (I + U_Y' U_Y / own)^-1 u_i'`: what
        # a Cholesky factor of Y's kernel gives, at a cost for each step that does not grow with Y.
        novelty, chosen = torch.ones_like(relevance), torch.zeros_like(left)
        inverse = torch.eye(unit.shape[-1], device=unit.device).expand(len(unit), -1, -1).clone()
        samples = torch.arange(len(unit), device=unit.device)
        for step in range(int(wanted.max())):
            best = (relevance * novelty.sqrt()).masked_fill(~left, DROPPED).argmax(dim=1)  # (batch,)
            counts = step < wanted
            chosen[samples, best] |= counts
            left[samples, best] &= ~counts
            row = unit[samples, best, :, None]  # (batch, width, 1)
            direction = inverse @ row
            pivot = own + (row * direction).sum(dim=1, keepdim=True)
            likeness = unit @ direction  # (batch, num_visual_tokens, 1)
            novelty = (novelty - (likeness.square() / pivot)[..., 0]).clamp(min=own)
            inverse -= direction @ direction.mT / pivot
        return chosen


class FacilityLocationProcessor(_GreedyProcessor):
    """Keeps a fixed fraction of each sample's visual tokens: those that stand for what is important.

    As many tokens are kept as by [`RetentionRatioProcessor`]. They are chosen one by one, greedily, so that
    `sum over tokens i of importance[i] * max over kept tokens j of similarity(i, j)` is the largest: every important
    token should have a kept one like it, itself or another (facility location, Lin and Bilmes, ACL 2011). To this,
    `own_share * importance[j]` is added for every kept token j, so that important tokens go on to be kept when all
    have one like them. The similarity is the cosine of both tokens' features, at least 0. Of tokens that add the same
    the earlier is taken.

    Protected tokens are chosen first. A token whose features are zero or not finite is like itself alone. Of more than
    512 tokens that are not dropped yet, only those of the same block are compared: they form as few blocks as
    possible, of about the same size, in the order of the prompt. The budget is one for all blocks of a sample. The
    memory for `V` tokens with features of width `W` is that of `V * 1024` and `V * W` numbers.

    Args:
        retention_ratio (`float`): The fraction kept, in `(0, 1]`.
        own_share (`float`, *optional*, defaults to 1.0): How much a kept token counts for itself, beside what it
            stands for; 0 or more. The larger, the more the choice is that of the most important tokens.

    Raises:
        ValueError: If an argument is out of range, or, when called, if the visual tokens have no features.

    Example:
        ```python
        >>> from dataclasses import replace
        >>> import torch
        >>> from transformers_sgl import FacilityLocationProcessor, VisualTokens

        >>> tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 9, 5]]), token_ids=9)
        >>> tokens = replace(tokens, features=torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]))
        >>> FacilityLocationProcessor(0.7)(tokens, torch.tensor([[0.5, 0.4, 0.3]]))
        tensor([[0.5000,   -inf, 0.3000]])

        ```
    """

    def __init__(self, retention_ratio: float, own_share: float = 1.0) -> None:
        super().__init__(retention_ratio)
        is_number = isinstance(own_share, (int, float)) and not isinstance(own_share, bool)
        if not is_number or not 0 <= own_share < math.inf:
            raise ValueError(f"`own_share` is {own_share!r}: pass a number of 0 or more.")
        self.own_share = own_share

    def _choose(self, unit: Tensor, relevance: Tensor, protected: Tensor, left: Tensor, wanted: Tensor) -> Tensor:
        """The greedy choice; see the base class."""
        token_of = _blocks(left)
        # One more token, like no other and of no weight, stands where a block has none.
        features = pad(unit.flatten(0, 1), (0, 0, 0, 1))[token_of]
        weight = pad(relevance.flatten(), (0, 1))[token_of]  # (num_blocks, size)
        first = pad(protected.flatten(), (0, 1))[token_of]
        similarity = (features @ features.mT).clamp_(0.0, 1.0)  # (num_blocks, size, size)
        similarity.diagonal(dim1=1, dim2=2).fill_(1.0)
        more = torch.empty_like(similarity)

        # Blocks are independent, and what their tokens add never grows from one choice to the next. So each block puts
        # its tokens in order by itself, all blocks at once; a choice among all tokens would go along these orders.
        free, covered = token_of < left.numel(), torch.zeros_like(weight)
        gain = pad(relevance.flatten(), (0, 1)).fill_(DROPPED)  # what each token added when its block chose it
        blocks, last_wanted = torch.arange(len(token_of), device=left.device), (wanted[:, None] - 1).clamp(min=0)
        for step in range(min(int(wanted.max()), token_of.shape[1])):
            torch.sub(similarity, covered[:, None], out=more).clamp_(min=0.0)
            gains = (more @ weight[..., None])[..., 0] + self.own_share * weight
            gains = gains.masked_fill(first, PROTECTED).masked_fill(~free, DROPPED)
            best = gains.argmax(dim=1)
            last = gains[blocks, best]
            gain[token_of[blocks, best].masked_fill(~free[blocks, best], left.numel())] = last
            free[blocks, best] = False
            covered = torch.maximum(covered, similarity[blocks, best])
            if len(token_of) > len(left) and (step + 1) % _CHECK_EVERY == 0:
                least = gain[:-1].view_as(relevance).sort(dim=1, descending=True).values.gather(1, last_wanted)
                if (last < least[token_of[:, 0] // left.shape[1], 0]).all():
                    break  # what the blocks would choose from here on adds too little
        order = gain[:-1].view_as(relevance).sort(dim=1, descending=True, stable=True).indices
        is_wanted = torch.arange(left.shape[1], device=left.device) < wanted[:, None]
        return torch.zeros_like(left).scatter_(1, order, is_wanted)


def _blocks(left: Tensor) -> Tensor:
    """Puts each sample's tokens that are `left` into blocks of about the same size, in order.

    Returns the numbers of the tokens of each block in the flattened batch, `(num_blocks, size)`. Where a block has no
    token, its number is that of all tokens.
    """
    count, rank = left.sum(dim=1, keepdim=True), left.cumsum(dim=1) - 1
    num_blocks = (count + _BLOCK_SIZE - 1) // _BLOCK_SIZE  # (batch, 1)
    size = ((count + num_blocks - 1) // num_blocks.clamp(min=1)).clamp(min=1)
    end = num_blocks.cumsum(dim=0)
    block_of, slot_of = end - num_blocks + rank // size, rank % size
    token_of = rank.new_full((int(end[-1]), int(size.max())), left.numel())
    token_of[block_of[left], slot_of[left]] = left.flatten().nonzero()[:, 0]
    return token_of


SELECTIONS: dict[str, type[_GreedyProcessor]] = {
    "dpp": ConditionalDPPProcessor,
    "facility_location": FacilityLocationProcessor,
}
