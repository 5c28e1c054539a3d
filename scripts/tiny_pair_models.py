"""The tiny pair's tokenizer, processor and two untrained models.

Both models are ordinary InternVL checkpoints that share a tokenizer and a processor, so that stock transformers loads
each on its own and both see the same visual tokens: 64 for each 64 x 64 tile.
"""

from __future__ import annotations

import json
import math

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

TILE, PATCH = 64, 8  # pixels
TOKENS_PER_TILE = (TILE // PATCH) ** 2
MAX_LENGTH = 2048
SPECIAL_TOKENS = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

VISION = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "image_size": [TILE, TILE],
    "patch_size": [PATCH, PATCH],
    "attention_bias": True,
    "initializer_range": 0.1,  # narrow models want larger initial weights than the defaults
    "layer_scale_init_value": 1.0,
}
DECODERS = {
    "small": {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 160},
    "large": {"hidden_size": 128, "num_hidden_layers": 10, "intermediate_size": 384},
}


def build_tokenizer(corpus: list[str], vocab_size: int) -> Qwen2Tokenizer:
    """Trains a byte-level BPE on the corpus; it can encode any text.

    Args:
        corpus: Texts to learn the merges from.
        vocab_size: The most entries, without the special tokens.

    Returns:
        The tokenizer, with InternVL's special tokens.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)], special_tokens=True)
    return tokenizer


def build_processor(tokenizer: Qwen2Tokenizer) -> InternVLProcessor:
    """Builds the processor: one tile for a 64 x 64 picture, four and a thumbnail for a 128 x 128 one."""
    pixels = {
        "size": {"height": TILE, "width": TILE},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(crop_to_patches=True, min_patches=1, max_patches=4, **pixels),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**pixels),
        image_seq_length=TOKENS_PER_TILE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    name: str, tokenizer: Qwen2Tokenizer, vision_layers: int = 3, max_new_tokens: int = 48
) -> InternVLForConditionalGeneration:
    """Builds one untrained model.

    Args:
        name: `"small"` or `"large"`.
        tokenizer: The tokenizer of both models.
        vision_layers: Layers of the vision tower.
        max_new_tokens: The length limit of an answer, if the caller names none.

    Returns:
        The model, with random weights from torch's global seed.
    """
    config = InternVLConfig(
        vision_config={**VISION, "num_hidden_layers": vision_layers},
        text_config={
            "model_type": "qwen2",
            **DECODERS[name],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_LENGTH,
            "initializer_range": 0.08,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=1.0,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    with torch.no_grad():
        depth = config.text_config.num_hidden_layers
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight /= math.sqrt(2 * depth)
            layer.mlp.down_proj.weight /= math.sqrt(2 * depth)
        positions = model.model.vision_tower.embeddings.position_embeddings
        positions[0, 1:] = sinusoids(TILE // PATCH, positions.shape[-1])
    return model


def sinusoids(side: int, width: int) -> torch.Tensor:
    """Two-dimensional sine and cosine position embeddings, `(side * side, width)`, to start from."""
    frequencies = 4.0 ** -torch.linspace(0, 1, width // 4) * math.pi / 2  # wavelengths of 4 to 16 patches
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    rows = waves[:, None].expand(side, side, -1)
    columns = waves[None].expand(side, side, -1)
    return torch.cat([rows, columns], dim=-1).reshape(side * side, width)
