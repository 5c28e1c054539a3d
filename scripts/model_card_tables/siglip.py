"""Models with a SigLIP tower: LLaVA-OneVision and Gemma 3."""

from __future__ import annotations

from model_card_tables.families import (
    GEMMA3,
    GEMMA_CONVERSION,
    HF,
    LLAVA_CONVERSION,
    LLAVA_ONEVISION,
    Model,
    text_config,
)

# SigLIP so400m without its last layer and its head. Source: LLAVA_CONVERSION.
SIGLIP_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}


def _llava_onevision(
    size: str, parameters: float, vocab_size: int, dimensions: tuple[int, ...], *sources: str, tied: bool = False
) -> Model:
    """A Qwen2; conversion adds two tokens to its vocabulary and fills it up to a multiple of 64."""
    return Model(
        name=f"llava-hf/llava-onevision-qwen2-{size.lower()}-ov-hf",
        title=f"LLaVA-OneVision-{size}",
        family=LLAVA_ONEVISION,
        published_parameters=parameters,
        config={
            "model_type": "llava_onevision",
            "vision_config": SIGLIP_384,
            "text_config": text_config(vocab_size, *dimensions, model_type="qwen2"),
            "image_token_index": 151646,
            "video_token_index": 151647,
            "tie_word_embeddings": tied,
        },
        licence="Apache 2.0",
        sources=(*sources, f"vision tower, vocabulary, visual tokens: {LLAVA_CONVERSION}"),
    )


LLAVA_ONEVISION_MODELS = {
    "llava-onevision-0.5b": _llava_onevision(
        "0.5B",
        0.895e9,
        152000,
        (896, 24, 14, 2, 4864),
        f"config.json of Qwen2-0.5B-Instruct ({HF}/harry85/Qwen2-0.5B-Instruct)",
        f"{HF}/llava-hf/llava-onevision-qwen2-0.5b-ov-hf/tree/bfae628: 1.79 GB in float16",
        tied=True,
    ),
    "llava-onevision-7b": _llava_onevision(
        "7B",
        8.03e9,
        152128,
        (3584, 28, 28, 4, 18944),
        f"config.json of Qwen2-7B-Instruct ({HF}/Anteia/Qwen2-7B-Instruct-v1)",
        f"{HF}/llava-hf/llava-onevision-qwen2-7b-ov-hf/tree/8521f25: 16.06 GB in float16",
    ),
    "llava-onevision-72b": _llava_onevision(
        "72B",
        73e9,
        152128,
        (8192, 80, 64, 8, 29568),
        f"{HF}/Qwen/Qwen2-72B-Instruct/blob/7c7b419/config.json",
        f"{HF}/collections/llava-hf/llava-onevision: 73B",
    ),
}

# Source: GEMMA_CONVERSION, like all dimensions below.
SIGLIP_896 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}


def _gemma3(size: str, parameters: float, dimensions: tuple[int, ...], head_dim: int, *sources: str) -> Model:
    """Every sixth layer sees everything, the others the last 1,024 tokens; 64 tokens are added for images."""
    return Model(
        name=f"google/gemma-3-{size.lower()}-it",
        title=f"Gemma 3 {size}",
        family=GEMMA3,
        published_parameters=parameters,
        config={
            "model_type": "gemma3",
            "vision_config": SIGLIP_896,
            "text_config": text_config(262208, *dimensions, head_dim=head_dim, sliding_window=1024),
            "image_token_index": 262144,
            "mm_tokens_per_image": 256,
            "tie_word_embeddings": True,
        },
        licence="Gemma Terms of Use (agree to them there before the first download)",
        sources=(
            f"dimensions: {GEMMA_CONVERSION}",
            "keras-team/keras-hub, keras_hub/src/models/gemma3/gemma3_presets.py: the exact number of parameters, "
            "without the tokens that are added for images",
            *sources,
        ),
    )


GEMMA3_MODELS = {
    "gemma3-4b": _gemma3(
        "4B",
        4_299_915_632,
        (2560, 34, 8, 4, 10240),
        256,
        f"{HF}/mlx-community/gemma-3-4b-it-bf16/blob/main/config.json: the same dimensions",
    ),
    "gemma3-12b": _gemma3(
        "12B",
        12_187_079_280,
        (3840, 48, 16, 8, 15360),
        256,
        f"{HF}/unsloth/gemma-3-12b-it-GGUF/blame/main/config.json: the same dimensions",
    ),
    "gemma3-27b": _gemma3(
        "27B",
        27_432_062_576,
        (5376, 62, 32, 16, 21504),
        128,
        f"{HF}/btly/hewo/blob/main/config.json, which is this model's: the same dimensions",
    ),
}
