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
from torch.nn.functional import pad
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_sgl.architectures import check_supported, visual_token_ids
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.transformers_interface import vision_window_index

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
            a token of fewer patches than others repeats one; -1 for a token that the tower does not make, like the end
            of a row.
        tile (`Tensor` of shape `(num_tokens,)`): The tile of each token; -1 likewise.
        num_tiles (`int`): The number of tiles.
        num_rows (`int`): The number of rows of the hidden states.
        prefix (`int`): How many rows of each tile are no patches, like a class token; they come first.
        tile_sizes (`Tensor` of shape `(num_tiles,)`, *optional*): The number of rows of each tile in a packed tower,
            whose hidden states are `(rows, width)`, one tile behind the other. In other towers all tiles are alike.
    """

    rows: Tensor
    tile: Tensor
    num_tiles: int
    num_rows: int
    prefix: int = 0
    tile_sizes: Tensor | None = None

    def to(self, device: torch.device) -> Patches:
        """The same on another device."""
        sizes = self.tile_sizes if self.tile_sizes is None else self.tile_sizes.to(device)
        return replace(self, rows=self.rows.to(device), tile=self.tile.to(device), tile_sizes=sizes)


@dataclass(frozen=True)
class VisionTower:
    """Where a model's vision tower can leave patches out.

    Attributes:
        layers (`str`): The path from the model to the tower's layers.
        patches (`Callable`): From the model's configuration, its inputs and the modality, `"image"` or `"video"`, to
            the [`Patches`] of the call that encodes them; `None` if there is nothing of that modality.
        mergers (`tuple` of `str`): Paths to the modules, or lists of modules, that make visual tokens out of groups of
            neighbouring rows, behind the last layer or others.
        overview (`int`, *optional*): Which of an image's tiles shows the whole of it, as an index: 0 or -1.
    """

    layers: str
    patches: Callable[[Any, dict[str, Any], str], Patches | None]
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


_GRID_INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


def _packed_grids(
    order: Callable[[Any, Tensor], Tensor],
) -> Callable[[Any, dict[str, Any], str], Patches | None]:
    """Images and frames in one sequence; `order` tells each token's rows from the tower's settings and the grids."""

    def patches(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
        pixels, grid = _GRID_INPUTS[modality]
        if inputs.get(pixels) is None:
            return None
        grid_thw = inputs[grid].cpu()
        return _packed(order(config.vision_config, grid_thw), _frames(grid_thw))

    return patches


def _frames(grid_thw: Tensor) -> Tensor:
    """The height and width of each image and of each frame of a video, in patches; `(num_frames, 2)`."""
    return grid_thw[:, 1:].repeat_interleave(grid_thw[:, 0], dim=0)


def _packed(rows: Tensor, grids: Tensor) -> Patches:
    """Grids, `(num_tiles, 2)`, in one sequence, whose tokens have those rows, `(num_tokens, patches_per_token)`."""
    sizes = grids.prod(dim=1)
    tile = torch.arange(len(sizes)).repeat_interleave(sizes)
    return Patches(rows, tile[rows[:, 0]], len(sizes), len(tile), tile_sizes=sizes)


def _in_blocks(vision_config: Any, grid_thw: Tensor) -> Tensor:
    """The patches of a token stand side by side."""
    return torch.arange(int(grid_thw.prod(dim=1).sum())).view(-1, vision_config.spatial_merge_size**2)


def _in_windows(vision_config: Any, grid_thw: Tensor) -> Tensor:
    """The same, after the blocks have been sorted by windows."""
    config = vision_config
    index = vision_window_index(grid_thw, config.spatial_merge_size, config.window_size, config.patch_size)
    return _in_blocks(config, grid_thw)[index.argsort()]


def _in_reading_order(vision_config: Any, grid_thw: Tensor) -> Tensor:
    """The patches of a frame stand row by row."""
    return _packed_rows(_frames(grid_thw), vision_config.spatial_merge_size)


def _packed_rows(grids: Tensor, merge: int) -> Tensor:
    """The patches behind each token of several grids, `(num_tiles, 2)`, each row by row."""
    rows, first = [], 0
    for height, width in grids.tolist():
        rows.append(_grid_rows(height, width, merge) + first)
        first += height * width
    return torch.cat(rows)


def _native_sizes(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
    """Images of any size in one sequence, row by row."""
    if modality != "image" or inputs.get("pixel_values") is None:
        return None
    grids = torch.as_tensor(inputs["image_sizes"]).cpu() // config.vision_config.patch_size
    return _packed(_packed_rows(grids, config.spatial_merge_size), grids)


def _video_llama_grids(config: Any, inputs: dict[str, Any], modality: str) -> Patches | None:
    """Grids with a size of token for each; of videos, some tokens are left out behind the tower."""
    pixels, grid = _GRID_INPUTS[modality]
    if inputs.get(pixels) is None:
        return None
    grid_thw, areas = inputs[grid].cpu(), inputs[f"{modality}_merge_sizes"].cpu() ** 2
    rows, first = [], 0
    for count, area in zip(grid_thw.prod(dim=1).tolist(), areas.tolist(), strict=True):
        blocks = torch.arange(first, first + count).view(-1, area)
        rows.append(torch.cat([blocks, blocks[:, :1].expand(-1, int(areas.max()) - area)], dim=1))
        first += count
    made = inputs.get("video_compression_mask") if modality == "video" else None
    chosen = torch.cat(rows) if made is None else torch.cat(rows)[made.cpu()]
    return _packed(chosen, _frames(grid_thw))


def _qwen(path: str, order: Callable[[Any, Tensor], Tensor], *mergers: str) -> VisionTower:
    """A tower in the manner of Qwen-VL."""
    paths = tuple(f"{path}.{merger}" for merger in ("merger", *mergers))
    return VisionTower(f"{path}.blocks", _packed_grids(order), mergers=paths)


_GLM = VisionTower("model.visual.blocks", _packed_grids(_in_blocks))

VISION_TOWERS: dict[str, VisionTower] = {
    "internvl": VisionTower(
        "model.vision_tower.encoder.layer",
        _square_tiles(lambda config: round(1 / config.downsample_ratio), prefix=1),
        overview=-1,
    ),
    "cohere_compass": _qwen("model.visual", _in_blocks, "deepstack_merger_list"),
    "cosmos3_omni": _qwen("model.visual", _in_blocks, "deepstack_merger_list"),
    "exaone4_5": _qwen("model.visual", _in_windows),
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "hyperclovax_vision_v2": _qwen("model.vision_model", _in_windows),
    "lighton_ocr": VisionTower("model.vision_encoder.transformer.layers", _native_sizes),
    "mistral3": VisionTower("model.vision_tower.transformer.layers", _native_sizes),
    "paddleocr_vl": VisionTower("model.visual.vision_model.encoder.layers", _packed_grids(_in_reading_order)),
    "qwen2_5_omni_thinker": _qwen("base_model.visual", _in_windows),
    "qwen2_5_vl": _qwen("model.visual", _in_windows),
    "qwen2_vl": _qwen("model.visual", _in_blocks),
    "qwen3_5": _qwen("model.visual", _in_blocks),
    "qwen3_5_moe": _qwen("model.visual", _in_blocks),
    "qwen3_omni_moe_thinker": _qwen("base_model.visual", _in_blocks, "merger_list"),
    "qwen3_vl": _qwen("model.visual", _in_blocks, "deepstack_merger_list"),
    "qwen3_vl_moe": _qwen("model.visual", _in_blocks, "deepstack_merger_list"),
    "video_llama_3": VisionTower("model.vision_model.encoder.layers", _video_llama_grids),
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
    ids = inputs["input_ids"].gather(1, visual_tokens.positions)
    made = {modality: tower.patches(config, inputs, modality) for modality in ("image", "video")}
    is_mixed = None not in made.values()
    for modality, patches in made.items():
        if patches is None:
            continue
        chosen = visual_tokens.valid
        if is_mixed:
            chosen = chosen & torch.isin(ids, ids.new_tensor(visual_token_ids(config, modality)))
        places = chosen.nonzero()
        if len(places) != len(patches.rows):
            raise ValueError(
                f"The prompts have {len(places)} visual tokens of the modality {modality!r}, but the vision tower "
                f"makes {len(patches.rows)} of the pixels: pass the images that the prompts speak of, once each."
            )
        yield EncodedTokens(places, patches.to(places.device))


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
    smallest = pad(tile_index.masked_fill(none, first), (0, 1), value=first).amin(dim=1, keepdim=True)
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
