"""What this package must know about a transformers architecture.

Floor 0: where a model keeps its decoder layers, which ids stand for visual tokens, and what is peculiar about it. An
architecture is an entry in a table; nothing outside this file asks for a model's type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "ARCHITECTURES",
    "UNSUPPORTED",
    "Architecture",
    "AttentionPattern",
    "attention_implementation",
    "attention_modules",
    "attention_pattern",
    "check_prunable",
    "check_supported",
    "decoder",
    "decoder_layers",
    "visual_token_ids",
]


@dataclass(frozen=True)
class Architecture:
    """Where an image-text-to-text architecture keeps what guidance and pruning need.

    Attributes:
        visual_token_attributes (`tuple` of `str`): The configuration's attributes that hold the ids of visual tokens.
        layers_attribute (`str`): The attribute of `model.get_decoder()` that holds the decoder layers.
        attention_attributes (`tuple` of `str`): The attributes of a decoder layer that may hold its attention. A layer
            with none of them mixes its tokens otherwise: by linear attention or a convolution.
        per_token_arguments (`tuple` of `str`): Further arguments of a decoder layer that hold one row per token, along
            their second dimension.
        deepstack (`tuple` of `str`, *optional*): The arguments of the decoder that hold the places of visual tokens
            and what is added to them after each of the first layers.
        inputs (`dict`): What a row of each image input is: a `"tile"` or a patch, all of which give equally many
            visual tokens; a `"grid"`, the sizes of an image in patches, whose product goes with its tokens; something
            else of one `"image"`; or of one `"sample"`.
        image_gap (`int`): The most text tokens that may stand between two visual tokens of one image.
    """

    visual_token_attributes: tuple[str, ...] = ("image_token_id", "video_token_id")
    layers_attribute: str = "layers"
    attention_attributes: tuple[str, ...] = ("self_attn",)
    per_token_arguments: tuple[str, ...] = ()
    deepstack: tuple[str, str] | None = None
    inputs: dict[str, str] = field(default_factory=lambda: {"pixel_values": "tile"})
    image_gap: int = 0


@dataclass(frozen=True)
class AttentionPattern:
    """Which of the tokens before it a layer's token may attend to; all of them if nothing is set.

    Attributes:
        window (`int`, *optional*): Only the last so many, itself included.
        chunk (`int`, *optional*): Only those of its own chunk of so many.
    """

    window: int | None = None
    chunk: int | None = None


_PATCHES = {
    "pixel_values": "tile",
    "image_grid_thw": "grid",
    "pixel_values_videos": "tile",
    "video_grid_thw": "grid",
}
_DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")

ARCHITECTURES: dict[str, Architecture] = {
    "internvl": Architecture(inputs={"pixel_values": "tile", "pixel_values_videos": "tile"}),
    "llava": Architecture(),
    "gemma3": Architecture(),
    "qwen2_vl": Architecture(inputs=_PATCHES),
    "qwen2_5_vl": Architecture(inputs=_PATCHES),
    "qwen3_vl": Architecture(inputs=_PATCHES, deepstack=_DEEPSTACK),
    "qwen3_vl_moe": Architecture(inputs=_PATCHES, deepstack=_DEEPSTACK),
    "qwen3_5": Architecture(inputs=_PATCHES),
}

# Why the others cannot be guided and cannot guide.
UNSUPPORTED: dict[str, str] = {}

# Attention functions that are handed a block mask or a paged cache, which can neither be recorded nor cut.
_UNSUPPORTED_ATTENTION = ("flex_attention", "paged")


def check_supported(config: PreTrainedConfig) -> Architecture:
    """The table's entry for a model, if guidance and pruning are known to be right for it.

    Args:
        config (`PreTrainedConfig`): The model's configuration.

    Returns:
        `Architecture`: The entry.

    Raises:
        ValueError: If the architecture is not supported.
    """
    if config.model_type in UNSUPPORTED:
        raise ValueError(
            f"Models of type {config.model_type!r} are not supported, because {UNSUPPORTED[config.model_type]}: use a "
            "model that reads its visual tokens in its decoder, in the places of placeholder tokens."
        )
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"Models of type {config.model_type!r} are not supported, because guidance and pruning have not been "
            f"verified on them: use one of {', '.join(map(repr, sorted(ARCHITECTURES)))}."
        )
    return ARCHITECTURES[config.model_type]


def check_prunable(config: PreTrainedConfig) -> None:
    """Raises if a model of a supported architecture can guide, but not be guided.

    Args:
        config (`PreTrainedConfig`): The model's configuration.

    Raises:
        ValueError: If its layers cannot be handed fewer tokens.
    """
    check_supported(config)
    if getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", None):
        raise ValueError(
            f"This {config.model_type!r} model cannot be pruned, because its upper layers read the keys and values of "
            "lower ones, which see every token: use it as the small model, or one without shared layers as the large."
        )


def visual_token_ids(config: PreTrainedConfig, modality: str = "") -> tuple[int, ...]:
    """The token ids that stand for visual tokens in a model's prompts.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        modality (`str`, *optional*): Only those for an `"image"`, or for a `"video"`.

    Returns:
        `tuple` of `int`: The ids.
    """
    names = check_supported(config).visual_token_attributes
    ids = (getattr(config, name, None) for name in names if modality in name)
    return tuple(dict.fromkeys(each for each in ids if each is not None))


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder of a vision-language model, without the language modelling head.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `PreTrainedModel`: The decoder.
    """
    check_supported(model.config)
    return model.get_decoder()


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function that a model's decoder uses.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `str`: `"sdpa"`, `"eager"`, `"flash_attention_2"` or another that guidance and pruning can work with.

    Raises:
        ValueError: If they cannot work with it.
    """
    name: str = decoder(model).config._attn_implementation
    if any(unsupported in name for unsupported in _UNSUPPORTED_ATTENTION):
        raise ValueError(
            f"Guidance and pruning do not work with attn_implementation={name!r}, whose masks and caches they cannot "
            "read: load the model with 'sdpa', 'flash_attention_2' or 'eager'."
        )
    return name


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a vision-language model, first to last.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `nn.ModuleList`: The layers.
    """
    return getattr(decoder(model), check_supported(model.config).layers_attribute)


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention of those decoder layers that have one.

    Args:
        model (`PreTrainedModel`): The model.

    Returns:
        `dict` from `int` to `nn.Module`: The modules, in order, by the index of their layer.
    """
    attributes = check_supported(model.config).attention_attributes
    found: dict[int, nn.Module] = {}
    for index, layer in enumerate(decoder_layers(model)):
        for name in attributes:
            if getattr(layer, name, None) is not None:
                found[index] = getattr(layer, name)
    return found


def attention_pattern(model: PreTrainedModel, index: int) -> AttentionPattern:
    """Which of the tokens before it a token may attend to in a decoder layer.

    Args:
        model (`PreTrainedModel`): The model.
        index (`int`): The layer's index.

    Returns:
        `AttentionPattern`: A sliding window, a chunk, or all of them.
    """
    config: Any = decoder(model).config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    if types is None:
        return AttentionPattern(window=getattr(config, "sliding_window", None))
    if types[index] == "sliding_attention":
        return AttentionPattern(window=config.sliding_window)
    if types[index] == "chunked_attention":
        return AttentionPattern(chunk=config.attention_chunk_size)
    return AttentionPattern()
