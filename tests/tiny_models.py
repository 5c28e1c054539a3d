"""Tiny random models: the mechanics must be right whatever the weights."""

from __future__ import annotations

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

VOCAB_SIZE = 64
IMAGE, EOS, PAD = 60, 61, 62
TOKENS_PER_TILE = 16


def tiny_internvl(
    num_layers: int = 4, seed: int = 0, attn_implementation: str = "sdpa", hidden_size: int = 32, **text: object
) -> InternVLForConditionalGeneration:
    """A random InternVL whose tiles are 16x16 pixels and give 16 visual tokens."""
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=(16, 16),
            patch_size=(4, 4),
        ).to_dict(),
        text_config=Qwen2Config(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * hidden_size,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=512,
            initializer_range=0.3,
            tie_word_embeddings=True,
            **text,
        ).to_dict(),
        image_token_id=IMAGE,
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=1.0,
    )
    config._attn_implementation = attn_implementation
    model = InternVLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE]  # a random model may write anything
    return model


def prompts(
    images: list[list[int]], text: list[int], seed: int = 0, padding_side: str = "left"
) -> dict[str, torch.Tensor]:
    """A padded batch of random prompts.

    Args:
        images: For each sample, the number of tiles of each of its images; they stand with a text token in between.
        text: For each sample, how many text tokens follow the last image.
        seed: Seed of text and pixels.
        padding_side: Where the padding goes.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for tiles, length in zip(images, text, strict=True):
        row = torch.randint(0, 50, (2,), generator=generator).tolist()
        for number in tiles:
            row += [IMAGE] * (TOKENS_PER_TILE * number) + torch.randint(0, 50, (1,), generator=generator).tolist()
        rows.append(row + torch.randint(0, 50, (length,), generator=generator).tolist())
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(row)) for row in rows]
    left = padding_side == "left"
    ids = [pad + row if left else row + pad for pad, row in zip(fill, rows, strict=True)]
    mask = [
        [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
        for pad, row in zip(fill, rows, strict=True)
    ]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    num_tiles = sum(map(sum, images))
    if num_tiles:
        batch["pixel_values"] = torch.randn(num_tiles, 3, 16, 16, generator=generator)
    return batch
