"""From importance to a choice of visual tokens: the step before the large model's prefill.

Pure tensors, modelled on transformers' `LogitsProcessor`. A processor takes the importance of every visual token and
returns it changed; in the end every token of importance `-inf` is dropped. `+inf` protects a token: later processors
keep it, and count it within their budgets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = [
    "ImportanceProcessor",
    "ImportanceProcessorList",
    "MinimumPerImageProcessor",
    "RetentionRatioProcessor",
    "checked_ratio",
    "rank_within",
    "token_budget",
]

DROPPED = float("-inf")
PROTECTED = float("inf")


class ImportanceProcessor(ABC):
    """A step between the small model's attention and the large model's prefill.

    Write your own by implementing `__call__`, and pass it to `generate(importance_processor=...)`.

    Example:
        ```python
        >>> from transformers_sgl import ImportanceProcessor

        >>> class EveryOther(ImportanceProcessor):
        ...     def __call__(self, visual_tokens, importance):
        ...         importance = importance.clone()
        ...         importance[:, 1::2] = float("-inf")
        ...         return importance

        ```

    Attributes:
        needs_features (`bool`, defaults to `False`): Whether it reads `visual_tokens.features`, which are recorded for
            processors of which one does.
    """

    needs_features: bool = False

    @abstractmethod
    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """Changes the importance of visual tokens.

        Args:
            visual_tokens (`VisualTokens`): Where the tokens stand, and to which image each belongs.
            importance (`Tensor` of shape `(batch, num_visual_tokens)`): Non-negative float32 importance; `-inf` for
                dropped tokens and padding, `+inf` for protected tokens.

        Returns:
            `Tensor` of shape `(batch, num_visual_tokens)`: The new importance.
        """


class ImportanceProcessorList(list[ImportanceProcessor]):
    """Processors that run one after the other.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl import ImportanceProcessorList, RetentionRatioProcessor, VisualTokens

        >>> tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 9, 9, 5]]), token_ids=9)
        >>> keep = ImportanceProcessorList([RetentionRatioProcessor(0.5)])
        >>> keep.keep_mask(tokens, torch.tensor([[0.1, 0.4, 0.3, 0.2]])).tolist()
        [[False, True, True, False]]

        ```
    """

    @classmethod
    def of_settings(
        cls,
        retention_ratio: float,
        min_tokens_per_image: int,
        own: ImportanceProcessor | Iterable[ImportanceProcessor] | None = None,
    ) -> ImportanceProcessorList:
        """The user's processors, then those that the settings ask for; empty where every token is kept.

        Args:
            retention_ratio (`float`): The fraction of visual tokens to keep, in `(0, 1]`.
            min_tokens_per_image (`int`): The fewest tokens of an image to keep, 0 or more.
            own ([`ImportanceProcessor`] or several, *optional*): The user's processors.

        Raises:
            ValueError: If `own` holds something that cannot be called.
        """
        processors = cls.of_user("importance_processor", own)
        if retention_ratio < 1:
            if min_tokens_per_image > 0:
                processors.append(MinimumPerImageProcessor(min_tokens_per_image))
            processors.append(RetentionRatioProcessor(retention_ratio))
        return processors

    @classmethod
    def of_user(
        cls, name: str, own: ImportanceProcessor | Iterable[ImportanceProcessor] | None = None
    ) -> ImportanceProcessorList:
        """The user's processors, passed as an argument of that name; raises `ValueError` if one cannot be called."""
        processors = cls(own if isinstance(own, Iterable) else [] if own is None else [own])
        for processor in processors:
            if not callable(processor):
                raise ValueError(
                    f"`{name}` is or holds {processor!r}: pass an ImportanceProcessor, or a list of them."
                )
        return processors

    @property
    def needs_features(self) -> bool:
        """Whether one of them reads the features of visual tokens."""
        return any(getattr(each, "needs_features", False) for each in self)

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """Runs every processor in turn; raises `ValueError` if one changes the shape or returns NaN."""
        for processor in self:
            shape = importance.shape
            importance = processor(visual_tokens, importance)
            name = type(processor).__name__
            if not isinstance(importance, Tensor) or not importance.is_floating_point():
                returned = f"{importance.dtype}" if isinstance(importance, Tensor) else type(importance).__name__
                raise ValueError(
                    f"{name} returned {returned} instead of a tensor of floating-point importance: return one value "
                    "per visual token, and -inf to drop one."
                )
            if importance.shape != shape:
                raise ValueError(
                    f"{name} returned importance of shape {tuple(importance.shape)} instead of {tuple(shape)}: return "
                    "one value per visual token, and -inf to drop one."
                )
            if importance.isnan().any():
                raise ValueError(f"{name} returned NaN: return finite importance, or -inf to drop a token.")
            # Padding must not use up the next processor's budget.
            importance = importance.masked_fill(~visual_tokens.valid, DROPPED)
        return importance

    def keep_mask(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """The visual tokens that remain after all processors.

        Args:
            visual_tokens (`VisualTokens`): Where the tokens stand.
            importance (`Tensor` of shape `(batch, num_visual_tokens)`): Their importance.

        Returns:
            `Tensor` of shape `(batch, num_visual_tokens)`: `True` for tokens to keep, `False` for others and padding.

        Raises:
            ValueError: If a sample that has visual tokens would keep none.
        """
        kept = self(visual_tokens, importance.masked_fill(~visual_tokens.valid, DROPPED)) > DROPPED
        kept &= visual_tokens.valid
        if (visual_tokens.valid.any(dim=1) & ~kept.any(dim=1)).any():
            raise ValueError(
                "The importance processors dropped every visual token of a sample: leave at least one above -inf."
            )
        return kept


class RetentionRatioProcessor(ImportanceProcessor):
    """Keeps a fixed fraction of each sample's visual tokens, the most important ones (paper, section 3.2).

    Of `V` tokens, `max(1, floor(retention_ratio * V))` are kept; of equally important ones the earlier.

    Args:
        retention_ratio (`float`): The fraction kept, in `(0, 1]`.

    Raises:
        ValueError: If the ratio is out of range.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl import RetentionRatioProcessor, VisualTokens

        >>> tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 9, 5]]), token_ids=9)
        >>> RetentionRatioProcessor(0.4)(tokens, torch.tensor([[0.2, 0.7, 0.1]]))
        tensor([[  -inf, 0.7000,   -inf]])

        ```
    """

    def __init__(self, retention_ratio: float) -> None:
        self.retention_ratio = checked_ratio(retention_ratio)

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """Drops all but the most important tokens; see [`ImportanceProcessor`]."""
        budget = token_budget(visual_tokens, importance, self.retention_ratio)
        return importance.masked_fill(_rank(importance) >= budget[:, None], DROPPED)


class MinimumPerImageProcessor(ImportanceProcessor):
    """Protects the most important tokens of every image, so that no image vanishes from a prompt.

    Put it before the processors that drop: protected tokens count within their budgets.

    Args:
        min_tokens (`int`): How many tokens of each image to protect; all of them where an image has fewer.

    Raises:
        ValueError: If the number is not 1 or more.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl import MinimumPerImageProcessor, VisualTokens

        >>> tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 5, 9, 9]]), token_ids=9)
        >>> MinimumPerImageProcessor(1)(tokens, torch.tensor([[0.5, 0.4, 0.0, 0.1]]))
        tensor([[   inf, 0.4000, 0.0000,    inf]])

        ```
    """

    def __init__(self, min_tokens: int) -> None:
        if isinstance(min_tokens, bool) or not isinstance(min_tokens, int) or min_tokens < 1:
            raise ValueError(f"`min_tokens` is {min_tokens!r}: pass a whole number of 1 or more.")
        self.min_tokens = min_tokens

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """Sets each image's most important tokens to `+inf`; see [`ImportanceProcessor`]."""
        rank = rank_within(visual_tokens.image_index, importance)
        protect = (rank < self.min_tokens) & visual_tokens.valid
        # A token dropped by an earlier processor stays dropped.
        return importance.masked_fill(protect & (importance > DROPPED), PROTECTED)


def checked_ratio(retention_ratio: float) -> float:
    """The ratio; raises `ValueError` if it is out of range."""
    is_number = isinstance(retention_ratio, (int, float)) and not isinstance(retention_ratio, bool)
    if not is_number or not 0 < retention_ratio <= 1:
        raise ValueError(f"`retention_ratio` is {retention_ratio!r}: pass a number above 0 and up to 1.")
    return retention_ratio


def token_budget(visual_tokens: VisualTokens, importance: Tensor, retention_ratio: float) -> Tensor:
    """How many tokens of each sample are kept, `(batch,)`: the fraction, or all protected ones if they are more."""
    # In float64, so that the count is what `math.floor(retention_ratio * V)` says in plain Python.
    budget = torch.floor(visual_tokens.counts.double() * retention_ratio).long().clamp(min=1)
    return torch.maximum(budget, (importance == PROTECTED).sum(dim=1))


def rank_within(group: Tensor, importance: Tensor) -> Tensor:
    """Each token's place in descending importance within its group of the sample, equal ones in order.

    All have the shape `(batch, num_visual_tokens)`.
    """
    # In the order of groups, and by descending importance within each, ...
    order = importance.argsort(dim=1, descending=True, stable=True)
    groups, by_group = group.gather(1, order).sort(dim=1, stable=True)
    order = order.gather(1, by_group)
    # ... a token's rank within its group is how far it stands behind the group's first.
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    opens = torch.ones_like(groups, dtype=torch.bool)
    opens[:, 1:] = groups[:, 1:] != groups[:, :-1]
    rank = place - torch.where(opens, place, 0).cummax(dim=1).values
    return torch.empty_like(rank).scatter(1, order, rank)


def _rank(importance: Tensor) -> Tensor:
    """Each token's place in descending importance, equal ones in order; shape `(batch, num_visual_tokens)`."""
    order = importance.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
