"""InternVL 2.5 and 3."""

from __future__ import annotations

from typing import Any

from model_card_tables.families import HF, INTERNVL3, INTERNVL25, INTERNVL_CONVERSION, MINDSPEED, Model, text_config

REPORT_25 = "InternVL 2.5 report (arXiv 2412.05271), table 2: parameters, vision encoder, language model"

# InternViT-300M-448px-V2_5. Source: MINDSPEED, internvl3/model_8B.json: 24 layers, width 1024, 16 heads, biases on q,
# k and v, LayerNorm, no normalised queries and keys; the rest are the defaults of transformers' InternVLVisionConfig.
INTERNVIT_300M = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "attention_bias": True,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "image_size": [448, 448],
    "patch_size": [14, 14],
}
# InternViT-6B-448px-V2_5. Source: config.json of OpenGVLab/InternViT-6B-448px-V1-5, the same architecture: 45 layers,
# width 3200, 25 heads, no biases on q, k and v, normalised queries and keys. That it has RMSNorm follows from the
# number of parameters of the 26B model, which comes out exactly only so.
INTERNVIT_6B = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "image_size": [448, 448],
    "patch_size": [14, 14],
}


def _internvl(vision: dict[str, Any], text: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """A tile of 448 x 448 pixels becomes 32 x 32 patches and 256 visual tokens."""
    return {
        "model_type": "internvl",
        "vision_config": vision,
        "text_config": text,
        "image_token_id": image_token_id,
        "image_seq_length": 256,
        "downsample_ratio": 0.5,
        # Every file size below is that of a model whose output layer is not its embeddings.
        "tie_word_embeddings": False,
    }


def _internvl3(
    size: str, parameters: float, vision: dict[str, Any], dimensions: tuple[int, ...], *sources: str
) -> Model:
    """The vocabulary is Qwen2.5's and InternVL's own tokens."""
    text = text_config(151674, *dimensions, model_type="qwen2")
    return Model(
        name=f"OpenGVLab/InternVL3-{size}-hf",
        title=f"InternVL3-{size}",
        family=INTERNVL3,
        published_parameters=parameters,
        config=_internvl(vision, text, image_token_id=151667),
        licence="Qwen",
        sources=(*sources, f"image_token_id: {INTERNVL_CONVERSION}"),
    )


def _internlm2(*dimensions: int) -> dict[str, Any]:
    """A converted InternLM2, which is a Llama by another name."""
    return text_config(92553, *dimensions, model_type="llama")


INTERNVL_MODELS = {
    "internvl3-1b": _internvl3(
        "1B",
        0.94e9,
        INTERNVIT_300M,
        (896, 24, 14, 2, 4864),
        f"{HF}/hf-internal-testing/tiny-processor-internvl/blob/main/config.json, which is this model's",
        f"{HF}/OpenGVLab/InternVL3-1B/tree/main: 1.88 GB in bfloat16",
    ),
    "internvl3-8b": _internvl3(
        "8B",
        7.95e9,
        INTERNVIT_300M,
        (3584, 28, 28, 4, 18944),
        f"{MINDSPEED}/internvl3/model_8B.json",
        f"{HF}/OpenGVLab/InternVL3-8B-hf/tree/main: 15.9 GB in bfloat16",
    ),
    "internvl3-14b": _internvl3(
        "14B",
        15.15e9,
        INTERNVIT_300M,
        (5120, 48, 40, 8, 13824),
        f"config.json of Qwen2.5-14B-Instruct ({HF}/osllmai-community/Qwen2.5-14B-Instruct); vocabulary as in 8B",
        f"{HF}/OpenGVLab/InternVL3-14B-hf/tree/main: 30.3 GB in bfloat16",
    ),
    "internvl3-38b": _internvl3(
        "38B",
        38.4e9,
        INTERNVIT_6B,
        (5120, 64, 40, 8, 27648),
        f"{HF}/Qwen/Qwen2.5-32B/blob/main/config.json; vocabulary as in 8B",
        f"{REPORT_25} (InternVL2.5-38B, the same architecture)",
    ),
    "internvl3-78b": _internvl3(
        "78B",
        78.4e9,
        INTERNVIT_6B,
        (8192, 80, 64, 8, 29568),
        f"{MINDSPEED}/internvl3/model_78B.json",
        f"{HF}/OpenGVLab/InternVL3-78B-Instruct/blob/main/config.json",
        f"{REPORT_25} (InternVL2.5-78B, the same architecture)",
    ),
    "internvl2.5-2b": Model(
        name="OpenGVLab/InternVL2_5-2B-MPO-hf",
        title="InternVL2.5-2B",
        family=INTERNVL25,
        published_parameters=2.205e9,
        config=_internvl(INTERNVIT_300M, _internlm2(2048, 24, 16, 8, 8192), image_token_id=92546),
        licence="MIT",
        sources=(
            f"{HF}/OpenGVLab/InternVL2_5-2B-MPO-hf/tree/main: 4.41 GB in bfloat16",
            REPORT_25,
            f"{HF}/OpenGVLab/InternVL2-2B-AWQ, config.json: the language model's width and layers",
            f"image_token_id: {INTERNVL_CONVERSION}",
        ),
    ),
    "internvl2.5-26b": Model(
        name="../InternVL2_5-26B-MPO-hf",
        title="InternVL2.5-26B",
        family=INTERNVL25,
        published_parameters=25_514_186_112,
        config=_internvl(INTERNVIT_6B, _internlm2(6144, 48, 48, 8, 16384), image_token_id=92546),
        licence="MIT",
        sources=(
            f"{HF}/jliu7350/internvl2_5-26b-mpo-hf, a conversion by a third party: the exact number of parameters",
            f"{REPORT_25}: 25.5B",
            f"image_token_id: {INTERNVL_CONVERSION}",
        ),
        original="OpenGVLab/InternVL2_5-26B-MPO",
    ),
}
