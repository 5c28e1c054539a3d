"""Tiny models of other architectures that read images in their own resolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig

from . import BREAK, END, IMAGE, START, VIDEO, VOCAB_SIZE, Generator, Inputs, TinyArchitecture
from .building import (
    LATENT_ATTENTION,
    PATCH,
    QWEN_IDS,
    THUMBNAIL,
    VIDEO_END,
    VIDEO_START,
    WINDOWS,
    add,
    blocks_config,
    config_of,
    layers_config,
    one_span,
    patch_images,
    patch_videos,
    random_side,
    random_sides,
    random_texts,
    repeated,
    timed_spans,
)


# Pixtral's encoder: images of any size on one canvas, and a token behind each row.
def _pixel_rows(
    merge: int = 2, separator: int | None = BREAK, end: int | None = END, per_image: str = "image_sizes"
) -> Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]:
    def make(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
        spans, sizes, side = [], [], PATCH * merge
        for _ in range(number):
            height, width = random_sides(generator)
            rows = ([IMAGE] * width + [separator] * (separator is not None)) * height
            spans.append(rows[: -1 if separator is not None else None] + [end] * (end is not None))
            sizes.append([side * height, side * width])
        pixels = torch.zeros(number, 3, 3 * side, 4 * side)
        for row, (height, width) in zip(pixels, sizes, strict=True):
            row[:, :height, :width] = torch.randn(3, height, width, generator=generator)
        return spans, {"pixel_values": pixels, per_image: torch.tensor(sizes)}

    return make


_PIXTRAL = layers_config(
    model_type="pixtral", image_size=16, rope_parameters={"rope_type": "axial", "rope_theta": 100.0}
)
add(
    "mistral3",
    TinyArchitecture(
        config=config_of(
            "mistral3",
            _PIXTRAL,
            {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
            image_token_index=IMAGE,
            spatial_merge_size=2,
        ),
        images=_pixel_rows(),
    ),
)
# With a decoder of Mistral 4: latent attention, and queries that grow with their position.
add(
    "mistral3",
    TinyArchitecture(
        config=config_of(
            "mistral3",
            _PIXTRAL,
            {
                "model_type": "mistral4",
                **LATENT_ATTENTION,
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
add(
    "mistral_large4",
    TinyArchitecture(
        config=config_of(
            "mistral_large4",
            _PIXTRAL,
            {
                **LATENT_ATTENTION,
                "index_topk": 8,
                "index_head_dim": 16,
                "index_n_heads": 8,
                "no_rope_layers": repeated(1, 0),
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
add(
    "lighton_ocr",
    TinyArchitecture(
        config=config_of(
            "lighton_ocr", _PIXTRAL, {"model_type": "qwen3", "head_dim": 8}, image_token_id=IMAGE, spatial_merge_size=2
        ),
        images=_pixel_rows(separator=None, end=None),
    ),
)


# VideoLLaMA 3: images keep every patch, videos merge 2 x 2 of them and drop tokens that hardly change.
def _video_llama_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    spans, inputs = patch_images(merge=1, shape=(3 * PATCH**2,))(config, number, generator)
    return spans, {**inputs, "image_merge_sizes": torch.ones(number).long()}


def _video_llama_videos(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    _, inputs = patch_videos(one_span, shape=(3 * PATCH**2,))(config, number, generator)
    spans, kept = [], []
    for steps, height, width in inputs["video_grid_thw"].tolist():
        mask = torch.rand(steps, height * width // 4, generator=generator) < 0.7
        mask[0] = True
        frames = [[*random_texts(generator, 2), *[VIDEO] * int(frame.sum())] for frame in mask]
        spans.append([START, *(token for frame in frames for token in frame), END])
        kept.append(mask.flatten())
    merge = torch.full((number,), 2)
    return spans, {**inputs, "video_merge_sizes": merge, "video_compression_mask": torch.cat(kept)}


add(
    "video_llama_3",
    TinyArchitecture(
        config=config_of(
            "video_llama_3",
            layers_config(),
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
        tiles = random_side(generator, 1, 2)
        whole = random_sides(generator)
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


add(
    "lfm2_vl",
    TinyArchitecture(
        config=config_of(
            "lfm2_vl",
            layers_config(model_type="siglip2_vision_model", num_patches=16, vision_use_head=False),
            {
                "model_type": "lfm2",
                "layer_types": repeated("conv", "full_attention"),
                "block_auto_adjust_ff_dim": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            },
            image_token_id=IMAGE,
            projector_hidden_size=32,
        ),
        images=_lfm2_images,
    ),
)


add(
    "lfm3_vl",
    TinyArchitecture(
        config=config_of(
            "lfm3_vl",
            blocks_config(
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                layer_types=["conv", "full_attention"],
            ),
            {
                "model_type": "lfm3",
                "layer_types": repeated("conv", "sliding_attention", "conv", "full_attention"),
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
            **QWEN_IDS,
        ),
        images=patch_images(),
        videos=patch_videos(timed_spans),
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
    grids = [random_sides(generator) for _ in range(number)]
    spans = [[START, *[IMAGE] * (height * width), END] for height, width in grids]
    return spans, _gemma4_views(grids, 2, generator, ("pixel_values", "image_position_ids"))


_SLIDING = {
    "layer_types": repeated("sliding_attention", "full_attention"),
    "sliding_window": 8,
    "head_dim": 8,
    "global_head_dim": 16,
}
_GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000.0},
}
_GEMMA4_VISION = layers_config(
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
add(
    "gemma4",
    TinyArchitecture(
        config=config_of(
            "gemma4",
            _GEMMA4_VISION,
            {
                **_SLIDING,
                "rope_parameters": _GEMMA4_ROPE,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCAB_SIZE,
                "num_kv_shared_layers": lambda num_layers: min(2, num_layers - 2),
                "final_logit_softcapping": 30.0,
            },
            **_GEMMA4_IDS,
        ),
        images=_gemma4_images,
        token_types="mm_token_type_ids",
    ),
)
# The large ones: tokens of an image see each other in sliding layers, values are keys in the others, and experts.
add(
    "gemma4",
    TinyArchitecture(
        config=config_of(
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
    grids = [random_sides(generator) for _ in range(number)]
    spans = [[START, *[IMAGE] * (height * width), END] for height, width in grids]
    return spans, _gemma4_views(grids, 1, generator, ("pixel_values", "image_position_ids"), patch=2 * PATCH)


add(
    "gemma4_unified",
    TinyArchitecture(
        config=config_of(
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
add(
    "exaone4_5",
    TinyArchitecture(
        config=config_of(
            "exaone4_5",
            {**WINDOWS, "num_key_value_heads": 2},
            {
                "model_type": "exaone4",
                "layer_types": repeated("sliding_attention", "full_attention"),
                "sliding_window": 8,
                "sliding_window_pattern": 2,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        images=patch_images(),
        videos=patch_videos(one_span),
    ),
)
add(
    "hyperclovax_vision_v2",
    TinyArchitecture(
        config=config_of(
            "hyperclovax_vision_v2",
            {**WINDOWS, "model_type": "qwen2_5_vl_vision"},
            {"model_type": "hyperclovax", "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            tie_word_embeddings=False,
        ),
        images=patch_images(),
        videos=patch_videos(one_span),
    ),
)
add(
    "kimi_k25",
    TinyArchitecture(
        config=config_of(
            "kimi_k25",
            {**layers_config(), "pos_emb_height": 4, "pos_emb_width": 4, "merge_kernel_size": (2, 2)},
            {
                "model_type": "deepseek_v3",
                **LATENT_ATTENTION,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
            },
            projection_hidden_size=16,
            tie_word_embeddings=False,
            **QWEN_IDS,
        ),
        images=patch_images(shape=(3, PATCH, PATCH)),
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
add(
    "dots3_note",
    TinyArchitecture(
        config=config_of(
            "dots3_note",
            {
                **layers_config(num_hidden_layers=2),
                "mlp_layer_types": ["dense", "sparse"],
                "num_local_experts": 4,
                "moe_intermediate_size": 16,
                "adapter_in_dim": 16,
                "adapter_out_dim": 32,
            },
            {
                **LATENT_ATTENTION,
                **_SLIDING_LATENT,
                "head_dim": 16,
                "layer_types": repeated("sliding_attention", "indexed_attention"),
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
        images=patch_images(shape=(3 * PATCH**2,)),
        videos=patch_videos(one_span, shape=(3 * PATCH**2,)),
    ),
)


# Inkling: no positions but learnt biases by distance, and short convolutions in every layer.
def _inkling_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    counts = [height * width for height, width in (random_sides(generator) for _ in range(number))]
    spans = [[START, *[IMAGE] * count] for count in counts]
    return spans, {"pixel_values": torch.randn(sum(counts), 2, 4, 4, 3, generator=generator)}


def _inkling2_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    grids = [(1, *random_sides(generator)) for _ in range(number)]
    counts = [height * width for _, height, width in grids]
    pixels = torch.rand(sum(counts), 2 * PATCH, 2 * PATCH, 3, generator=generator) * 2 - 1
    return [[START, *[IMAGE] * count] for count in counts], {
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor(grids),
    }


_INKLING = {
    "layer_types": repeated("hybrid_sliding", "hybrid"),
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
add(
    "inkling_mm_model",
    TinyArchitecture(
        config=config_of(
            "inkling_mm_model",
            {"patch_size": 4, "temporal_patch_size": 2, "num_hidden_layers": 4, "initializer_range": 0.3},
            {
                **_INKLING,
                "log_scaling_n_floor": 512,
                "mlp_layer_types": repeated("dense", "sparse"),
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
add(
    "inkling2",
    TinyArchitecture(
        config=config_of(
            "inkling2",
            {
                **layers_config(),
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


# Muse: patches in reading order, windows in the vision encoder, positions only in sliding layers.
def _muse_video(steps: int, tokens: int, generator: Generator) -> list[int]:
    frames = [[*random_texts(generator), *[VIDEO] * tokens] for _ in range(steps)]
    separated = [token for frame in frames for token in [*frame, BREAK]][:-1]
    return [VIDEO_START, *separated, VIDEO_END]


_MUSE_VISION = {
    "patch_size": PATCH,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "layer_types": ["window_attention", "full_attention"],
    "initializer_range": 0.3,
}
_MUSE_TEXT = {
    "layer_types": repeated("sliding_attention", "full_attention"),
    "layer_rope_theta": repeated(100.0, 0),
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "sliding_window": 8,
    "head_dim": 8,
    "qk_scale_factor": 2.0,
}
_MUSE = {"images": patch_images(), "videos": patch_videos(_muse_video)}
_MUSE_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "out_hidden_size": 64,
    "projector_hidden_size": 32,
    "initializer_range": 0.3,
}
add(
    "muse_glimmer",
    TinyArchitecture(
        config=config_of("muse_glimmer", _MUSE_VISION, {**_MUSE_TEXT, "output_multiplier": 1.0}, **_MUSE_IDS), **_MUSE
    ),
)
add(
    "muse_spark",
    TinyArchitecture(
        config=config_of(
            "muse_spark",
            _MUSE_VISION,
            {
                **_MUSE_TEXT,
                "output_multiplier": 1.0,
                "moe_intermediate_size": 16,
                "moe_hidden_size": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "mlp_layer_types": repeated("dense", "sparse"),
            },
            audio_config={
                "patch_sizes": [2],
                "hidden_sizes": [8],
                "depths": [1],
                "num_hidden_layers": 1,
                "out_hidden_size": 32,
            },
            audio_token_id=51,
            **_MUSE_IDS,
        ),
        **_MUSE,
    ),
)

# MiniMax M3: full attention, or attention to blocks of keys, which are counted by their place in the cache.
for _variant, _kinds in (("", ("full_attention",)), ("sparse", ("full_attention", "minimax_m3_sparse"))):
    add(
        "minimax_m3_vl",
        TinyArchitecture(
            # The vision encoder of earlier versions lets the patches of all images of a batch see each other.
            batches_alike=Version(transformers.__version__) >= Version("5.23"),
            config=config_of(
                "minimax_m3_vl",
                {**layers_config(), "image_size": 16},
                {
                    "layer_types": repeated(*_kinds),
                    "mlp_layer_types": repeated("dense", "sparse"),
                    "head_dim": 16,
                    "rotary_dim": 8,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
                    "intermediate_size": 16,
                    "dense_intermediate_size": 32,
                    "shared_intermediate_size": 16,
                    "num_local_experts": 4,
                    "num_experts_per_tok": 2,
                    "index_n_heads": 2,
                    "index_head_dim": 16,
                    "index_block_size": 4,
                    "index_topk_blocks": 2,
                },
                image_token_index=IMAGE,
                video_token_index=VIDEO,
                projector_hidden_size=32,
            ),
            images=patch_images(),
            videos=patch_videos(timed_spans),
        ),
        variant=_variant,
    )
