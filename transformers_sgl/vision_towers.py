"""What this package must know about vision towers to leave patches out of them, as a table.

Where a tower keeps its layers, and which patches stand behind each visual token. As in `architectures`, nothing
outside this file asks for a model's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_sgl.architectures import check_supported, visual_token_ids
from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = [
    "NOT_PRUNABLE",
    "VISION_TOWERS",
    "EncodedTokens",
    "Patches",
    "VisionTower",
    "check_tower_prunable",
    "encoded_tokens",
    "vision_layers",
    "with_tiles",
]


@dataclass(frozen=True)
class Patches:
    """The patches behind the visual tokens that one call of a vision tower makes, in the order of the tokens.

    Attributes:
        rows (`Tensor` of shape `(num_tokens, patches_per_token)`): The rows of each token's patches in the tower's
            hidden states, `(tiles, rows_per_tile, width)` or `(rows, width)`, whose leading dimensions are flattened;
            -1 for a token that the tower does not make, like the end of a row.
        tile (`Tensor` of shape `(num_tokens,)`): The tile of each token; -1 likewise.
        num_tiles (`int`): The number of tiles.
        num_rows (`int`): The number of rows of the hidden states.
        prefix (`int`): How many rows of each tile are no patches, like a class token; they come first.
    """

    rows: Tensor
    tile: Tensor
    num_tiles: int
    num_rows: int
    prefix: int = 0


@dataclass(frozen=True)
class VisionTower:
    """Where a model's vision tower can leave patches out.

    Attributes:
        layers (`str`): The path from the model to the tower's layers.
        patches (`Callable`): From the model's configuration, its inputs and the modality, `"image"` or `"video"`, to
            the [`Patches`] of the call that encodes them; `None` if there is nothing of that modality.
        is_packed (`bool`): Whether all images form one sequence, `(rows, width)`, with bounds between them.
        mergers (`tuple` of `str`): Paths to the modules, after some layers, that make visual tokens out of groups of
            neighbouring rows.
        overview (`int`, *optional*): Which of an image's tiles shows the whole of it, as an index: 0 or -1.
    """

    layers: str
    patches: Callable[[Any, dict[str, Any], str], Patches | None]
    is_packed: bool = False
    mergers: tuple[str, ...] = ()
    overview: int | None = None


@dataclass(frozen=True)
class EncodedTokens:
    """The visual tokens of a batch of prompts that one call of the vision tower makes.

    Attributes:
        places (`Tensor` of shape `(num_tokens, 2)`): The sample and the visual index of each.
        patches ([`Patches`]): The patches behind them.
    """

    places: Tensor
    patches: Patches


# ------------------------------------------------------------------------------------------- how patches become tokens


def _grid_rows(num_rows: int, num_columns: int, merge: int) -> Tensor:
    """The patches of a grid, row by row, behind each token of `merge` x `merge` of them; `(num_tokens, merge**2)`."""
    grid = torch.arange(num_rows * num_columns).view(num_rows // merge, merge, num_columns // merge, merge)
    return grid.permute(0, 2, 1, 3).reshape(-1, merge * merge)


def _square_tiles(merge: Callable[[Any], int], prefix: int) -> Callable[[Any, dict[str, Any], str], Patches | None]:
    """Tiles of one size, each with as many tokens, row by row; `merge` tells how many patches wide a token is."""

    def patches(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
        pixels = inputs.get("pixel_values") if modality == "image" else None
        if pixels is None:
            return None
        size = config.vision_config.patch_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        of_tile = _grid_rows(pixels.shape[-2] // height, pixels.shape[-1] // width, merge(config)) + prefix
        num_tiles = pixels.shape[:-3].numel()
        per_tile = pixels.shape[-2] // height * (pixels.shape[-1] // width) + prefix
        tile = torch.arange(num_tiles)
        rows = (of_tile + per_tile * tile[:, None, None]).flatten(0, 1)
        return Patches(rows, tile.repeat_interleave(len(of_tile)), num_tiles, per_tile * num_tiles, prefix)

    return patches


VISION_TOWERS: dict[str, VisionTower] = {
    "internvl": VisionTower(
        "model.vision_tower.encoder.layer",
        _square_tiles(lambda config: round(1 / config.downsample_ratio), prefix=1),
        overview=-1,
    ),
}

# Why the towers of the others cannot be pruned.
NOT_PRUNABLE: dict[str, str] = {}
_UNVERIFIED = "leaving patches out has not been verified on its vision tower"


def check_tower_prunable(config: PreTrainedConfig) -> VisionTower:
    """The table's entry for a model; raises `ValueError` if its vision tower cannot leave patches out."""
    check_supported(config)
    if config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"The vision tower of a {config.model_type!r} model cannot be pruned, because "
            f"{NOT_PRUNABLE.get(config.model_type, _UNVERIFIED)}: leave out `vision_retention_ratio`, "
            f"`vision_prune_layer` and `vision_processor`, or use one of {', '.join(sorted(VISION_TOWERS))}."
        )
    return VISION_TOWERS[config.model_type]


def vision_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model's vision tower, first to last; raises `ValueError` as [`check_tower_prunable`]."""
    layers: nn.ModuleList = attrgetter(check_tower_prunable(model.config).layers)(model)
    return layers


def encoded_tokens(
    config: PreTrainedConfig, inputs: dict[str, Any], visual_tokens: VisualTokens
) -> Iterator[EncodedTokens]:
    """The visual tokens that each call of the vision tower makes, in the order of the calls.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        inputs (`dict`): Its inputs, with `input_ids` of shape `(batch, prompt_length)`.
        visual_tokens ([`VisualTokens`]): The visual tokens of these prompts.

    Raises:
        ValueError: If the tower cannot be pruned, or makes another number of tokens than the prompts have.
    """
    tower = check_tower_prunable(config)
    of_image, of_video = (visual_token_ids(config, modality) for modality in ("image", "video"))
    has_own_video_id = bool(of_video) and not set(of_image) & set(of_video)
    ids = inputs["input_ids"].gather(1, visual_tokens.positions)
    for modality in ("image", "video"):
        patches = tower.patches(config, inputs, modality)
        if patches is None:
            continue
        chosen = visual_tokens.valid
        if has_own_video_id and tower.patches(config, inputs, "video") is not None:
            chosen = chosen & torch.isin(ids, ids.new_tensor(of_image if modality == "image" else of_video))
        places = chosen.nonzero()
        if len(places) != len(patches.rows):
            raise ValueError(
                f"The prompts have {len(places)} visual tokens of the modality {modality!r}, but the vision tower "
                f"makes {len(patches.rows)} of the pixels: pass the images that the prompts speak of, once each."
            )
        device = places.device
        yield EncodedTokens(places, replace(patches, rows=patches.rows.to(device), tile=patches.tile.to(device)))


def with_tiles(config: PreTrainedConfig, inputs: dict[str, Any], visual_tokens: VisualTokens) -> VisualTokens:
    """The same visual tokens with the tile of each, as the vision tower cuts the images of these inputs.

    Arguments and errors are those of [`encoded_tokens`].
    """
    tile_index = torch.full_like(visual_tokens.positions, -1)
    first = 0
    for call in encoded_tokens(config, inputs, visual_tokens):
        tile_index[tuple(call.places.T)] = torch.where(call.patches.tile >= 0, call.patches.tile + first, -1)
        first += call.patches.num_tiles
    # Tiles are counted within each sample.
    none = tile_index < 0
    smallest = tile_index.masked_fill(none, first).amin(dim=1, keepdim=True)
    tile_index = (tile_index - smallest).masked_fill(none, -1)

    overview = check_tower_prunable(config).overview
    is_overview = torch.zeros_like(visual_tokens.valid)
    if overview is not None:
        for sample, images in enumerate(visual_tokens.image_index):
            for image in images[images >= 0].unique():
                tiles = tile_index[sample, images == image]
                tiles = tiles[tiles >= 0].unique()
                if len(tiles) > 1:
                    is_overview[sample] |= tile_index[sample] == tiles[overview]
    return replace(visual_tokens, tile_index=tile_index, is_overview=is_overview)
