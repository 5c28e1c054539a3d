"""Every supported processor class, built without a hub: a small vocabulary and images of a few dozen pixels."""

from __future__ import annotations

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
}
OTHER_TOKENS = [
    "<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
    "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL", "<IMG_ATOM>", "<imgpad>", "[IMG]",
    "[IMG_BREAK]", "[IMG_END]", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|vision_start|>",
    "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|begin_of_video|>", "<|end_of_video|>",
]  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each special token, and one for everything else."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *NAMED_TOKENS.values(), *OTHER_TOKENS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=NAMED_TOKENS,
        additional_special_tokens=OTHER_TOKENS,
    )


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _processor(name: str, image_processor: str, video_processor: str | None = None, **own: Any) -> Any:
    """A builder: the class of that name around an image processor made by `build`."""

    def build(**settings: Any) -> ProcessorMixin:
        parts = {"image_processor": getattr(transformers, image_processor)(**settings), "tokenizer": tiny_tokenizer()}
        if video_processor is not None:
            parts["video_processor"] = getattr(transformers, video_processor)()
        return getattr(transformers, name)(**parts, **own)

    return build


def internvl(**settings: Any) -> ProcessorMixin:
    settings = {"size": square(32), "max_patches": 6, "crop_to_patches": True, **settings}
    return _processor("InternVLProcessor", "GotOcr2ImageProcessor", "InternVLVideoProcessor", image_seq_length=16)(
        **settings
    )


def llava(**settings: Any) -> ProcessorMixin:
    settings = {"size": {"shortest_edge": 48}, "crop_size": square(48), **settings}
    own = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return _processor("LlavaProcessor", "CLIPImageProcessor", **own)(**settings)


def qwen2_vl(**settings: Any) -> ProcessorMixin:
    settings = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 64 * 64}, **settings}
    return _processor("Qwen2VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")(**settings)


def idefics3(**settings: Any) -> ProcessorMixin:
    settings = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}, **settings}
    return _processor("Idefics3Processor", "Idefics3ImageProcessor", image_seq_len=16)(**settings)


PROCESSORS: dict[str, Callable[..., ProcessorMixin]] = {
    "idefics3": idefics3,
    "internvl": internvl,
    "llava": llava,
    "qwen2_vl": qwen2_vl,
}
