"""Which patches stand behind each visual token in towers that read tiles of one size, `(tiles, rows, width)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from transformers_sgl.patches import Patches, grid_rows, places
from transformers_sgl.transformers_interface import best_resolution

__all__ = ["is_no_padding", "next_tiles", "pooled_width", "tiles_of"]

_WITH_CLASS_TOKEN = ("clip_vision_model", "internvl_vision", "qianfan_ocr_vision")


def tiles_of(
    merge: Callable[[Any], int] = lambda config: 1, real: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Any, dict[str, Any], str], Patches | None]:
    """Tiles of one size, each with as many tokens, row by row.

    `merge` tells from the configuration how many patches wide a token is, `real` from the pixels, `(..., 3, height,
    width)`, which of them the model does not leave out itself.
    """

    def patches(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
        pixels = inputs.get("pixel_values") if modality == "image" else None
        if pixels is None:
            return None
        size = config.vision_config.patch_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        num_patches, prefix = pixels.shape[-2] // height * (pixels.shape[-1] // width), _prefix(config)
        num_columns = pixels.shape[-1] // width
        of_tile = grid_rows(pixels.shape[-2] // height, num_columns, merge(config)) + prefix
        place = places(len(of_tile), num_columns // merge(config))
        if prefix and getattr(config, "vision_feature_select_strategy", "default") == "full":
            # Class tokens are visual tokens as well; they lie beside the tile.
            of_tile = torch.cat([torch.arange(prefix)[:, None], of_tile])
            place = torch.cat([torch.full((prefix, 2), -1), place])
        num_tiles = pixels.shape[:-3].numel() if real is None else int(real(pixels).sum())
        return _alike(of_tile, place, num_tiles, num_patches + prefix, prefix)

    return patches


def _alike(of_tile: Tensor, place: Tensor, num_tiles: int, rows_per_tile: int, prefix: int) -> Patches:
    """The patches of tiles that give as many tokens each, with these rows of the tile, `(num_tokens, num_patches)`."""
    tile = torch.arange(num_tiles)
    rows = (of_tile + rows_per_tile * tile[:, None, None]).flatten(0, 1)
    tile, place = tile.repeat_interleave(len(of_tile)), place.repeat(num_tiles, 1)
    return Patches(rows, tile, place, num_tiles, rows_per_tile * num_tiles, prefix)


def _prefix(config: Any) -> int:
    """How many class tokens stand before a tile's patches."""
    return 1 if config.vision_config.model_type in _WITH_CLASS_TOKEN else 0


def is_no_padding(pixels: Tensor) -> Tensor:
    """The tiles that are not all zeros, with which samples of fewer tiles are padded."""
    return (pixels != 0).flatten(-3).any(dim=-1)


def next_tiles(has_newlines_in_videos: bool) -> Callable[[Any, dict[str, Any], str], Patches | None]:
    """The whole of an image, then its tiles put together, without margins and with a token behind each row."""

    def patches(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
        if modality == "video":
            return _pooled_frames(config, inputs, has_newlines_in_videos)
        if inputs.get("pixel_values") is None:
            return None
        side, prefix, per_tile = _square_tile(config)
        sizes = inputs["image_sizes"].tolist()
        companies = inputs.get("batch_num_images")
        is_cut = [True] * len(sizes) if companies is None else [n == 1 for n in companies.tolist() for _ in range(n)]
        tokens, first = [], 0
        for size, cut in zip(sizes, is_cut, strict=True):
            tokens.append(torch.arange(side * side)[:, None] + prefix + first * per_tile)
            first += 1
            if not cut:
                tokens.append(torch.tensor([[-1]]))  # the end of the only row
                continue
            height, width = best_resolution(tuple(size), config.image_grid_pinpoints)
            num_rows, num_columns = height // config.vision_config.image_size, width // config.vision_config.image_size
            grid = torch.arange(num_rows * num_columns)[:, None, None] + first
            grid = per_tile * grid + prefix + torch.arange(side * side).view(side, side)
            grid = grid.unflatten(0, (num_rows, num_columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            grid = _shrunk(_without_margins(grid, size), side, getattr(config, "vision_aspect_ratio", ""))
            tokens.append(pad(grid, (0, 0, 0, 1), value=-1).flatten(0, 1))
            first += num_rows * num_columns
        most = max(each.shape[1] for each in tokens)
        rows = torch.cat([each.expand(-1, most) for each in tokens])
        tile = torch.where(rows[:, 0] >= 0, rows[:, 0] // per_tile, -1)
        place = places(side * side, side)[(rows[:, 0] % per_tile - prefix).clamp(min=0)]
        return Patches(rows, tile, place.masked_fill(tile[:, None] < 0, -1), first, first * per_tile, prefix)

    return patches


def _square_tile(config: Any) -> tuple[int, int, int]:
    """How many patches a side a tile of the usual size has, how many class tokens, and how many rows in all."""
    side, prefix = config.vision_config.image_size // config.vision_config.patch_size, _prefix(config)
    return side, prefix, prefix + side * side


def _without_margins(grid: Tensor, size_px: list[int]) -> Tensor:
    """The part of a grid, `(height, width)`, that shows an image of that height and width, as LLaVA reckons it."""
    (height, width), (image_height, image_width) = grid.shape, size_px
    if image_width / image_height > width / height:
        margin = (height - int(round(image_height * (width / image_width), 7))) // 2
        return grid[margin : height - margin]
    margin = (width - int(round(image_width * (height / image_height), 7))) // 2
    return grid[:, margin : width - margin]


def _shrunk(grid: Tensor, side: int, aspect_ratio: str) -> Tensor:
    """The patches of each cell, `(height, width, num_patches)`, once a grid that is too large has been shrunk."""
    most = aspect_ratio.removeprefix("anyres_max_")
    ratio = math.sqrt(grid.numel() / (int(most) * side**2)) if most else 0.0
    if ratio <= 1.1:
        return grid[..., None]
    return _interpolated(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))


def _interpolated(grid: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """The four cells of a grid between which each of another size lies, `(num_rows, num_columns, 4)`."""

    def neighbours(number: int, wanted: int) -> Tensor:
        place = ((torch.arange(wanted).double() + 0.5) * (number / wanted) - 0.5).clamp(min=0)
        return torch.stack([place.long(), place.long() + 1], dim=1).clamp(max=number - 1)

    rows, columns = neighbours(grid.shape[0], num_rows), neighbours(grid.shape[1], num_columns)
    return grid[rows[:, None, :, None], columns[None, :, None, :]].flatten(2)


def _pooled_frames(config: Any, inputs: dict[str, Any], has_newlines: bool) -> Patches | None:
    """Frames whose patches are pooled, perhaps with a token behind each video."""
    pixels = inputs.get("pixel_values_videos")
    if pixels is None:
        return None
    side, prefix, per_tile = _square_tile(config)
    if has_newlines:
        half = math.ceil(side / 2)
        of_frame = _interpolated(torch.arange(side * side).view(side, side), half, half).flatten(0, 1)
    else:
        half = side // config.spatial_pool_stride
        of_frame = grid_rows(side, side, config.spatial_pool_stride)
    num_videos, num_frames = pixels.shape[:2]
    found = _alike(of_frame + prefix, places(len(of_frame), half), num_videos * num_frames, per_tile, prefix)
    if not has_newlines:
        return found
    rows, tile, place = (
        pad(each.reshape(num_videos, -1, each[0].numel()), (0, 0, 0, 1), value=-1).flatten(0, 1)
        for each in (found.rows, found.tile, found.place)
    )
    return replace(found, rows=rows, tile=tile[:, 0], place=place)


def pooled_width(config: Any) -> int:
    """How many patches wide a token is that pools them, so many tokens a side."""
    vision = config.vision_config
    return int(vision.image_size // vision.patch_size // math.isqrt(config.mm_tokens_per_image))
