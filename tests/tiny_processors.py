"""Every supported processor class, built without a hub: a small vocabulary and images of a few dozen pixels."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

NAMED_TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "img_line_break_token": "<line>",
    "image_break_token": "<break>",
    "image_end_token": "<end>",
    "image_start_token": "<start>",
    "video_start_token": "<video start>",
    "video_end_token": "<video end>",
    "audio_token": "<audio>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "vision_bos_token": "<vision>",
    "vision_eos_token": "</vision>",
    "audio_bos_token": "<sound>",
    "audio_eos_token": "</sound>",
}
OTHER_TOKENS = [
    "<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
    "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL", "<IMG_ATOM>", "<imgpad>", "[IMG]",
    "[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|vision_start|>",
    "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|begin_of_video|>", "<|end_of_video|>",
    "]<]image[>[", "]<]video[>[", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|imgpad|>",
    "<|audio_comp_pad|>",
]  # fmt: skip


def tiny_tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """One token for each special token, and one for everything else; some may be named otherwise."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "<sep>", *NAMED_TOKENS.values(), *OTHER_TOKENS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        sep_token="<sep>",
        extra_special_tokens={**NAMED_TOKENS, **names},
    )
    fast.add_tokens(OTHER_TOKENS, special_tokens=True)
    return fast


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


# Name: a function from changes of the image processor's settings to a processor.
PROCESSORS: dict[str, Callable[..., ProcessorMixin]] = {}


def _add(
    name: str,
    kind: str,
    image_processor: str,
    settings: dict[str, Any],
    video: str | None = None,
    audio: str | None = None,
    **own: Any,
) -> None:
    """Adds a processor, if this transformers has it: its class, its image processor's, and both their settings."""

    def build(**changes: Any) -> ProcessorMixin:
        parts = {"image_processor": getattr(transformers, image_processor)(**{**settings, **changes})}
        if video is not None:
            parts["video_processor"] = getattr(transformers, video)()
        if audio is not None:
            parts["feature_extractor"] = getattr(transformers, audio)()
        if kind == "SmolVLMProcessor":  # would like to write the number of a video's frames in words
            own_module = sys.modules[getattr(transformers, kind).__module__]
            own_module.num2words = own_module.num2words or str
        names = {"image_token": "<|IMAGE_PAD|>"} if kind == "CohereCompassProcessor" else {}
        return getattr(transformers, kind)(**parts, tokenizer=tiny_tokenizer(**names), **own)

    if hasattr(transformers, kind):
        PROCESSORS[name] = build


_TILES = {"size": square(32), "crop_to_patches": True, "max_patches": 6}
_PATCHES = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 64 * 64}}
_SPLIT = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
_ANYRES = {
    "size": {"shortest_edge": 32},
    "crop_size": square(32),
    "image_grid_pinpoints": [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
}
_CLIP = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}

_add(
    "aya_vision",
    "AyaVisionProcessor",
    "GotOcr2ImageProcessor",
    _TILES,
    patch_size=4,
    img_size=32,
    downsample_factor=2,
)
_add(
    "cohere2_vision",
    "Cohere2VisionProcessor",
    "Cohere2VisionImageProcessor",
    {"size": square(32), "patch_size": 4, "max_patches": 6},
)
_add("deepseek_vl", "DeepseekVLProcessor", "DeepseekVLImageProcessor", {"size": square(48)}, num_image_tokens=36)
_add(
    "deepseek_vl_hybrid",
    "DeepseekVLHybridProcessor",
    "DeepseekVLHybridImageProcessor",
    {"size": square(48), "high_res_size": square(96)},
    num_image_tokens=36,
)
_add("gemma3", "Gemma3Processor", "Gemma3ImageProcessor", {"size": square(48)}, image_seq_length=36)
_add(
    "glm4v",
    "Glm4vProcessor",
    "Glm4vImageProcessor",
    {**_PATCHES, "size": {"shortest_edge": 2 * 256, "longest_edge": 2 * 64 * 64}},
    video="Glm4vVideoProcessor",
)
_add("got_ocr2", "GotOcr2Processor", "GotOcr2ImageProcessor", {"size": square(64)})
_add("idefics3", "Idefics3Processor", "Idefics3ImageProcessor", _SPLIT, image_seq_len=16)
_add(
    "internvl",
    "InternVLProcessor",
    "GotOcr2ImageProcessor",
    _TILES,
    video="InternVLVideoProcessor",
    image_seq_length=16,
)
_add("janus", "JanusProcessor", "JanusImageProcessor", {"size": square(48)}, num_image_tokens=36)
_add(
    "lfm2_vl",
    "Lfm2VlProcessor",
    "Lfm2VlImageProcessor",
    {
        "encoder_patch_size": 4,
        "downsample_factor": 2,
        "tile_size": 32,
        "min_tiles": 2,
        "max_tiles": 6,
        "min_image_tokens": 4,
        "max_image_tokens": 16,
    },
)
_add(
    "lighton_ocr",
    "LightOnOcrProcessor",
    "PixtralImageProcessor",
    {"size": {"longest_edge": 64}, "patch_size": 8},
    patch_size=4,
    spatial_merge_size=2,
)
_add("llama4", "Llama4Processor", "Llama4ImageProcessor", {"size": square(32), "max_patches": 6}, patch_size=4)
_add(
    "llava",
    "LlavaProcessor",
    "CLIPImageProcessor",
    {"size": {"shortest_edge": 48}, "crop_size": square(48)},
    **_CLIP,
)
_add(
    "llava_class_token",
    "LlavaProcessor",
    "CLIPImageProcessor",
    {"size": {"shortest_edge": 48}, "crop_size": square(48)},
    **{**_CLIP, "vision_feature_select_strategy": "full"},
)
_add(
    "llava_padded",
    "LlavaProcessor",
    "LlavaImageProcessor",
    {"size": {"shortest_edge": 48}, "crop_size": square(48), "do_pad": True},
    **_CLIP,
)
_add(
    "fast_vlm",
    "LlavaProcessor",
    "CLIPImageProcessor",
    {"size": {"shortest_edge": 48}, "crop_size": square(48)},
    patch_size=8,
    vision_feature_select_strategy="full",
)
_add("llava_next", "LlavaNextProcessor", "LlavaNextImageProcessor", _ANYRES, **_CLIP)
_add(
    "llava_onevision",
    "LlavaOnevisionProcessor",
    "LlavaOnevisionImageProcessor",
    {"size": square(35), "image_grid_pinpoints": [[35 * i, 35 * j] for i in range(1, 4) for j in range(1, 4)]},
    video="LlavaOnevisionVideoProcessor",
    num_image_tokens=16,
    vision_feature_select_strategy="full",
)
_add(
    "llava_onevision_shrunk",
    "LlavaOnevisionProcessor",
    "LlavaOnevisionImageProcessor",
    {"size": square(35), "image_grid_pinpoints": [[35 * i, 35 * j] for i in range(1, 4) for j in range(1, 4)]},
    video="LlavaOnevisionVideoProcessor",
    num_image_tokens=16,
    vision_feature_select_strategy="full",
    vision_aspect_ratio="anyres_max_4",
)
_add(
    "mistral3",
    "PixtralProcessor",
    "PixtralImageProcessor",
    {"size": {"longest_edge": 64}, "patch_size": 4},
    patch_size=4,
    spatial_merge_size=2,
)
_add("ovis2", "Ovis2Processor", "Ovis2ImageProcessor", _TILES, image_seq_length=16)
_add(
    "paddleocr_vl",
    "PaddleOCRVLProcessor",
    "PaddleOCRVLImageProcessor",
    {"patch_size": 4, "merge_size": 2, "min_pixels": 256, "max_pixels": 64 * 64},
)
_add("paligemma", "PaliGemmaProcessor", "SiglipImageProcessor", {"size": square(48), "image_seq_length": 36})
_add(
    "perception_lm",
    "PerceptionLMProcessor",
    "PerceptionLMImageProcessor",
    {"tile_size": 32, "max_num_tiles": 6, "vision_input_type": "thumb+tile"},
    video="PerceptionLMVideoProcessor",
    patch_size=4,
    pooling_ratio=2,
)
_add("qwen2_5_vl", "Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", _PATCHES, video="Qwen2VLVideoProcessor")
_add("qwen2_vl", "Qwen2VLProcessor", "Qwen2VLImageProcessor", _PATCHES, video="Qwen2VLVideoProcessor")
_add("qwen3_vl", "Qwen3VLProcessor", "Qwen2VLImageProcessor", _PATCHES, video="Qwen3VLVideoProcessor")
_add("smolvlm", "SmolVLMProcessor", "SmolVLMImageProcessor", _SPLIT, video="SmolVLMVideoProcessor", image_seq_len=16)
_add(
    "video_llama_3",
    "VideoLlama3Processor",
    "VideoLlama3ImageProcessor",
    {**_PATCHES, "merge_size": 1, "patch_size": 8},
    video="VideoLlama3VideoProcessor",
)
_add(
    "cohere_compass", "CohereCompassProcessor", "CohereCompassImageProcessor", _PATCHES, "CohereCompassVideoProcessor"
)
_add("cosmos3_edge", "Cosmos3EdgeProcessor", "Cosmos3EdgeImageProcessor", _PATCHES, "Cosmos3EdgeVideoProcessor")
_add(
    "ernie4_5_vl_moe",
    "Ernie4_5_VLMoeProcessor",
    "Ernie4_5_VLMoeImageProcessor",
    _PATCHES,
    "Ernie4_5_VLMoeVideoProcessor",
)
_add("exaone4_5", "Exaone4_5_Processor", "Qwen2VLImageProcessor", _PATCHES, "Qwen2VLVideoProcessor")
_add(
    "glm46v",
    "Glm46VProcessor",
    "Glm46VImageProcessor",
    {**_PATCHES, "size": {"shortest_edge": 2 * 256, "longest_edge": 2 * 64 * 64}},
    "Glm46VVideoProcessor",
)
_add(
    "hyperclovax_vision_v2", "HyperCLOVAXVisionV2Processor", "Qwen2VLImageProcessor", _PATCHES, "Qwen2VLVideoProcessor"
)
_add("lfm3_vl", "Lfm3VlProcessor", "Qwen2VLImageProcessor", _PATCHES, "Qwen3VLVideoProcessor")
_add("minimax_m3_vl", "MiniMaxM3VLProcessor", "MiniMaxM3VLImageProcessor", _PATCHES, "MiniMaxM3VLVideoProcessor")
_add(
    "muse_glimmer",
    "MuseGlimmerProcessor",
    "MuseGlimmerImageProcessor",
    {"patch_size": 4, "merge_size": 2, "max_image_tokens": 64},
    "MuseGlimmerVideoProcessor",
)
_add(
    "qwen2_5_omni",
    "Qwen2_5OmniProcessor",
    "Qwen2VLImageProcessor",
    _PATCHES,
    "Qwen2VLVideoProcessor",
    "WhisperFeatureExtractor",
)
_add(
    "gemma3n",
    "Gemma3nProcessor",
    "SiglipImageProcessor",
    {"size": square(48)},
    audio="Gemma3nAudioFeatureExtractor",
    image_seq_length=36,
)
_add(
    "granite_docling",
    "GraniteDoclingProcessor",
    "GraniteDoclingImageProcessor",
    {"size": square(32), "max_patches": 6},
    image_seq_len=16,
)
_add(
    "llava_next_video",
    "LlavaNextVideoProcessor",
    "LlavaNextImageProcessor",
    _ANYRES,
    "LlavaNextVideoVideoProcessor",
    **_CLIP,
)
_add("qianfan_ocr", "QianfanOCRProcessor", "GotOcr2ImageProcessor", _TILES, image_seq_length=16)
_add(
    "video_llava",
    "VideoLlavaProcessor",
    "VideoLlavaImageProcessor",
    {"size": {"shortest_edge": 48}, "crop_size": square(48)},
    "VideoLlavaVideoProcessor",
    **_CLIP,
)
_add(
    "chameleon",
    "ChameleonProcessor",
    "ChameleonImageProcessor",
    {"size": {"shortest_edge": 48}, "crop_size": square(48)},
    image_seq_length=36,
)
_add(
    "dots3_note",
    "Dots3NoteProcessor",
    "Qwen2VLImageProcessor",
    _PATCHES,
    "Qwen2VLVideoProcessor",
    "Dots3NoteFeatureExtractor",
)
_add(
    "gemma4",
    "Gemma4Processor",
    "Gemma4ImageProcessor",
    {"patch_size": 4, "max_soft_tokens": 70},
    "Gemma4VideoProcessor",
    "Gemma4AudioFeatureExtractor",
)
_add(
    "muse_spark",
    "MuseSparkProcessor",
    "MuseGlimmerImageProcessor",
    {"patch_size": 4, "merge_size": 2, "max_image_tokens": 64},
    "MuseGlimmerVideoProcessor",
    "MuseSparkFeatureExtractor",
)
_add(
    "qwen3_omni_moe",
    "Qwen3OmniMoeProcessor",
    "Qwen2VLImageProcessor",
    _PATCHES,
    "Qwen2VLVideoProcessor",
    "WhisperFeatureExtractor",
)
