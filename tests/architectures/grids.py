"""Tiny models in the manner of Qwen-VL: images as rows of patches, most often with positions in three dimensions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from . import BREAK, END, IMAGE, START, VIDEO, Generator, Inputs, TinyArchitecture
from .building import (
    LINEAR_ATTENTION,
    MROPE,
    PATCH,
    QWEN3_VISION,
    QWEN_IDS,
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

# Patches lie in blocks of what becomes one visual token.
add(
    "qwen2_vl",
    TinyArchitecture(
        config=config_of(
            "qwen2_vl",
            blocks_config(embed_dim=16, hidden_size=32, mlp_ratio=2),
            {"rope_parameters": MROPE},
            **QWEN_IDS,
        ),
        images=patch_images(),
        videos=patch_videos(one_span),
        token_types="mm_token_type_ids",
    ),
)

# Interleaved rotary sections, and two decoder layers to which features of earlier vision blocks are added.
add(
    "qwen3_vl",
    TinyArchitecture(
        config=config_of(
            "qwen3_vl",
            blocks_config(depth=3, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0, 1]),
            {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 8},
            **QWEN_IDS,
        ),
        images=patch_images(),
        videos=patch_videos(timed_spans),
        token_types="mm_token_type_ids",
    ),
)
add(
    "qwen3_5",
    TinyArchitecture(
        config=config_of(
            "qwen3_5", blocks_config(out_hidden_size=32, num_position_embeddings=16), LINEAR_ATTENTION, **QWEN_IDS
        ),
        images=patch_images(),
        videos=patch_videos(timed_spans),
        token_types="mm_token_type_ids",
    ),
)
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN = {"images": patch_images(), "token_types": "mm_token_type_ids"}


def _qwen2_5_videos(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    """Positions in time depend on how many seconds a time step takes."""
    name = "second_per_grid_ts" if "omni" not in config.model_type else "video_second_per_grid"
    spans, inputs = patch_videos(one_span)(config, number, generator)
    return spans, {**inputs, name: 0.5 + torch.rand(number, generator=generator)}


add(
    "qwen2_5_vl",
    TinyArchitecture(
        config=config_of("qwen2_5_vl", WINDOWS, {"rope_parameters": MROPE}, **QWEN_IDS),
        videos=_qwen2_5_videos,
        **_QWEN,
    ),
)
add(
    "qwen3_vl_moe",
    TinyArchitecture(
        config=config_of(
            "qwen3_vl_moe",
            blocks_config(depth=3, deepstack_visual_indexes=[0, 1], **QWEN3_VISION),
            {
                "rope_parameters": {**MROPE, "mrope_interleaved": True},
                "head_dim": 8,
                "mlp_only_layers": [0],
                **_EXPERTS,
            },
            **QWEN_IDS,
        ),
        videos=patch_videos(timed_spans),
        **_QWEN,
    ),
)
add(
    "qwen3_5_moe",
    TinyArchitecture(
        config=config_of(
            "qwen3_5_moe",
            blocks_config(**QWEN3_VISION),
            {**LINEAR_ATTENTION, "shared_expert_intermediate_size": 16, **_EXPERTS},
            **QWEN_IDS,
        ),
        videos=patch_videos(timed_spans),
        **_QWEN,
    ),
)

# Several residual streams, attention to selected blocks of keys, and embeddings of n-grams in one layer.
add(
    "qwen4_exp",
    TinyArchitecture(
        config=config_of(
            "qwen4_exp",
            blocks_config(**QWEN3_VISION),
            {
                **LINEAR_ATTENTION,
                "layer_types": repeated("linear_attention", "full_attention"),
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
            **QWEN_IDS,
        ),
        videos=patch_videos(timed_spans),
        **_QWEN,
    ),
)

# The language models of the Omni family, which can hear as well; here they only see.
_AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8}
_OMNI_IDS = {"vision_start_token_id": START, "audio_start_token_id": 52, "initializer_range": 0.3}
add(
    "qwen2_5_omni_thinker",
    TinyArchitecture(
        config=config_of(
            "qwen2_5_omni_thinker",
            WINDOWS,
            {"rope_parameters": MROPE},
            audio_config={**_AUDIO, "output_dim": 32},
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=51,
            audio_end_token_id=50,
            position_id_per_seconds=4,
            **_OMNI_IDS,
        ),
        images=patch_images(),
        videos=_qwen2_5_videos,
    ),
)
add(
    "qwen3_omni_moe_thinker",
    TinyArchitecture(
        config=config_of(
            "qwen3_omni_moe_thinker",
            blocks_config(depth=3, deepstack_visual_indexes=[0, 1], **QWEN3_VISION),
            {"rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 8, **_EXPERTS},
            audio_config={**_AUDIO, "output_dim": 32, "downsample_hidden_size": 8},
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=51,
            position_id_per_seconds=4,
            **_OMNI_IDS,
        ),
        images=patch_images(),
        videos=_qwen2_5_videos,
    ),
)


# GLM-4V writes the images' placeholder for the frames of a video as well; what surrounds them tells which it is.
def _glm4v_types(input_ids: Tensor) -> Inputs:
    inside = (input_ids == VIDEO_START).cumsum(dim=1) > (input_ids == VIDEO_END).cumsum(dim=1)
    return {"mm_token_type_ids": (input_ids == IMAGE) * torch.where(inside, 2, 1)}


def _glm4v_frames(steps: int, tokens: int, generator: Generator) -> list[int]:
    frames = [token for _ in range(steps) for token in [START, *[IMAGE] * tokens, END, *random_texts(generator)]]
    return [VIDEO_START, *frames, VIDEO_END]


_GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
add(
    "glm4v",
    TinyArchitecture(
        config=config_of(
            "glm4v",
            blocks_config(out_hidden_size=32, image_size=8),
            {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}, "head_dim": 16},
            **_GLM_IDS,
        ),
        images=patch_images(),
        videos=patch_videos(_glm4v_frames),
        token_types=_glm4v_types,
    ),
)


_GLM = {"images": patch_images(), "videos": patch_videos(_glm4v_frames), "token_types": _glm4v_types}
_GLM_ROPE = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
for _name in ("glm46v", "glmga"):
    add(
        _name,
        TinyArchitecture(
            config=config_of(
                _name,
                blocks_config(model_type="glm4v_vision", out_hidden_size=32, image_size=8),
                {"model_type": "glm4v_text", "rope_parameters": _GLM_ROPE, "head_dim": 16},
                **_GLM_IDS,
            ),
            **_GLM,
        ),
    )
add(
    "glm_ocr",
    TinyArchitecture(
        config=config_of(
            "glm_ocr", blocks_config(out_hidden_size=32), {"rope_parameters": _GLM_ROPE, "head_dim": 16}, **_GLM_IDS
        ),
        **_GLM,
    ),
)
_GLM_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
add(
    "glm4v_moe",
    TinyArchitecture(
        config=config_of(
            "glm4v_moe",
            blocks_config(out_hidden_size=32, image_size=8),
            {"rope_parameters": _GLM_ROPE, "head_dim": 16, **_GLM_EXPERTS},
            **_GLM_IDS,
        ),
        **_GLM,
    ),
)

# No positions at all: linear attention, and latent attention to selected keys, where every second such layer takes
# over the choice of the layer before it.
add(
    "glm5_next",
    TinyArchitecture(
        config=config_of(
            "glm5_next",
            blocks_config(out_hidden_size=32, projection_intermediate_size=32, image_size=8),
            {
                "num_key_value_heads": 4,
                "layer_types": repeated("linear_attention", "full_attention", "full_attention"),
                "indexer_types": repeated("full", "full", "shared"),
                "mlp_layer_types": repeated("dense", "sparse"),
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
        images=patch_images(),
        videos=patch_videos(_glm4v_frames),
    ),
)

# PaddleOCR-VL: patches in reading order, merged by the projector.
add(
    "paddleocr_vl",
    TinyArchitecture(
        config=config_of(
            "paddleocr_vl",
            layers_config(image_size=8, spatial_merge_size=2),
            {"rope_parameters": MROPE, "head_dim": 8},
            **QWEN_IDS,
        ),
        images=patch_images(shape=(3, PATCH, PATCH)),
        token_types="mm_token_type_ids",
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


add(
    "ernie4_5_vl_moe",
    TinyArchitecture(
        config=config_of(
            "ernie4_5_vl_moe",
            {name: value for name, value in blocks_config().items() if name != "temporal_patch_size"},
            {
                "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]},
                "moe_intermediate_size": [16, 8],
                "moe_k": 2,
                "moe_num_experts": 4,
                "moe_num_shared_experts": 1,
            },
            **_GLM_IDS,
        ),
        images=patch_images(shape=(3 * PATCH**2,)),
        videos=patch_videos(_ernie_video, steps=(2, 4), shape=(3 * PATCH**2,)),
        token_types=_ernie_types,
    ),
)


# HunYuan-VL: the vision encoder writes a mark before and behind an image and at the end of every row, and these stand
# at placeholders too.
def _hunyuan_images(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
    _, inputs = patch_images(shape=(3 * PATCH**2,))(config, number, generator)
    sizes = (inputs["image_grid_thw"][:, 1:] // 2).tolist()
    return [[START, *[IMAGE] * (height * (width + 1) + 2), END] for height, width in sizes], inputs


add(
    "hunyuan_vl",
    TinyArchitecture(
        batches_alike=False,
        config=config_of(
            "hunyuan_vl",
            {
                **layers_config(),
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
add(
    "cohere_compass",
    TinyArchitecture(
        config=config_of(
            "cohere_compass",
            blocks_config(depth=3, deepstack_visual_indexes=[0, 1], **QWEN3_VISION),
            {
                "layer_types": repeated("sliding_attention", "full_attention"),
                "sliding_window": 8,
                "rope_parameters": {
                    "sliding_attention": {**MROPE, "mrope_interleaved": True},
                    "full_attention": None,
                },
            },
            **QWEN_IDS,
        ),
        videos=patch_videos(timed_spans),
        **_QWEN,
    ),
)
add(
    "cosmos3_edge",
    TinyArchitecture(
        config=config_of(
            "cosmos3_edge",
            {**layers_config(), "num_patches": 16, "spatial_merge_size": 2},
            {"rope_parameters": MROPE, "head_dim": 8},
            projector_hidden_size=32,
            **QWEN_IDS,
        ),
        images=patch_images(shape=(3 * PATCH**2,)),
        videos=patch_videos(timed_spans, shape=(3 * PATCH**2,)),
        token_types="mm_token_type_ids",
    ),
)
add(
    "cosmos3_omni",
    TinyArchitecture(
        config=config_of(
            "cosmos3_omni",
            {
                **blocks_config(depth=3, deepstack_visual_indexes=[0, 1], **QWEN3_VISION),
                "model_type": "qwen3_vl_vision",
            },
            {"model_type": "qwen3_vl_text", "rope_parameters": {**MROPE, "mrope_interleaved": True}, "head_dim": 8},
            **QWEN_IDS,
        ),
        videos=patch_videos(timed_spans),
        **_QWEN,
    ),
)


# MiniCPM-V: an image and its slices, all patches one behind the other in a single picture.
def _minicpm_images(reduction: int) -> Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]:
    def make(config: PreTrainedConfig, number: int, generator: Generator) -> tuple[list[list[int]], Inputs]:
        spans, views = [], []
        for _ in range(number):
            rows, columns = ((0, 0), (1, 2), (2, 1))[random_side(generator, 0, 2)]
            whole, part = random_sides(generator), (random_side(generator, 1, 2), 2)
            span = [*random_texts(generator), START, *[IMAGE] * (whole[0] * whole[1]), END]
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
    add(
        _name,
        TinyArchitecture(
            config=config_of(
                _name,
                {**layers_config(num_hidden_layers=2), "image_size": 16},
                {**LINEAR_ATTENTION, "model_type": "qwen3_5_text"},
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
