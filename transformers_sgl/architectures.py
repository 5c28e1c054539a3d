"""What this package must know about each transformers architecture, as a table.

Where a model keeps its decoder layers, which ids stand for visual tokens, and other peculiarities. Nothing outside
this file asks for a model's type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.transformers_interface import attention_name, is_attention, stock_fault

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
    "key_sources",
    "visual_token_ids",
    "visual_tokens_of",
]


@dataclass(frozen=True)
class Architecture:
    """Where an image-text-to-text architecture keeps what guidance and pruning need.

    Attributes:
        visual_token_attributes (`tuple` of `str`): The configuration's attributes that hold the ids of visual tokens.
        decoder_attribute (`str`, *optional*): The attribute of `model.get_decoder()` that holds the decoder, where
            that is not the decoder itself.
        attention_attributes (`tuple` of `str`): The attributes of a decoder layer that may hold its attention. A layer
            without any mixes its tokens otherwise: by linear attention or a convolution.
        per_token_arguments (`dict` from `str` to `int`): Further arguments of a decoder layer that hold one row per
            token, and along which dimension.
        deepstack (`tuple` of `str`, *optional*): The decoder's arguments for the places of visual tokens and for the
            features added to them between its first layers.
        inputs (`dict`): What a row of each image input belongs to: a `"tile"` or patch (all give equally many visual
            tokens), an `"image"`, a `"video"`, a `"sample"`, the name of the input that holds each row's height and
            width (their product goes with its visual tokens), or `"batch"` (only the whole can be understood).
        answer_token_type (`int`, *optional*): The mark of the answer's tokens in `token_type_ids`, where it is not
            that of the prompt's last token.
        image_gap (`int`): The most text tokens between two visual tokens of one image.
    """

    visual_token_attributes: tuple[str, ...] = ("image_token_id", "video_token_id")
    decoder_attribute: str | None = None
    attention_attributes: tuple[str, ...] = ("self_attn",)
    per_token_arguments: dict[str, int] = field(default_factory=dict)
    deepstack: tuple[str, str] | None = None
    inputs: dict[str, str] = field(default_factory=lambda: {"pixel_values": "tile"})
    answer_token_type: int | None = None
    image_gap: int = 0


@dataclass(frozen=True)
class AttentionPattern:
    """The earlier tokens to which a layer's token may attend; all of them if nothing is set.

    Attributes:
        window (`int`, *optional*): The last so many, itself included.
        chunk (`int`, *optional*): Those of its own chunk of so many.
    """

    window: int | None = None
    chunk: int | None = None


# How image inputs are divided: pictures of one size; patches and their grids; images of different sizes; views of
# different sizes; rows of samples; and inputs that only the whole batch explains.
_PATCHES = {
    "pixel_values": "tile",
    "image_grid_thw": "image_grid_thw",
    "pixel_values_videos": "tile",
    "video_grid_thw": "video_grid_thw",
    "second_per_grid_ts": "video",
    "video_second_per_grid": "video",
}
_SIZED = {"pixel_values": "image", "image_sizes": "image"}
_POSITIONED = {"pixel_values": "image", "image_position_ids": "image"}
_SPATIAL = dict.fromkeys(("pixel_values", "pixel_attention_mask", "spatial_shapes"), "spatial_shapes")
_SAMPLES = {"pixel_values": "sample", "pixel_attention_mask": "sample"}
_LOCAL = dict.fromkeys(("pixel_values", "num_local_patches", "pixel_values_local"), "batch")
_VIEWS = dict.fromkeys(("pixel_values", "target_sizes", "pixel_values_videos", "target_sizes_videos"), "batch")
_POOLED = dict.fromkeys(
    (
        *("pixel_values", "image_token_pooling", "image_grids", "image_num_crops"),
        *("pixel_values_videos", "video_token_pooling", "video_grids"),
    ),
    "batch",
)
_COMPRESSED = dict.fromkeys(
    ("pixel_values_videos", "video_grid_thw", "video_merge_sizes", "video_compression_mask"), "batch"
)
_DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")
_PER_LAYER = {"per_layer_input": -2}

_TILES = Architecture()
_GRIDS = Architecture(inputs=_PATCHES)

ARCHITECTURES: dict[str, Architecture] = {
    "apertus1p5": Architecture(inputs=_SIZED, image_gap=1),
    "aria": Architecture(inputs={"pixel_values": "tile", "pixel_mask": "tile"}),
    "aya_vision": _TILES,
    "chameleon": _TILES,
    "cohere2_vision": _TILES,
    "cohere_compass": Architecture(inputs=_PATCHES, deepstack=_DEEPSTACK),
    "cosmos3_edge": _GRIDS,
    "cosmos3_omni": Architecture(inputs=_PATCHES, deepstack=_DEEPSTACK),
    "deepseek_ocr2": Architecture(inputs=_LOCAL),
    "deepseek_vl": _TILES,
    "deepseek_vl_hybrid": Architecture(inputs={"pixel_values": "tile", "high_res_pixel_values": "tile"}),
    "emu3": Architecture(inputs=_SIZED),
    "ernie4_5_vl_moe": Architecture(inputs=_PATCHES, per_token_arguments={"moe_mm_token_type_ids": -1}),
    "exaone4_5": _GRIDS,
    "fast_vlm": _TILES,
    "fuyu": Architecture(inputs={"pixel_values": "tile", "image_patches": "tile"}, image_gap=1),
    "gemma3": _TILES,
    "gemma3n": Architecture(per_token_arguments=_PER_LAYER),
    "gemma4": Architecture(inputs=_POSITIONED, per_token_arguments=_PER_LAYER),
    "gemma4_unified": Architecture(inputs=_POSITIONED, per_token_arguments=_PER_LAYER),
    "glm46v": _GRIDS,
    "glm4v": _GRIDS,
    "glm4v_moe": _GRIDS,
    "glm_ocr": _GRIDS,
    "glmga": _GRIDS,
    "got_ocr2": _TILES,
    "granite4_vision": Architecture(inputs=_SIZED, deepstack=("vision_mask", "deepstack_features")),
    "granite_docling": Architecture(inputs=_SAMPLES, deepstack=_DEEPSTACK),
    "hunyuan_vl": _GRIDS,
    "hyperclovax_vision_v2": _GRIDS,
    "idefics2": Architecture(inputs=_SAMPLES),
    "idefics3": Architecture(inputs=_SAMPLES),
    "internvl": _TILES,
    "kimi_k25": _GRIDS,
    "lfm2_vl": Architecture(inputs=_SPATIAL, image_gap=1),
    "lfm3_vl": _GRIDS,
    "lighton_ocr": Architecture(inputs=_SIZED),
    "llama4": Architecture(decoder_attribute="model", image_gap=2),
    "llava": _TILES,
    "llava_next": Architecture(inputs=_SIZED),
    "llava_next_video": Architecture(inputs={**_SIZED, "pixel_values_videos": "video"}),
    "llava_onevision": Architecture(inputs={**_SIZED, "batch_num_images": "sample", "pixel_values_videos": "video"}),
    "minicpm_ocr": Architecture(inputs=_VIEWS),
    "minicpmv4_6": Architecture(inputs=_VIEWS),
    "minicpmv4_7": Architecture(inputs=_VIEWS),
    "minimax_m3_vl": _GRIDS,
    "mistral3": Architecture(inputs=_SIZED, image_gap=1),
    "molmo2": Architecture(inputs=_POOLED, image_gap=1),
    "muse_glimmer": _GRIDS,
    "muse_spark": _GRIDS,
    "nemotron_h_omni": Architecture(
        inputs={"pixel_values": "tile", "image_grid_hw": "image_grid_hw"},
        decoder_attribute="model",
        attention_attributes=("mixer",),
    ),
    "ovis2": _TILES,
    "paddleocr_vl": _GRIDS,
    "paligemma": Architecture(answer_token_type=1),
    "perception_lm": Architecture(inputs={"pixel_values": "image", "pixel_values_videos": "video"}),
    "pp_chart2table": _TILES,
    "qianfan_ocr": _TILES,
    "qwen2_5_omni_thinker": _GRIDS,
    "qwen2_5_vl": _GRIDS,
    "qwen2_vl": _GRIDS,
    "qwen3_5": _GRIDS,
    "qwen3_5_moe": _GRIDS,
    "qwen3_omni_moe_thinker": Architecture(inputs=_PATCHES, deepstack=_DEEPSTACK),
    "qwen3_vl": Architecture(inputs=_PATCHES, deepstack=_DEEPSTACK),
    "qwen3_vl_moe": Architecture(inputs=_PATCHES, deepstack=_DEEPSTACK),
    "shieldgemma2": _TILES,
    "smolvlm": Architecture(inputs=_SAMPLES),
    "step3p7": Architecture(inputs=_LOCAL),
    "video_llama_3": Architecture(inputs={**_PATCHES, "image_merge_sizes": "image", **_COMPRESSED}),
    "video_llava": Architecture(
        inputs={"pixel_values": "image", "pixel_values_images": "image", "pixel_values_videos": "video"}
    ),
    "vipllava": _TILES,
}

_ENCODER_DECODER = "it is an encoder-decoder, whose decoder sees the image only through cross-attention"
_CROSS_ATTENTION = "its decoder sees images only through cross-attention layers"
_INNER_GENERATE = "its `generate` hands everything on to the `generate` of a model inside"
_MASKED_PLACES = (
    "its configuration names no id for visual tokens; only `image_embeds_position_mask` tells their places"
)
_INDEXED = "its layers choose single tokens by their index"
_DISTANCES = "its layers count the distances between tokens in their caches, which a shorter prompt would change"

# Why the others can neither guide nor be guided.
UNSUPPORTED: dict[str, str] = {
    "blip": _CROSS_ATTENTION,
    "blip-2": _INNER_GENERATE,
    "diffusion_gemma": "it writes blocks of tokens by diffusion, and not one after the other",
    "dots3_note": _INDEXED,
    "evolla": "it reads proteins, through cross-attention layers, and no images",
    "florence2": _ENCODER_DECODER,
    "git": "it puts an image's features in front of the text, where no placeholder stands for them",
    "glm5_next": _INDEXED,
    "hy_v4_vl": _INDEXED,
    "idefics": _CROSS_ATTENTION,
    "inkling2": _DISTANCES,
    "inkling2_loop": _DISTANCES,
    "inkling_mm_model": _DISTANCES,
    "instructblip": _INNER_GENERATE,
    "instructblipvideo": _INNER_GENERATE,
    "janus": "its own `generate` withholds logits processors from the text that it writes",
    "kosmos-2": _MASKED_PLACES,
    "kosmos-2.5": _MASKED_PLACES,
    "mistral4": "it is a text decoder alone, which sees images as a part of a 'mistral3' model",
    "mistral_large4": _INDEXED,
    "mllama": _CROSS_ATTENTION,
    "pi0": "it writes the actions of a robot, and no text",
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "qwen4_exp": _INDEXED,
    "t5gemma2": "it is an encoder-decoder, and its visual tokens stand in the encoder's prompt",
    "udop": _ENCODER_DECODER,
    "unlimited_ocr": "its cache remembers how long the prompt was, so no layer can be handed a shorter one",
    "vision-encoder-decoder": _ENCODER_DECODER,
}

# Kinds of decoder layers that can run on fewer tokens.
_LAYER_TYPES = {
    *("full_attention", "sliding_attention", "chunked_attention"),
    *("linear_attention", "conv", "moe", "mlp"),
}

# Attention functions with a block mask or a paged cache, which can neither be recorded nor cut.
_UNSUPPORTED_ATTENTION = ("flex_attention", "paged")


def check_supported(config: PreTrainedConfig) -> Architecture:
    """The table's entry for a model; raises `ValueError` if its architecture is not supported."""
    if config.model_type in UNSUPPORTED:
        raise ValueError(
            f"Models of type {config.model_type!r} are not supported, because {UNSUPPORTED[config.model_type]}: use "
            "one of the types in `transformers_sgl.architectures.ARCHITECTURES`."
        )
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"Models of type {config.model_type!r} are not supported, because guidance and pruning have not been "
            "verified on them: use one of the types in `transformers_sgl.architectures.ARCHITECTURES`."
        )
    fault = stock_fault(config.model_type)
    if fault is not None:
        raise ValueError(f"Models of type {config.model_type!r} are supported, but {fault}: install another version.")
    types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    unknown = sorted(types - _LAYER_TYPES)
    if unknown:
        raise ValueError(
            f"The text decoder of this {config.model_type!r} model has layers of the types {unknown}, whose choice of "
            f"tokens guidance and pruning cannot follow: use a model with layers of {', '.join(sorted(_LAYER_TYPES))}."
        )
    return ARCHITECTURES[config.model_type]


def check_prunable(config: PreTrainedConfig, prune_layer: int) -> None:
    """Raises `ValueError` if layers from `prune_layer` on read keys and values of a layer below."""
    check_supported(config)
    lowest = min(key_sources(config).values(), default=prune_layer)
    if lowest < prune_layer:
        raise ValueError(
            f"Some upper layers of this {config.model_type!r} model read the keys and values of layer {lowest}, which "
            f"would see more tokens than they: set `prune_layer` to {lowest} or less."
        )


def key_sources(config: PreTrainedConfig) -> dict[int, int]:
    """The layers without keys and values of their own, each with the lower layer whose keys it reads; mostly empty."""
    text: Any = config.get_text_config(decoder=True)
    num_shared = getattr(text, "num_kv_shared_layers", None) or 0
    first = text.num_hidden_layers - num_shared
    own = text.layer_types[:first] if num_shared else []
    return {
        index: max(lower for lower, kind in enumerate(own) if kind == text.layer_types[index])
        for index in range(first, text.num_hidden_layers)
    }


def visual_token_ids(config: PreTrainedConfig, modality: str = "") -> tuple[int, ...]:
    """The token ids that stand for visual tokens in a model's prompts; only those of a `modality` if given.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        modality (`str`, *optional*): `"image"` or `"video"`.
    """
    names = check_supported(config).visual_token_attributes
    ids = (getattr(config, name, None) for name in names if modality in name)
    return tuple(dict.fromkeys(each for each in ids if each is not None))


def visual_tokens_of(config: PreTrainedConfig, inputs: dict[str, Any], modality: str = "") -> VisualTokens:
    """The visual tokens of a model's prompts.

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        inputs (`dict`): Its inputs: `input_ids` of shape `(batch, prompt_length)`, perhaps `attention_mask`.
        modality (`str`, *optional*): Only those of an `"image"`, or of a `"video"`.
    """
    ids, gap = visual_token_ids(config, modality), check_supported(config).image_gap
    return VisualTokens.from_input_ids(inputs["input_ids"], ids, inputs.get("attention_mask"), gap)


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder of a vision-language model, without the language modeling head."""
    attribute = check_supported(model.config).decoder_attribute
    return model.get_decoder() if attribute is None else getattr(model.get_decoder(), attribute)


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention function of a model's decoder; raises `ValueError` for an unsupported one."""
    name = attention_name(decoder(model).config)
    if any(unsupported in name for unsupported in _UNSUPPORTED_ATTENTION):
        raise ValueError(
            f"Guidance and pruning do not work with attn_implementation={name!r}, whose masks and caches they cannot "
            "read: load the model with 'sdpa', 'flash_attention_2' or 'eager'."
        )
    return name


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a vision-language model, first to last."""
    return decoder(model).layers


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention modules of the decoder layers that have one, by the index of the layer."""
    attributes = check_supported(model.config).attention_attributes
    found: dict[int, nn.Module] = {}
    for index, layer in enumerate(decoder_layers(model)):
        for name in attributes:
            module = getattr(layer, name, None)
            if isinstance(module, nn.Module) and is_attention(module):
                found[index] = module
    return found


def attention_pattern(model: PreTrainedModel, index: int) -> AttentionPattern:
    """The earlier tokens to which a token may attend in a decoder layer: a sliding window, a chunk, or all."""
    config: Any = decoder(model).config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    if types is None:
        return AttentionPattern(window=getattr(config, "sliding_window", None))
    if types[index] == "sliding_attention":
        return AttentionPattern(window=config.sliding_window)
    if types[index] == "chunked_attention":
        return AttentionPattern(chunk=config.attention_chunk_size)
    return AttentionPattern()
