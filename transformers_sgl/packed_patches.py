"""Which patches stand behind each visual token in towers that read all images as one sequence, `(rows, width)`.

A tile is an image, or a frame of a video; what a tower calls a frame is two or so of the video's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_sgl.patches import Patches, grid_rows, places
from transformers_sgl.transformers_interface import vision_window_index

__all__ = ["in_blocks", "in_reading_order", "in_windows", "native_sizes", "packed_grids", "video_llama_grids"]

_GRID_INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


def packed_grids(order: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, dict[str, Any], str], Patches | None]:
    """Images and frames in one sequence; `order` tells each token's rows from the tower's settings and the grids."""

    def patches(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
        pixels, grid = _GRID_INPUTS[modality]
        if inputs.get(pixels) is None:
            return None
        grid_thw, vision = inputs[grid].cpu(), config.vision_config
        return _packed(order(vision, grid_thw), _frames(grid_thw), vision.spatial_merge_size)

    return patches


def _frames(grid_thw: Tensor) -> Tensor:
    """The height and width of each image and of each frame of a video, in patches; `(num_frames, 2)`."""
    return grid_thw[:, 1:].repeat_interleave(grid_thw[:, 0], dim=0)


def _packed(rows: Tensor, grids: Tensor, merge: Tensor | int) -> Patches:
    """Tiles in one sequence.

    `rows` has the patches of each token, `(num_tokens, patches_per_token)`; `grids` the height and width of each tile
    in patches, `(num_tiles, 2)`; `merge` how many of them a token is wide, in all tiles or in each, `(num_tiles, 1)`.
    """
    sizes = grids.prod(dim=1)
    tile = torch.arange(len(sizes)).repeat_interleave(sizes)[rows[:, 0]]
    place = torch.cat([places(height * width, width) for height, width in (grids // merge).tolist()])
    return Patches(rows, tile, place, len(sizes), int(sizes.sum()), tile_sizes=sizes)


def in_blocks(vision_config: Any, grid_thw: Tensor) -> Tensor:
    """The patches of a token stand side by side."""
    return torch.arange(int(grid_thw.prod(dim=1).sum())).view(-1, vision_config.spatial_merge_size**2)


def in_windows(vision_config: Any, grid_thw: Tensor) -> Tensor:
    """The same, after the blocks have been sorted by windows."""
    config = vision_config
    index = vision_window_index(grid_thw, config.spatial_merge_size, config.window_size, config.patch_size)
    return in_blocks(config, grid_thw)[index.argsort()]


def in_reading_order(vision_config: Any, grid_thw: Tensor) -> Tensor:
    """The patches of a frame stand row by row."""
    return _packed_rows(_frames(grid_thw), vision_config.spatial_merge_size)


def _packed_rows(grids: Tensor, merge: int) -> Tensor:
    """The patches behind each token of several grids, `(num_tiles, 2)`, each row by row."""
    rows, first = [], 0
    for height, width in grids.tolist():
        rows.append(grid_rows(height, width, merge) + first)
        first += height * width
    return torch.cat(rows)


def native_sizes(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
    """Images of any size in one sequence, row by row."""
    if modality != "image" or inputs.get("pixel_values") is None:
        return None
    grids = torch.as_tensor(inputs["image_sizes"]).cpu() // config.vision_config.patch_size
    return _packed(_packed_rows(grids, config.spatial_merge_size), grids, config.spatial_merge_size)


def video_llama_grids(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
    """Grids with a size of token for each; of videos, some tokens are left out behind the tower."""
    pixels, grid = _GRID_INPUTS[modality]
    if inputs.get(pixels) is None:
        return None
    grid_thw, merge = inputs[grid].cpu(), inputs[f"{modality}_merge_sizes"].cpu()
    areas, rows, first = (merge**2).tolist(), [], 0
    for count, area in zip(grid_thw.prod(dim=1).tolist(), areas, strict=True):
        blocks = torch.arange(first, first + count).view(-1, area)
        rows.append(torch.cat([blocks, blocks[:, :1].expand(-1, max(areas) - area)], dim=1))
        first += count
    found = _packed(torch.cat(rows), _frames(grid_thw), merge.repeat_interleave(grid_thw[:, 0])[:, None])
    left = inputs.get("video_compression_mask") if modality == "video" else None
    if left is None:
        return found
    left = left.cpu()
    return replace(found, rows=found.rows[left], tile=found.tile[left], place=found.place[left])
