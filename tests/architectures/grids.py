"""Tiny models of architectures that read images in their own resolution, as grids of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from . import (
    BREAK,
    END,
    EOS,
    IMAGE,
    NUM_TEXT_IDS,
    PAD,
    START,
    TINY,
    VIDEO,
    VOCAB_SIZE,
    Generator,
    Inputs,
    TinyArchitecture,
)

THUMBNAIL = 55
VIDEO_START, VIDEO_END = 54, 53
PATCH = 2  # pixels
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}


def _add(model_type: str, tiny: TinyArchitecture, variant: str = "") -> None:
    """Adds an architecture that this transformers knows; a variant of one has a name of its own."""
    if model_type in CONFIG_MAPPING:
        TINY[f"{model_type}-{variant}" if variant else model_type] = tiny


def _text_config(num_layers: int, **more: Any) -> dict[str, Any]:
    """What all text decoders have in common."""
    return {
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **more,
    }


def _blocks(**more: Any) -> dict[str, Any]:
    """A vision encoder in the manner of Qwen-VL: two blocks, and 2 x 2 patches make a visual token."""
    return {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "initializer_range": 0.3,
        **more,
    }


def _layers(**more: Any) -> dict[str, Any]:
    """A vision encoder whose configuration speaks of layers."""
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_channels": 3,
        "patch_size": PATCH,
        "initializer_range": 0.3,
        **more,
    }


def _config(
    model_type: str, vision: dict[str, Any], text: dict[str, Any] | None = None, **more: Any
) -> Callable[[int], PreTrainedConfig]:
    """From a number of decoder layers to a configuration."""

    def make(num_layers: int) -> PreTrainedConfig:
        # Configurations write into the dictionaries that they are given, so every one gets its own.
        changes = {name: value(num_layers) if callable(value) else value for name, value in (text or {}).items()}
        return AutoConfig.for_model(
            model_type, vision_config={**vision}, text_config=_text_config(num_layers, **changes), **more
        )

    return make


def _repeated(*kinds: str) -> Callable[[int], list[str]]:
    """Layer types that alternate, from the number of layers."""
    return lambda num_layers: [kinds[index % len(kinds)] for index in range(num_layers)]


def _side(generator: Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _sides(generator: Generator) -> tuple[int, int]:
    """Rows and columns of an image's visual tokens."""
    return _side(generator, 2, 3), _side(generator, 2, 4)


def _texts(generator: Generator, length: int = 1) -> list[int]:
    return torch.randint(0, NUM_TEXT_IDS, (length,), generator=generator).tolist()


def _grid_inputs(
    grids: list[list[int]], shape: tuple[int, ...], generator: Generator, pixels: str, grid: str
) -> Inputs:
    """One row of numbers for each patch, and the grid (time, height, width in patches) of each image."""
    grid_thw = torch.tensor(grids)
    return {pixels: torch.randn(int(grid_thw.prod(dim=1).sum()), *shape, generator=generator), grid: grid_thw}


def _patches(
    start: int | None = START, end: int | None = END, merge: int = 2, shape: tuple[int, ...] = (6 * PATCH**2,)
) -> Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]:
    """Images as rows of patches.

    Args:
        start: The token before an image, if any.
        end: The token behind it, if any.
        merge: So many patches by so many make a visual token.
        shape: The shape of a patch.
    """

    def make(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
        spans, grids = [], []
        for _ in range(number):
            height, width = _sides(generator)
            spans.append([start] * (start is not None) + [IMAGE] * height * width + [end] * (end is not None))
            grids.append([1, merge * height, merge * width])
        return spans, _grid_inputs(grids, shape, generator, "pixel_values", "image_grid_thw")

    return make


def _videos(
    span: Callable[[int, int, Generator], list[int]], steps: tuple[int, ...] = (1, 2, 3), **patches: Any
) -> Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]:
    """Videos as rows of patches.

    Args:
        span: The prompt tokens of a video, from its time steps and the number of visual tokens of each.
        steps: How many time steps a video may have.
        merge: So many patches by so many make a visual token.
        shape: The shape of a patch.
    """
    merge, shape = patches.get("merge", 2), patches.get("shape", (6 * PATCH**2,))

    def make(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
        spans, grids = [], []
        for _ in range(number):
            time, (height, width) = steps[_side(generator, 0, len(steps) - 1)], _sides(generator)
            spans.append(span(time, height * width, generator))
            grids.append([time, merge * height, merge * width])
        return spans, _grid_inputs(grids, shape, generator, "pixel_values_videos", "video_grid_thw")

    return make


def _one_span(steps: int, tokens: int, generator: Generator) -> list[int]:
    """All time steps without a gap."""
    return [START] + [VIDEO] * steps * tokens + [END]


def _timed_spans(steps: int, tokens: int, generator: Generator) -> list[int]:
    """Every time step with its time before it."""
    return [token for _ in range(steps) for token in [*_texts(generator, 2), START, *[VIDEO] * tokens, END]]


# Qwen-VL: rotary positions in three dimensions, patches in blocks of what becomes one token.
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}

_add(
    "qwen2_vl",
    TinyArchitecture(
        config=_config(
            "qwen2_vl", _blocks(embed_dim=16, hidden_size=32, mlp_ratio=2), {"rope_parameters": MROPE}, **_IDS
        ),
        images=_patches(),
        videos=_videos(_one_span),
        token_types="mm_token_type_ids",
    ),
)

# Interleaved rotary sections, and two decoder layers to which features of earlier vision blocks are added.
_add(
    "qwen3_vl",
    TinyArchitecture(
        config=_config(
            "qwen3_vl",
            _blocks(depth=3, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
            {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 8},
            **_IDS,
        ),
        images=_patches(),
        videos=_videos(_timed_spans),
        token_types="mm_token_type_ids",
    ),
)

# Linear attention in all layers but every second.
_LINEAR = {
    "layer_types": _repeated("linear_attention", "full_attention"),
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 3,
    "head_dim": 16,
    "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}
_add(
    "qwen3_5",
    TinyArchitecture(
        config=_config("qwen3_5", _blocks(out_hidden_size=32, num_position_embeddings=16), _LINEAR, **_IDS),
        images=_patches(),
        videos=_videos(_timed_spans),
        token_types="mm_token_type_ids",
    ),
)


_QWEN3_VISION = {"out_hidden_size": 32, "num_position_embeddings": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN = {"images": _patches(), "token_types": "mm_token_type_ids"}


def _qwen2_5_videos(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    """Positions in time depend on how many seconds a time step takes."""
    name = "second_per_grid_ts" if "omni" not in config.model_type else "video_second_per_grid"
    spans, inputs = _videos(_one_span)(config, number, generator)
    return spans, {**inputs, name: 0.5 + torch.rand(number, generator=generator)}


# A vision encoder with attention in windows, whose output is put back in order.
_WINDOWS = _blocks(out_hidden_size=32, window_size=8, fullatt_block_indexes=[1])
_add(
    "qwen2_5_vl",
    TinyArchitecture(
        config=_config("qwen2_5_vl", _WINDOWS, {"rope_parameters": MROPE}, **_IDS), videos=_qwen2_5_videos, **_QWEN
    ),
)
_add(
    "qwen3_vl_moe",
    TinyArchitecture(
        config=_config(
            "qwen3_vl_moe",
            _blocks(depth=3, deepstack_visual_indexes=[0, 1], **_QWEN3_VISION),
            {
                "rope_parameters": {**MROPE, "mrope_interleaved": True},
                "head_dim": 8,
                "mlp_only_layers": [0],
                **_EXPERTS,
            },
            **_IDS,
        ),
        videos=_videos(_timed_spans),
        **_QWEN,
    ),
)
_add(
    "qwen3_5_moe",
    TinyArchitecture(
        config=_config(
            "qwen3_5_moe",
            _blocks(**_QWEN3_VISION),
            {**_LINEAR, "shared_expert_intermediate_size": 16, **_EXPERTS},
            **_IDS,
        ),
        videos=_videos(_timed_spans),
        **_QWEN,
    ),
)

# Several residual streams, attention to selected blocks of keys, and embeddings of n-grams in one layer.
_add(
    "qwen4_exp",
    TinyArchitecture(
        config=_config(
            "qwen4_exp",
            _blocks(**_QWEN3_VISION),
            {
                **_LINEAR,
                "layer_types": _repeated("linear_attention", "full_attention"),
                "shared_expert_intermediate_size": 16,
                **_EXPERTS,
                "hc_count": 2,
                "hc_lowrank": 8,
                "ple_layer_ids": [1],
                "heads_per_ngram": 2,
                "ngram_vocab_size_base": 50,
                "make_ngram_vocab_size_divisible_by": 8,
                "split_ngram_parts": 1,
                "indexer_n_heads": 8,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 8,
                "indexer_budget": 8,
                "indexer_compress_ratio": 2,
            },
            **_IDS,
        ),
        videos=_videos(_timed_spans),
        **_QWEN,
    ),
)

# The language models of the Omni family, which can hear as well; here they only see.
_AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8}
_OMNI_IDS = {"vision_start_token_id": START, "audio_start_token_id": 52, "initializer_range": 0.3}
_add(
    "qwen2_5_omni_thinker",
    TinyArchitecture(
        config=_config(
            "qwen2_5_omni_thinker",
            _WINDOWS,
            {"rope_parameters": MROPE},
            audio_config={**_AUDIO, "output_dim": 32},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=51,
            audio_end_token_id=50,
            position_id_per_seconds=4,
            **_OMNI_IDS,
        ),
        images=_patches(),
        videos=_qwen2_5_videos,
    ),
)
_add(
    "qwen3_omni_moe_thinker",
    TinyArchitecture(
        config=_config(
            "qwen3_omni_moe_thinker",
            _blocks(depth=3, deepstack_visual_indexes=[0, 1], **_QWEN3_VISION),
            {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 8, **_EXPERTS},
            audio_config={**_AUDIO, "output_dim": 32, "downsample_hidden_size": 8},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=51,
            position_id_per_seconds=4,
            **_OMNI_IDS,
        ),
        images=_patches(),
        videos=_qwen2_5_videos,
    ),
)


# GLM-4V writes the images' placeholder for the frames of a video as well; what surrounds them tells which it is.
def _glm4v_types(input_ids: Tensor) -> Inputs:
    inside = (input_ids == VIDEO_START).cumsum(dim=1) > (input_ids == VIDEO_END).cumsum(dim=1)
    return {"mm_token_type_ids": (input_ids == IMAGE) * torch.where(inside, 2, 1)}


def _glm4v_frames(steps: int, tokens: int, generator: Generator) -> list[int]:
    frames = [token for _ in range(steps) for token in [START, *[IMAGE] * tokens, END, *_texts(generator)]]
    return [VIDEO_START, *frames, VIDEO_END]


_GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
_add(
    "glm4v",
    TinyArchitecture(
        config=_config(
            "glm4v",
            _blocks(out_hidden_size=32, image_size=8),
            {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}, "head_dim": 16},
            **_GLM_IDS,
        ),
        images=_patches(),
        videos=_videos(_glm4v_frames),
        token_types=_glm4v_types,
    ),
)


_GLM = {"images": _patches(), "videos": _videos(_glm4v_frames), "token_types": _glm4v_types}
_GLM_ROPE = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
for _name in ("glm46v", "glmga"):
    _add(
        _name,
        TinyArchitecture(
            config=_config(
                _name,
                _blocks(model_type="glm4v_vision", out_hidden_size=32, image_size=8),
                {"model_type": "glm4v_text", "rope_parameters": _GLM_ROPE, "head_dim": 16},
                **_GLM_IDS,
            ),
            **_GLM,
        ),
    )
_add(
    "glm_ocr",
    TinyArchitecture(
        config=_config(
            "glm_ocr", _blocks(out_hidden_size=32), {"rope_parameters": _GLM_ROPE, "head_dim": 16}, **_GLM_IDS
        ),
        **_GLM,
    ),
)
_GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_add(
    "glm4v_moe",
    TinyArchitecture(
        config=_config(
            "glm4v_moe",
            _blocks(out_hidden_size=32, image_size=8),
            {"rope_parameters": _GLM_ROPE, "head_dim": 16, **_GLM_EXPERTS},
            **_GLM_IDS,
        ),
        **_GLM,
    ),
)

# No positions at all: linear attention, and latent attention to selected keys, of which every second layer takes over
# the choice of the layer before it.
_add(
    "glm5_next",
    TinyArchitecture(
        config=_config(
            "glm5_next",
            _blocks(out_hidden_size=32, projection_intermediate_size=32, image_size=8),
            {
                "num_key_value_heads": 4,
                "layer_types": _repeated("linear_attention", "full_attention", "full_attention"),
                "indexer_types": _repeated("full", "full", "shared"),
                "mlp_layer_types": _repeated("dense", "sparse"),
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "v_head_dim": 8,
                "qk_nope_head_dim": 8,
                "index_topk": 8,
                "index_head_dim": 8,
                "index_n_heads": 8,
                "index_kpool": 2,
                "linear_head_dim": 8,
                "linear_num_heads": 2,
                "hc_mult": 2,
                **_GLM_EXPERTS,
            },
            **_GLM_IDS,
        ),
        images=_patches(),
        videos=_videos(_glm4v_frames),
    ),
)


# Pixtral's encoder: images of any size on one canvas, and a token behind each row.
def _pixel_rows(
    merge: int = 2, separator: int | None = BREAK, end: int | None = END, per_image: str = "image_sizes"
) -> Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]:
    def make(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
        spans, sizes, side = [], [], PATCH * merge
        for _ in range(number):
            height, width = _sides(generator)
            rows = ([IMAGE] * width + [separator] * (separator is not None)) * height
            spans.append(rows[: -1 if separator is not None else None] + [end] * (end is not None))
            sizes.append([side * height, side * width])
        pixels = torch.zeros(number, 3, 3 * side, 4 * side)
        for row, (height, width) in zip(pixels, sizes, strict=True):
            row[:, :height, :width] = torch.randn(3, height, width, generator=generator)
        return spans, {"pixel_values": pixels, per_image: torch.tensor(sizes)}

    return make


_PIXTRAL = _layers(model_type="pixtral", image_size=16, rope_parameters={"rope_type": "axial", "rope_theta": 100.0})
_add(
    "mistral3",
    TinyArchitecture(
        config=_config(
            "mistral3",
            _PIXTRAL,
            {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        images=_pixel_rows(),
    ),
)

# Keys and values from a smaller latent vector, and queries that grow with their position.
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_add(
    "mistral3",
    TinyArchitecture(
        config=_config(
            "mistral3",
            _PIXTRAL,
            {
                "model_type": "mistral4",
                **_LATENT,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "max_position_embeddings": 512,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "mscale_all_dim": 1.0,
                    "mscale": 1.0,
                    "llama_4_scaling_beta": 0.1,
                },
            },
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        images=_pixel_rows(),
    ),
    variant="mistral4",
)
# The same with attention to selected keys; the last two layers take over the keys of the first two, one of which has
# no positions, and the last one their choice as well.
_add(
    "mistral_large4",
    TinyArchitecture(
        config=_config(
            "mistral_large4",
            _PIXTRAL,
            {
                **_LATENT,
                "index_topk": 8,
                "index_head_dim": 16,
                "index_n_heads": 8,
                "no_rope_layers": _repeated(1, 0),
                "kv_source_layers": lambda num_layers: [min(index, index % 2) for index in range(num_layers)],
                "indexer_types": lambda num_layers: ["full"] * (num_layers - 1) + ["shared"],
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "attention_factor": 1.0,
                },
            },
            image_token_index=IMAGE,
            spatial_merge_size=2,
            initializer_range=0.3,
        ),
        images=_pixel_rows(),
    ),
)
_add(
    "lighton_ocr",
    TinyArchitecture(
        config=_config(
            "lighton_ocr", _PIXTRAL, {"model_type": "qwen3", "head_dim": 8}, image_token_id=IMAGE, spatial_merge_size=2
        ),
        images=_pixel_rows(separator=None, end=None),
    ),
)

# PaddleOCR-VL: patches in reading order, merged by the projector.
_add(
    "paddleocr_vl",
    TinyArchitecture(
        config=_config(
            "paddleocr_vl",
            _layers(image_size=8, spatial_merge_size=2),
            {"rope_parameters": MROPE, "head_dim": 8},
            **_IDS,
        ),
        images=_patches(shape=(3, PATCH, PATCH)),
        token_types="mm_token_type_ids",
    ),
)


# VideoLLaMA 3: images keep every patch, videos merge 2 x 2 of them and drop tokens that hardly change.
def _video_llama_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    spans, inputs = _patches(merge=1, shape=(3 * PATCH**2,))(config, number, generator)
    return spans, {**inputs, "image_merge_sizes": torch.ones(number).long()}


def _video_llama_videos(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    _, inputs = _videos(_one_span, shape=(3 * PATCH**2,))(config, number, generator)
    spans, kept = [], []
    for steps, height, width in inputs["video_grid_thw"].tolist():
        mask = torch.rand(steps, height * width // 4, generator=generator) < 0.7
        mask[0] = True
        frames = [[*_texts(generator, 2), *[VIDEO] * int(frame.sum())] for frame in mask]
        spans.append([START, *(token for frame in frames for token in frame), END])
        kept.append(mask.flatten())
    merge = torch.full((number,), 2)
    return spans, {**inputs, "video_merge_sizes": merge, "video_compression_mask": torch.cat(kept)}


_add(
    "video_llama_3",
    TinyArchitecture(
        config=_config(
            "video_llama_3",
            _layers(),
            {"model_type": "qwen2"},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        images=_video_llama_images,
        videos=_video_llama_videos,
    ),
)


# LFM2-VL: an image is one grid, or tiles with a token before each, and a smaller view of the whole.
def _lfm2_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    spans, shapes = [], []
    for _ in range(number):
        tiles = _side(generator, 1, 2)
        whole = _sides(generator)
        span, views = [START], [whole]
        if tiles > 1:
            views = [(2, 2)] * tiles + [whole]
        for index, (height, width) in enumerate(views):
            if tiles > 1:
                span.append(BREAK if index < tiles else THUMBNAIL)
            span += [IMAGE] * height * width
            shapes.append([2 * height, 2 * width])
        spans.append([*span, END])
    spatial = torch.tensor(shapes)
    pixels = torch.randn(len(shapes), 48, 3 * PATCH**2, generator=generator)
    mask = (torch.arange(48) < spatial.prod(dim=1)[:, None]).long()
    return spans, {
        "pixel_values": pixels * mask[..., None],
        "spatial_shapes": spatial,
        "pixel_attention_mask": mask,
    }


_add(
    "lfm2_vl",
    TinyArchitecture(
        config=_config(
            "lfm2_vl",
            _layers(model_type="siglip2_vision_model", num_patches=16, vision_use_head=False),
            {
                "model_type": "lfm2",
                "layer_types": _repeated("conv", "full_attention"),
                "block_auto_adjust_ff_dim": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            },
            image_token_id=IMAGE,
            projector_hidden_size=32,
        ),
        images=_lfm2_images,
    ),
)


_add(
    "lfm3_vl",
    TinyArchitecture(
        config=_config(
            "lfm3_vl",
            _blocks(
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                layer_types=["conv", "full_attention"],
            ),
            {
                "model_type": "lfm3",
                "layer_types": _repeated("conv", "sliding_attention", "conv", "full_attention"),
                "sliding_window": 8,
                "head_dim": 8,
                "conv_L_cache": 3,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                    "full_attention": {
                        "rope_type": "proportional",
                        "partial_rotary_factor": 0.5,
                        "rope_theta": 1000.0,
                    },
                },
            },
            projector_hidden_size=32,
            **_IDS,
        ),
        images=_patches(),
        videos=_videos(_timed_spans),
    ),
)


# ERNIE 4.5: text and visual tokens, with their marks, have experts of their own; video frames are merged in pairs.
def _ernie_types(input_ids: Tensor) -> Inputs:
    image, video = (input_ids == IMAGE).long(), 2 * (input_ids == VIDEO).long()
    image_marks = torch.isin(input_ids, torch.tensor([START, END])).long()
    video_marks = 2 * torch.isin(input_ids, torch.tensor([VIDEO_START, VIDEO_END])).long()
    types = image + video
    return {"mm_token_type_ids": types, "moe_mm_token_type_ids": types + image_marks + video_marks}


def _ernie_video(steps: int, tokens: int, generator: Generator) -> list[int]:
    return [VIDEO_START, *[VIDEO] * (steps // 2 * tokens), VIDEO_END]


_add(
    "ernie4_5_vl_moe",
    TinyArchitecture(
        config=_config(
            "ernie4_5_vl_moe",
            {name: value for name, value in _blocks().items() if name != "temporal_patch_size"},
            {
                "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
                "moe_intermediate_size": [16, 8],
                "moe_k": 2,
                "moe_num_experts": 4,
                "moe_num_shared_experts": 1,
            },
            **_GLM_IDS,
        ),
        images=_patches(shape=(3 * PATCH**2,)),
        videos=_videos(_ernie_video, steps=(2, 4), shape=(3 * PATCH**2,)),
        token_types=_ernie_types,
    ),
)


# Gemma 4: patches with their positions, filled up to a fixed number.
def _gemma4_views(
    grids: list[tuple[int, int]], merge: int, generator: Generator, names: tuple[str, str], patch: int = PATCH
) -> Inputs:
    longest = 12 * merge**2
    pixels = torch.zeros(len(grids), longest, 3 * patch**2)
    positions = torch.full((len(grids), longest, 2), -1)
    for index, (height, width) in enumerate(grids):
        y, x = torch.meshgrid(torch.arange(merge * height), torch.arange(merge * width), indexing="ij")
        place = torch.stack([x.flatten(), y.flatten()], dim=1)
        pixels[index, : len(place)] = torch.rand(len(place), 3 * patch**2, generator=generator)
        positions[index, : len(place)] = place
    return dict(zip(names, (pixels, positions), strict=True))


def _gemma4_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    grids = [_sides(generator) for _ in range(number)]
    spans = [[START, *[IMAGE] * (height * width), END] for height, width in grids]
    return spans, _gemma4_views(grids, 2, generator, ("pixel_values", "image_position_ids"))


_SLIDING = {
    "layer_types": _repeated("sliding_attention", "full_attention"),
    "sliding_window": 8,
    "head_dim": 8,
    "global_head_dim": 16,
}
_GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000.0},
}
_GEMMA4_VISION = _layers(
    num_key_value_heads=2,
    head_dim=8,
    pooling_kernel_size=2,
    position_embedding_size=16,
    rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
)
_GEMMA4_IDS = {
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "boi_token_id": START,
    "eoi_token_id": END,
}

# The small ones: an input of its own for each layer, and the last layers read the keys of earlier ones.
_add(
    "gemma4",
    TinyArchitecture(
        config=_config(
            "gemma4",
            _GEMMA4_VISION,
            {
                **_SLIDING,
                "rope_parameters": _GEMMA4_ROPE,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCAB_SIZE,
                "num_kv_shared_layers": 2,
                "final_logit_softcapping": 30.0,
            },
            **_GEMMA4_IDS,
        ),
        images=_gemma4_images,
        token_types="mm_token_type_ids",
    ),
)
# The large ones: tokens of an image see each other in sliding layers, values are keys in the others, and experts.
_add(
    "gemma4",
    TinyArchitecture(
        config=_config(
            "gemma4",
            _GEMMA4_VISION,
            {
                **_SLIDING,
                "rope_parameters": _GEMMA4_ROPE,
                "hidden_size_per_layer_input": 0,
                "use_bidirectional_attention": "vision",
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 16,
            },
            **_GEMMA4_IDS,
        ),
        images=_gemma4_images,
        token_types="mm_token_type_ids",
    ),
    variant="moe",
)


# Without a vision encoder: larger patches are the visual tokens.
def _gemma4_unified_images(
    config: PreTrainedConfig, number: int, generator: Generator
) -> tuple[list[list[int]], Inputs]:
    grids = [_sides(generator) for _ in range(number)]
    spans = [[START, *[IMAGE] * (height * width), END] for height, width in grids]
    return spans, _gemma4_views(grids, 1, generator, ("pixel_values", "image_position_ids"), patch=2 * PATCH)


_add(
    "gemma4_unified",
    TinyArchitecture(
        config=_config(
            "gemma4_unified",
            {
                "patch_size": PATCH,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 16,
                "mm_posemb_size": 16,
                "output_proj_dims": 16,
                "initializer_range": 0.3,
            },
            {**_SLIDING, "rope_parameters": _GEMMA4_ROPE, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
            **_GEMMA4_IDS,
        ),
        images=_gemma4_unified_images,
        token_types="mm_token_type_ids",
    ),
)


# Exaone 4.5: positions only in sliding layers.
_add(
    "exaone4_5",
    TinyArchitecture(
        config=_config(
            "exaone4_5",
            {**_WINDOWS, "num_key_value_heads": 2},
            {
                "model_type": "exaone4",
                "layer_types": _repeated("sliding_attention", "full_attention"),
                "sliding_window": 8,
                "sliding_window_pattern": 2,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        images=_patches(),
        videos=_videos(_one_span),
    ),
)
_add(
    "hyperclovax_vision_v2",
    TinyArchitecture(
        config=_config(
            "hyperclovax_vision_v2",
            {**_WINDOWS, "model_type": "qwen2_5_vl_vision"},
            {"model_type": "hyperclovax", "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
        ),
        images=_patches(),
        videos=_videos(_one_span),
    ),
)
_add(
    "kimi_k25",
    TinyArchitecture(
        config=_config(
            "kimi_k25",
            {**_layers(), "pos_emb_height": 4, "pos_emb_width": 4, "merge_kernel_size": (2, 2)},
            {"model_type": "deepseek_v3", **_LATENT, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
            projection_hidden_size=16,
            tie_word_embeddings=False,
            **_IDS,
        ),
        images=_patches(shape=(3, PATCH, PATCH)),
    ),
)


# HunYuan-VL: the vision encoder writes a mark before and behind an image and at the end of every row, and these stand
# at placeholders too.
def _hunyuan_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    _, inputs = _patches(shape=(3 * PATCH**2,))(config, number, generator)
    sizes = (inputs["image_grid_thw"][:, 1:] // 2).tolist()
    return [[START, *[IMAGE] * (height * (width + 1) + 2), END] for height, width in sizes], inputs


_add(
    "hunyuan_vl",
    TinyArchitecture(
        batches_alike=False,
        config=_config(
            "hunyuan_vl",
            {
                **_layers(),
                "out_hidden_size": 32,
                "spatial_merge_size": 2,
                "img_max_token_num": 16,
                "max_image_size": 16,
                "min_image_size": 4,
                "max_vit_seq_len": 64,
            },
            {
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "alpha": 10.0,
                    "factor": 1.0,
                    "rope_theta": 100.0,
                    "mrope_section": [1, 1, 1, 1],
                },
            },
            image_token_id=IMAGE,
            im_start_id=START,
            im_end_id=END,
            im_newline_id=BREAK,
            tie_word_embeddings=False,
        ),
        images=_hunyuan_images,
        token_types="mm_token_type_ids",
    ),
)


# Cohere Compass: as Qwen3-VL, with sliding layers and full layers without positions.
_add(
    "cohere_compass",
    TinyArchitecture(
        config=_config(
            "cohere_compass",
            _blocks(depth=3, deepstack_visual_indexes=[0, 1], **_QWEN3_VISION),
            {
                "layer_types": _repeated("sliding_attention", "full_attention"),
                "sliding_window": 8,
                "rope_parameters": {
                    "sliding_attention": {**MROPE, "mrope_interleaved": True},
                    "full_attention": None,
                },
            },
            **_IDS,
        ),
        videos=_videos(_timed_spans),
        **_QWEN,
    ),
)
_add(
    "cosmos3_edge",
    TinyArchitecture(
        config=_config(
            "cosmos3_edge",
            {**_layers(), "num_patches": 16, "spatial_merge_size": 2},
            {"rope_parameters": MROPE, "head_dim": 8},
            projector_hidden_size=32,
            **_IDS,
        ),
        images=_patches(shape=(3 * PATCH**2,)),
        videos=_videos(_timed_spans, shape=(3 * PATCH**2,)),
        token_types="mm_token_type_ids",
    ),
)
_add(
    "cosmos3_omni",
    TinyArchitecture(
        config=_config(
            "cosmos3_omni",
            {
                **_blocks(depth=3, deepstack_visual_indexes=[0, 1], **_QWEN3_VISION),
                "model_type": "qwen3_vl_vision",
            },
            {"model_type": "qwen3_vl_text", "rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 8},
            **_IDS,
        ),
        videos=_videos(_timed_spans),
        **_QWEN,
    ),
)

# dots.note: latent attention, in sliding windows or to selected keys.
_SLIDING_LATENT = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_add(
    "dots3_note",
    TinyArchitecture(
        config=_config(
            "dots3_note",
            {
                **_layers(num_hidden_layers=2),
                "mlp_layer_types": ["dense", "sparse"],
                "num_local_experts": 4,
                "moe_intermediate_size": 16,
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
            },
            {
                **_LATENT,
                **_SLIDING_LATENT,
                "head_dim": 16,
                "layer_types": _repeated("sliding_attention", "indexed_attention"),
                "sliding_window": 8,
                "index_topk": 8,
                "index_head_dim": 16,
                "index_n_heads": 8,
                "shared_experts_intermediate_size": 16,
            },
            audio_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "feature_size": 8,
                "downsample_hidden_size": 8,
                "adapter_input_size": 16,
                "adapter_out_dim": 32,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=51,
        ),
        images=_patches(shape=(3 * PATCH**2,)),
        videos=_videos(_one_span, shape=(3 * PATCH**2,)),
    ),
)


# MiniCPM-V: an image and its slices, all patches one behind the other in a single picture.
def _minicpm_images(reduction: int) -> Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]:
    def make(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
        spans, views = [], []
        for _ in range(number):
            rows, columns = ((0, 0), (1, 2), (2, 1))[_side(generator, 0, 2)]
            whole, part = _sides(generator), (_side(generator, 1, 2), 2)
            span = [*_texts(generator), START, *[IMAGE] * (whole[0] * whole[1]), END]
            for row in range(rows):
                span += [BREAK] * (row > 0) + [VIDEO_START, *[IMAGE] * (part[0] * part[1]), VIDEO_END] * columns
            spans.append(span)
            views += [whole] + [part] * (rows * columns)
        sizes = reduction * torch.tensor(views)
        width = PATCH * int(sizes.prod(dim=1).sum())
        return spans, {
            "pixel_values": torch.randn(1, 3, PATCH, width, generator=generator),
            "target_sizes": sizes.int(),
        }

    return make


def _minicpm_joined(inputs: list[Inputs]) -> Inputs:
    return {
        "pixel_values": torch.cat([each["pixel_values"] for each in inputs], dim=-1),
        "target_sizes": torch.cat([each["target_sizes"] for each in inputs]),
    }


# Its mode "16x" merges 4 x 4 patches; in transformers 5.17 that works only for views of one size.
for _name, _reduction, _mode in (("minicpmv4_6", 2, "4x"), ("minicpmv4_7", 4, "16x"), ("minicpm_ocr", 2, "4x")):
    _add(
        _name,
        TinyArchitecture(
            config=_config(
                _name,
                {**_layers(num_hidden_layers=2), "image_size": 16},
                {**_LINEAR, "model_type": "qwen3_5_text"},
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                image_start_id=START,
                image_end_id=END,
                slice_start_id=VIDEO_START,
                slice_end_id=VIDEO_END,
                newline_id=BREAK,
                insert_layer_id=0,
                downsample_mode=_mode,
                tie_word_embeddings=False,
            ),
            images=_minicpm_images(_reduction),
            joined=_minicpm_joined,
            token_types="mm_token_type_ids" if _name == "minicpmv4_7" else None,
        ),
    )


# Inkling: no positions but learnt biases by distance, and short convolutions in every layer.
def _inkling_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    counts = [height * width for height, width in (_sides(generator) for _ in range(number))]
    spans = [[START, *[IMAGE] * count] for count in counts]
    return spans, {"pixel_values": torch.randn(sum(counts), 2, 4, 4, 3, generator=generator)}


def _inkling2_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    grids = [(1, *_sides(generator)) for _ in range(number)]
    counts = [height * width for _, height, width in grids]
    pixels = torch.rand(sum(counts), 2 * PATCH, 2 * PATCH, 3, generator=generator) * 2 - 1
    return [[START, *[IMAGE] * count] for count in counts], {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor(grids),
    }


_INKLING = {
    "layer_types": _repeated("hybrid_sliding", "hybrid"),
    "sliding_window_size": 8,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "conv_kernel_size": 3,
    "unpadded_vocab_size": VOCAB_SIZE,
    "log_scaling_n_floor": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "route_scale": 1.0,
}
_add(
    "inkling_mm_model",
    TinyArchitecture(
        config=_config(
            "inkling_mm_model",
            {"patch_size": 4, "temporal_patch_size": 2, "num_hidden_layers": 4, "initializer_range": 0.3},
            {
                **_INKLING,
                "log_scaling_n_floor": 512,
                "mlp_layer_types": _repeated("dense", "sparse"),
                "n_shared_experts": 1,
                "logits_mup_width_multiplier": 1.0,
            },
            audio_config={"n_mel_bins": 8, "mel_vocab_size": 8},
            image_token_id=IMAGE,
            audio_token_id=51,
            image_bos_token_id=START,
            audio_bos_token_id=52,
        ),
        images=_inkling_images,
    ),
)
_add(
    "inkling2",
    TinyArchitecture(
        config=_config(
            "inkling2",
            {
                **_layers(),
                "posemb_grid_size": 4,
                "projection_hidden_dim": 32,
                "text_hidden_size": 32,
                "layer_scale_init_value": 1.0,
            },
            {
                **_INKLING,
                "intermediate_size": 16,
                "n_layers_per_attn_res_block": 2,
                "final_logit_softcapping": 30.0,
            },
            image_token_id=IMAGE,
        ),
        images=_inkling2_images,
        attn_implementations=("eager",),
    ),
)
