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
from transformers_sgl.packed_patches import (
    in_blocks,
    in_reading_order,
    in_windows,
    native_sizes,
    packed_grids,
    video_llama_grids,
)
from transformers_sgl.patches import Patches
from transformers_sgl.tile_patches import is_no_padding, next_tiles, pooled_width, tiles_of
from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = [
    "NOT_PRUNABLE",
    "UNVERIFIED",
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
class VisionTower:
    """Where a model's vision tower can leave patches out.

    Attributes:
        layers (`str`): The path from the model to the tower's layers.
        patches (`Callable`): From the model's configuration, its inputs and the modality, `"image"` or `"video"`, to
            the [`Patches`] of the call that encodes them; `None` if there is nothing of that modality.
        mergers (`tuple` of `str`): Paths to the modules, or lists of modules, that make visual tokens out of groups of
            neighbouring rows, behind the last layer or others.
        overview (`int`, *optional*): Which of an image's tiles shows the whole of it, as an index: 0 or -1.
        tiles_apart (`bool`): Whether text stands between the tiles of an image. It is not told from the text between
            images, so all tiles of a prompt are taken for those of one image.
        kinds (`tuple` of `str`): The types of vision towers, by their own configuration, for which this holds; all
            that there are if empty.
    """

    layers: str
    patches: Callable[[Any, dict[str, Any], str], Patches | None]
    mergers: tuple[str, ...] = ()
    overview: int | None = None
    tiles_apart: bool = False
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncodedTokens:
    """The visual tokens of a batch of prompts that one call of the vision tower makes.

    Attributes:
        places (`Tensor` of shape `(num_tokens, 2)`): The sample and the visual index of each.
        patches ([`Patches`]): The patches behind them.
    """

    places: Tensor
    patches: Patches


def _qwen(path: str, order: Callable[[Any, Tensor], Tensor], *mergers: str) -> VisionTower:
    """A tower in the manner of Qwen-VL."""
    paths = tuple(f"{path}.{merger}" for merger in ("merger", *mergers))
    return VisionTower(f"{path}.blocks", packed_grids(order), mergers=paths)


_CLIP_OR_SIGLIP = ("clip_vision_model", "siglip_vision_model")
_SIGLIP = ("siglip_vision_model",)
_PIXTRAL = ("pixtral",)
_CLIP = "model.vision_tower.encoder.layers"
_EVERY_PATCH = tiles_of()
_INTERNVL = tiles_of(lambda config: round(1 / config.downsample_ratio))
_GEMMA3 = tiles_of(pooled_width)
_COHERE = tiles_of(lambda config: config.downsample_factor)
_IDEFICS3 = VisionTower(
    "model.vision_model.encoder.layers",
    tiles_of(lambda config: config.scale_factor, real=is_no_padding),
    overview=-1,
    tiles_apart=True,
)
_LLAVA_NEXT = VisionTower(_CLIP, next_tiles(has_newlines_in_videos=False), overview=0, kinds=_CLIP_OR_SIGLIP)

_GLM = VisionTower("model.visual.blocks", packed_grids(in_blocks))

VISION_TOWERS: dict[str, VisionTower] = {
    "aya_vision": VisionTower(_CLIP, _COHERE, overview=-1, tiles_apart=True, kinds=_SIGLIP),
    "cohere2_vision": VisionTower(_CLIP, _COHERE, overview=-1, tiles_apart=True, kinds=_SIGLIP),
    "cohere_compass": _qwen("model.visual", in_blocks, "deepstack_merger_list"),
    "cosmos3_omni": _qwen("model.visual", in_blocks, "deepstack_merger_list"),
    "deepseek_vl": VisionTower("model.vision_model.encoder.layers", _EVERY_PATCH, kinds=_SIGLIP),
    "exaone4_5": _qwen("model.visual", in_windows),
    "gemma3": VisionTower(_CLIP, _GEMMA3, kinds=_SIGLIP),
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "hyperclovax_vision_v2": _qwen("model.vision_model", in_windows),
    "idefics3": _IDEFICS3,
    "internvl": VisionTower("model.vision_tower.encoder.layer", _INTERNVL, overview=-1, kinds=("internvl_vision",)),
    "lighton_ocr": VisionTower("model.vision_encoder.transformer.layers", native_sizes, kinds=_PIXTRAL),
    "llava": VisionTower(_CLIP, _EVERY_PATCH, kinds=_CLIP_OR_SIGLIP),
    "llava_next": _LLAVA_NEXT,
    "llava_next_video": _LLAVA_NEXT,
    "llava_onevision": replace(_LLAVA_NEXT, patches=next_tiles(has_newlines_in_videos=True)),
    "mistral3": VisionTower("model.vision_tower.transformer.layers", native_sizes, kinds=_PIXTRAL),
    "ovis2": VisionTower(
        "model.vision_tower.transformer.encoder.layers",
        tiles_of(lambda config: config.vision_config.hidden_stride),
        overview=0,
        tiles_apart=True,
    ),
    "paddleocr_vl": VisionTower("model.visual.vision_model.encoder.layers", packed_grids(in_reading_order)),
    "paligemma": VisionTower(_CLIP, _EVERY_PATCH, kinds=_SIGLIP),
    "qianfan_ocr": VisionTower("model.vision_tower.layers", _INTERNVL, overview=-1),
    "qwen2_5_omni_thinker": _qwen("base_model.visual", in_windows),
    "qwen2_5_vl": _qwen("model.visual", in_windows),
    "qwen2_vl": _qwen("model.visual", in_blocks),
    "qwen3_5": _qwen("model.visual", in_blocks),
    "qwen3_5_moe": _qwen("model.visual", in_blocks),
    "qwen3_omni_moe_thinker": _qwen("base_model.visual", in_blocks, "merger_list"),
    "qwen3_vl": _qwen("model.visual", in_blocks, "deepstack_merger_list"),
    "qwen3_vl_moe": _qwen("model.visual", in_blocks, "deepstack_merger_list"),
    "shieldgemma2": VisionTower(_CLIP, _GEMMA3, kinds=_SIGLIP),
    "smolvlm": _IDEFICS3,
    "video_llama_3": VisionTower("model.vision_model.encoder.layers", video_llama_grids),
    "vipllava": VisionTower(_CLIP, _EVERY_PATCH, kinds=("clip_vision_model",)),
}

_CODEBOOK = "convolutions turn an image into entries of a codebook"
_CONVOLUTIONS = "it attends within windows of an image, and convolutions shrink its map of features"
_RESAMPLED = "each of its visual tokens is made of all patches of a tile"
_TIMM = "it comes from timm, where every tower has layers of its own"
_NO_TOWER = "it has none: the decoder reads the patches themselves"
_SHRINKS = "it joins patches between its layers"

# Why the towers of the others cannot be pruned.
NOT_PRUNABLE: dict[str, str] = {
    "apertus1p5": _CODEBOOK,
    "aria": _RESAMPLED,
    "chameleon": _CODEBOOK,
    "deepseek_ocr2": _RESAMPLED,
    "deepseek_vl_hybrid": _CONVOLUTIONS,
    "emu3": _CODEBOOK,
    "fast_vlm": _TIMM,
    "fuyu": _NO_TOWER,
    "gemma3n": _TIMM,
    "gemma4_unified": _NO_TOWER,
    "got_ocr2": _CONVOLUTIONS,
    "granite4_vision": "each of its visual tokens is made of all patches in a window",
    "idefics2": _RESAMPLED,
    "lfm3_vl": "some of its layers are convolutions over the grid of a frame",
    "llama4": "its class token stands behind the patches",
    "minicpm_ocr": _SHRINKS,
    "minicpmv4_6": _SHRINKS,
    "minicpmv4_7": _SHRINKS,
    "perception_lm": _TIMM,
    "pp_chart2table": _CONVOLUTIONS,
    "step3p7": "convolutions over neighbouring patches make its visual tokens",
    "video_llava": "it has one for images and another for videos",
}
UNVERIFIED = "leaving patches out has not been verified on its vision tower"


def check_tower_prunable(config: PreTrainedConfig) -> VisionTower:
    """The table's entry for a model; raises `ValueError` if its vision tower cannot leave patches out."""
    check_supported(config)
    if config.model_type not in VISION_TOWERS:
        raise ValueError(
            f"The vision tower of a {config.model_type!r} model cannot be pruned, because "
            f"{NOT_PRUNABLE.get(config.model_type, UNVERIFIED)}: leave out `vision_retention_ratio`, "
            f"`vision_prune_layer` and `vision_processor`, or use one of {', '.join(sorted(VISION_TOWERS))}."
        )
    tower = VISION_TOWERS[config.model_type]
    kind = config.vision_config.model_type if tower.kinds else ""
    if tower.kinds and kind not in tower.kinds:
        raise ValueError(
            f"The vision tower of this {config.model_type!r} model is of the type {kind!r}, where leaving patches out "
            "has not been verified: leave out `vision_retention_ratio`, `vision_prune_layer` and `vision_processor`, "
            f"or use a model with a tower of the type {' or '.join(map(repr, tower.kinds))}."
        )
    return tower


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
        found = chosen.nonzero()
        if len(found) != len(patches.rows):
            raise ValueError(
                f"The prompts have {len(found)} visual tokens of the modality {modality!r}, but the vision tower "
                f"makes {len(patches.rows)} of the pixels: pass the images that the prompts speak of, once each."
            )
        yield EncodedTokens(found, patches.to(found.device))


def with_tiles(config: PreTrainedConfig, inputs: dict[str, Any], visual_tokens: VisualTokens) -> VisualTokens:
    """The same visual tokens with the tile of each, as the vision tower cuts the images of these inputs.

    Arguments and errors are those of [`encoded_tokens`].
    """
    tile_index = torch.full_like(visual_tokens.positions, -1)
    tile_place = tile_index[..., None].repeat(1, 1, 2)
    first = 0
    for call in encoded_tokens(config, inputs, visual_tokens):
        tile_index[tuple(call.places.T)] = torch.where(call.patches.tile >= 0, call.patches.tile + first, -1)
        tile_place[tuple(call.places.T)] = call.patches.place
        first += call.patches.num_tiles
    # Tiles are counted within each sample.
    none = tile_index < 0
    smallest = pad(tile_index.masked_fill(none, first), (0, 1), value=first).amin(dim=1, keepdim=True)
    tile_index = (tile_index - smallest).masked_fill(none, -1)

    tower = check_tower_prunable(config)
    is_overview = torch.zeros_like(visual_tokens.valid)
    if tower.overview is not None:
        image_index = visual_tokens.valid.long() - 1 if tower.tiles_apart else visual_tokens.image_index
        for sample, images in enumerate(image_index):
            for image in images[images >= 0].unique():
                tiles = tile_index[sample, images == image]
                tiles = tiles[tiles >= 0].unique()
                if len(tiles) > 1:
                    is_overview[sample] |= tile_index[sample] == tiles[tower.overview]
    return replace(visual_tokens, tile_index=tile_index, tile_place=tile_place, is_overview=is_overview)
