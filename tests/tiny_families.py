"""Whole tiny checkpoints of unlike families: a random model and a processor that fits it, made without a hub.

They have nothing in common but the alphabet: other tiles and patches, other image tokens, another chat template, other
ids for the same letters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from string import ascii_letters, digits
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from transformers_sgl import SGLForConditionalGeneration, SGLProcessor

LETTERS = ascii_letters + digits + " .,:?!\n_"
NAMED_TOKENS: dict[str, dict[str, str]] = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "llava": {"image_token": "<image>"},
    "qwen2_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "start_token": "<|vision_start|>",
        "end_token": "<|vision_end|>",
    },
}
_MESSAGES = (
    "{{% for message in messages %}}{before}{{% for part in message.content %}}{{% if part.type == 'image' %}}{image}"
    "{{% elif part.type == 'video' %}}{video}{{% else %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}{after}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{answer}{{% endif %}}"
)
TEMPLATES = {
    "internvl": _MESSAGES.format(
        before="{{ message.role }}\n", image="<IMG_CONTEXT>\n", video="<video>", after="\n", answer="assistant\n"
    ),
    "llava": _MESSAGES.format(before="USER: ", image="<image>\n", video="", after="", answer=" ASSISTANT:"),
    "qwen2_vl": _MESSAGES.format(
        before="_{{ message.role }}_",
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        after="_",
        answer="_assistant_",
    ),
}
_ORDERS = {"internvl": 1, "llava": 11, "qwen2_vl": 31}  # of the letters; without a common divisor with their number


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Every token is a letter or a special token."""
    special = ["<unk>", "<pad>", "<eos>", *NAMED_TOKENS[family].values()]
    order = _ORDERS[family]
    letters = {letter: len(special) + index * order % len(LETTERS) for index, letter in enumerate(LETTERS)}
    backend = Tokenizer(
        models.WordLevel({**dict(zip(special, itertools.count(), strict=False)), **letters}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=NAMED_TOKENS[family],
    )


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def internvl_processor(**settings: Any) -> ProcessorMixin:
    """Tiles of 16x16 pixels with 16 tokens each, and a thumbnail."""
    settings = {"size": _square(16), "min_patches": 1, "max_patches": 4, "crop_to_patches": True, **settings}
    return InternVLProcessor(
        GotOcr2ImageProcessor(**settings),
        tiny_tokenizer("internvl"),
        InternVLVideoProcessor(size=_square(16)),
        image_seq_length=16,
        chat_template=TEMPLATES["internvl"],
    )


def llava_processor(**settings: Any) -> ProcessorMixin:
    """The square middle of the image, in 25 tokens."""
    settings = {"size": {"shortest_edge": 20}, "crop_size": _square(20), **settings}
    return LlavaProcessor(
        CLIPImageProcessor(**settings),
        tiny_tokenizer("llava"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["llava"],
    )


def qwen2_vl_processor(**settings: Any) -> ProcessorMixin:
    """The image in its own proportions, a token for each 8x8 pixels."""
    settings = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1600}, **settings}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(**settings),
        tiny_tokenizer("qwen2_vl"),
        Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=TEMPLATES["qwen2_vl"],
    )


def _decoder(family: str, num_layers: int, **own: Any) -> dict[str, Any]:
    tokenizer = tiny_tokenizer(family)
    return {
        "model_type": "qwen2",
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **own,
    }


_TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def _internvl_config(num_layers: int) -> PreTrainedConfig:
    return InternVLConfig(
        vision_config={**_TOWER, "image_size": (16, 16), "patch_size": (4, 4)},
        text_config=_decoder("internvl", num_layers),
        image_token_id=tiny_tokenizer("internvl").convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=1.0,
        tie_word_embeddings=False,
    )


def _llava_config(num_layers: int) -> PreTrainedConfig:
    return LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_TOWER, "image_size": 20, "patch_size": 4},
        text_config=_decoder("llava", num_layers),
        image_token_id=tiny_tokenizer("llava").convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=25,
        tie_word_embeddings=False,
    )


def _qwen2_vl_config(num_layers: int) -> PreTrainedConfig:
    ids = {name: tiny_tokenizer("qwen2_vl").convert_tokens_to_ids(f"<|{name}|>") for name in (
        "image_pad", "video_pad", "vision_start", "vision_end"
    )}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
    return Qwen2VLConfig(
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
        },
        text_config=_decoder("qwen2_vl", num_layers, model_type="qwen2_vl_text", rope_parameters=rope),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )


PROCESSORS: dict[str, Callable[..., ProcessorMixin]] = {
    "internvl": internvl_processor,
    "llava": llava_processor,
    "qwen2_vl": qwen2_vl_processor,
}
_CONFIGS = {"internvl": _internvl_config, "llava": _llava_config, "qwen2_vl": _qwen2_vl_config}


def tiny_family_model(family: str, num_layers: int = 3, seed: int = 0) -> PreTrainedModel:
    """A random model, with weights large enough that its answers depend on everything it sees."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(_CONFIGS[family](num_layers)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision" in name or "visual" in name or "projector" in name:
                parameter.normal_(std=0.3)
        # A random model may write anything, but nothing is less likely than what no model is to write.
        special = ["<unk>", *NAMED_TOKENS[family].values()]
        model.lm_head.weight[tiny_tokenizer(family).convert_tokens_to_ids(special)] = 0
    tokenizer = tiny_tokenizer(family)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def tiny_family_pair(large: str, small: str) -> tuple[SGLForConditionalGeneration, SGLProcessor]:
    """A pair with its processor."""
    model = SGLForConditionalGeneration(large=tiny_family_model(large, 4), small=tiny_family_model(small, 2, seed=1))
    return model, SGLProcessor(PROCESSORS[large](), PROCESSORS[small]())


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise in large squares, so that every place looks different."""
    noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.NEAREST)
