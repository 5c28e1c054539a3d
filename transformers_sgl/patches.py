"""Which patches of a vision tower stand behind each visual token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Patches", "grid_rows", "places"]


@dataclass(frozen=True)
class Patches:
    """The patches behind the visual tokens that one call of a vision tower makes, in the order of the tokens.

    Attributes:
        rows (`Tensor` of shape `(num_tokens, patches_per_token)`): The rows of each token's patches in the tower's
            hidden states, `(tiles, rows_per_tile, width)` or `(rows, width)`, whose leading dimensions are flattened;
            a token of fewer patches than others repeats one; -1 for a token that the tower does not make, like the end
            of a row.
        tile (`Tensor` of shape `(num_tokens,)`): The tile of each token; -1 likewise.
        place (`Tensor` of shape `(num_tokens, 2)`): The row and the column of each token in its tile, in tokens; -1
            likewise.
        num_tiles (`int`): The number of tiles.
        num_rows (`int`): The number of rows of the hidden states.
        prefix (`int`): How many rows of each tile are no patches, like a class token; they come first.
        tile_sizes (`Tensor` of shape `(num_tiles,)`, *optional*): The number of rows of each tile in a packed tower,
            whose hidden states are `(rows, width)`, one tile behind the other. In other towers all tiles are alike.
    """

    rows: Tensor
    tile: Tensor
    place: Tensor
    num_tiles: int
    num_rows: int
    prefix: int = 0
    tile_sizes: Tensor | None = None

    def to(self, device: torch.device) -> Patches:
        """The same on another device."""
        tensors = {name: getattr(self, name) for name in ("rows", "tile", "place", "tile_sizes")}
        return replace(self, **{name: each.to(device) for name, each in tensors.items() if each is not None})


def grid_rows(num_rows: int, num_columns: int, merge: int) -> Tensor:
    """The patches of a grid, row by row, behind each token of `merge` x `merge` of them; `(num_tokens, merge**2)`."""
    grid = torch.arange(num_rows * num_columns).view(num_rows // merge, merge, num_columns // merge, merge)
    return grid.permute(0, 2, 1, 3).reshape(-1, merge * merge)


def places(num_tokens: int, num_columns: int) -> Tensor:
    """Row and column of each token of a grid, row by row; `(num_tokens, 2)`."""
    token = torch.arange(num_tokens)
    return torch.stack([token // num_columns, token % num_columns], dim=1)
