"""Which visual tokens a vision tower encodes: whole tiles, or the best of every tile.

Pure tensors. These are steps like those of `importance_process`; they run before those, and what they drop is never
encoded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from transformers_sgl.tokens.importance_process import (
    DROPPED,
    ImportanceProcessor,
    ImportanceProcessorList,
    checked_ratio,
    rank_within,
)

if TYPE_CHECKING:
    from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = ["BlurProcessor", "RetentionPerTileProcessor", "TileRetentionProcessor", "vision_processors"]

# A tile is as important as so many of its tokens: what an answer needs is mostly a small part of a tile.
_NUM_BEST_TOKENS = 8


def vision_processors(retention_ratio: float, within_tiles: bool) -> ImportanceProcessorList:
    """What the settings ask for; empty where every token is encoded.

    `retention_ratio`, in `(0, 1]`, is the fraction of visual tokens to encode. `within_tiles` tells whether tokens of
    a tile can be left out, and not only whole tiles.
    """
    if retention_ratio == 1:
        return ImportanceProcessorList()
    if within_tiles:
        return ImportanceProcessorList([BlurProcessor(), RetentionPerTileProcessor(retention_ratio)])
    return ImportanceProcessorList([TileRetentionProcessor(retention_ratio)])


class TileRetentionProcessor(ImportanceProcessor):
    """Keeps whole tiles, frames and images: as many as fit into a fraction of each sample's visual tokens.

    A tile that shows a whole image always stays. Of the others those stay whose eight most important tokens have the
    largest sum; at least one tile of every sample does.

    Args:
        retention_ratio (`float`): The fraction of visual tokens kept, in `(0, 1]`.

    Raises:
        ValueError: If the ratio is out of range, or, when called, if it is not known which tokens form a tile.

    Example:
        ```python
        >>> from dataclasses import replace
        >>> import torch
        >>> from transformers_sgl import TileRetentionProcessor, VisualTokens

        >>> tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 9, 9, 9, 9]]), token_ids=9)
        >>> tokens = replace(tokens, tile_index=torch.tensor([[0, 0, 1, 1, 2, 2]]))
        >>> TileRetentionProcessor(0.7)(tokens, torch.tensor([[0.3, 0.1, 0.2, 0.1, 0.0, 0.9]]))
        tensor([[0.3000, 0.1000,   -inf,   -inf, 0.0000, 0.9000]])

        ```
    """

    def __init__(self, retention_ratio: float) -> None:
        self.retention_ratio = checked_ratio(retention_ratio)

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """Drops all tokens of the less important tiles; see [`ImportanceProcessor`]."""
        tile, left = _tiles(visual_tokens), importance > DROPPED
        is_best = left & (rank_within(tile, importance) < _NUM_BEST_TOKENS)
        score = _sum_by_tile(tile, importance.double().masked_fill(~is_best, 0.0))
        stays = torch.zeros_like(score, dtype=torch.bool)
        if visual_tokens.is_overview is not None:
            stays = _sum_by_tile(tile, (visual_tokens.is_overview & left).long()) > 0
        sizes = _sum_by_tile(tile, left.long())
        score = score.masked_fill(stays, torch.inf).masked_fill(sizes == 0, DROPPED)

        order = score.argsort(dim=1, descending=True, stable=True)
        used = sizes.gather(1, order).cumsum(dim=1)
        budget = torch.floor(visual_tokens.counts.double() * self.retention_ratio).long()[:, None]
        fits = (used <= budget) | stays.gather(1, order)
        fits[:, :1] = True
        kept = torch.zeros_like(fits).scatter(1, order, fits)
        return importance.masked_fill((tile >= 0) & ~kept.gather(1, tile.clamp(min=0)), DROPPED)


class BlurProcessor(ImportanceProcessor):
    """Spreads importance over neighbouring tokens of a tile, so that what stays is patches with their surroundings.

    A vision tower that goes on with scattered patches reads an object worse than one that sees what lies around it.
    The blur is a Gaussian, cut off two standard deviations away; nothing spreads beyond a tile. Dropped and protected
    tokens stay what they are.

    Args:
        sigma (`float`, *optional*, defaults to 1.0): The standard deviation, in tokens.

    Raises:
        ValueError: If `sigma` is not above 0, or, when called, if it is not known where in its tile a token stands.

    Example:
        ```python
        >>> from dataclasses import replace
        >>> import torch
        >>> from transformers_sgl import BlurProcessor, VisualTokens

        >>> tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 9]]), token_ids=9)
        >>> tokens = replace(
        ...     tokens, tile_index=torch.tensor([[0, 0, 0]]), tile_place=torch.tensor([[[0, 0], [0, 1], [0, 2]]])
        ... )
        >>> BlurProcessor()(tokens, torch.tensor([[0.0, 1.0, 0.0]]))
        tensor([[0.0983, 0.1621, 0.0983]])

        ```
    """

    def __init__(self, sigma: float = 1.0) -> None:
        if not isinstance(sigma, (int, float)) or isinstance(sigma, bool) or not sigma > 0:
            raise ValueError(f"`sigma` is {sigma!r}, but it is a width in tokens: pass a number above 0.")
        self.sigma = sigma

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """Blurs the importance of every tile; see [`ImportanceProcessor`]."""
        tile, place = _tiles(visual_tokens), visual_tokens.tile_place
        if place is None:
            raise ValueError(
                "It is not known where in its tile a token stands: pass `VisualTokens` with `tile_place`."
            )
        in_tile, is_finite = (tile >= 0) & (place[..., 0] >= 0), importance.isfinite()
        samples = torch.arange(len(tile), device=tile.device)[:, None].expand_as(tile)[in_tile]
        where = (samples, tile[in_tile], *place[in_tile].unbind(dim=-1))
        shape = [len(tile), *(int(each.max()) + 1 if each.numel() else 1 for each in where[1:])]
        pictures = importance.new_zeros(shape)  # (batch, num_tiles, rows, columns)
        pictures[where] = importance.masked_fill(~is_finite, 0.0)[in_tile]

        reach = math.ceil(2 * self.sigma)
        steps = torch.arange(-reach, reach + 1, device=importance.device, dtype=importance.dtype)
        kernel = torch.exp(-(steps**2) / (2 * self.sigma**2))
        kernel = kernel / kernel.sum()
        blurred = pictures.flatten(0, 1)[:, None]
        blurred = conv2d(blurred, kernel.view(1, 1, -1, 1), padding=(reach, 0))
        blurred = conv2d(blurred, kernel.view(1, 1, 1, -1), padding=(0, reach)).view(shape)
        result = importance.clone()
        result[in_tile] = blurred[where]
        return torch.where(is_finite, result, importance)


class RetentionPerTileProcessor(ImportanceProcessor):
    """Keeps a fixed fraction of the visual tokens of every tile, frame or image, the most important ones.

    Of `T` tokens of a tile, `max(1, floor(retention_ratio * T))` are kept; of equally important ones the earlier. So
    every tile keeps the same number, and a vision tower can go on with all of them at once.

    Args:
        retention_ratio (`float`): The fraction of a tile's tokens kept, in `(0, 1]`.

    Raises:
        ValueError: If the ratio is out of range, or, when called, if it is not known which tokens form a tile.

    Example:
        ```python
        >>> from dataclasses import replace
        >>> import torch
        >>> from transformers_sgl import RetentionPerTileProcessor, VisualTokens

        >>> tokens = VisualTokens.from_input_ids(torch.tensor([[9, 9, 9, 9]]), token_ids=9)
        >>> tokens = replace(tokens, tile_index=torch.tensor([[0, 0, 1, 1]]))
        >>> RetentionPerTileProcessor(0.5)(tokens, torch.tensor([[0.3, 0.1, 0.0, 0.1]]))
        tensor([[0.3000,   -inf,   -inf, 0.1000]])

        ```
    """

    def __init__(self, retention_ratio: float) -> None:
        self.retention_ratio = checked_ratio(retention_ratio)

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        """Drops all but the most important tokens of every tile; see [`ImportanceProcessor`]."""
        tile = _tiles(visual_tokens)
        sizes = _sum_by_tile(tile, torch.ones_like(tile))
        budget = torch.floor(sizes.double() * self.retention_ratio).long().clamp(min=1)
        over = rank_within(tile, importance) >= budget.gather(1, tile.clamp(min=0))
        return importance.masked_fill((tile >= 0) & over, DROPPED)


def _tiles(visual_tokens: VisualTokens) -> Tensor:
    """The tile of each token; raises `ValueError` if it is not known."""
    if visual_tokens.tile_index is None:
        raise ValueError(
            "It is not known which visual tokens form a tile: pass `VisualTokens` with a `tile_index`, as "
            "`transformers_sgl.vision_towers.with_tiles` returns them."
        )
    return visual_tokens.tile_index


def _sum_by_tile(tile: Tensor, values: Tensor) -> Tensor:
    """The sum of each tile's values, of shape `(batch, num_tiles)`; tokens without a tile are left out."""
    num_tiles = int(tile.max()) + 1 if tile.numel() else 1
    sums = values.new_zeros(len(tile), max(1, num_tiles))
    return sums.scatter_add(1, tile.clamp(min=0), values.masked_fill(tile < 0, 0))
