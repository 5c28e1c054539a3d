"""Tiny random models: the mechanics must be right whatever the weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from string import ascii_letters, digits
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AttentionInterface,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    StoppingCriteria,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence

from transformers_sgl import VisualTokens

VOCAB_SIZE = 64
IMAGE, EOS, PAD = 60, 61, 62
TOKENS_PER_TILE = 16
# A batch with everything in it: different lengths, numbers of images and of tiles.
IMAGES, TEXT = [[1], [2], [1, 1]], [5, 3, 9]
FLASH_STAND_IN = "flash_stand_in"


def tiny_internvl(
    num_layers: int = 4,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    hidden_size: int = 32,
    num_vision_layers: int = 1,
    **text: Any,
) -> InternVLForConditionalGeneration:
    """A random InternVL whose tiles are 16x16 pixels and give 16 visual tokens."""
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            num_hidden_layers=num_vision_layers,
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
    if attn_implementation != FLASH_STAND_IN:
        config._attn_implementation = attn_implementation
    model = InternVLForConditionalGeneration(config).eval()
    if attn_implementation == FLASH_STAND_IN:
        model.get_decoder().config._attn_implementation = FLASH_STAND_IN
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE]  # a random model may write anything
    return model


def prompts(
    images: list[list[int]] = IMAGES, text: list[int] = TEXT, seed: int = 0, padding_side: str = "left"
) -> dict[str, Tensor]:
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
    batch = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(batch)
    for number, row in enumerate(rows):
        columns = slice(width - len(row), None) if padding_side == "left" else slice(len(row))
        batch[number, columns] = torch.tensor(row)
        mask[number, columns] = 1
    inputs = {"input_ids": batch, "attention_mask": mask}
    num_tiles = sum(map(sum, images))
    if num_tiles:
        inputs["pixel_values"] = torch.randn(num_tiles, 3, 16, 16, generator=generator)
    return inputs


def samples(inputs: dict[str, Tensor], images: list[list[int]] = IMAGES) -> list[dict[str, Tensor]]:
    """The samples of a batch one by one, without padding."""
    tiles = torch.split(inputs["pixel_values"], [sum(numbers) for numbers in images])
    return [
        {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None], "pixel_values": pixels}
        for ids, mask, pixels in zip(inputs["input_ids"], inputs["attention_mask"], tiles, strict=True)
    ]


def find_visual_tokens(inputs: dict[str, Tensor]) -> VisualTokens:
    """The visual tokens of such a batch."""
    return VisualTokens.from_input_ids(inputs["input_ids"], IMAGE, inputs["attention_mask"])


def answers(sequences: Tensor, prompt_length: int) -> list[list[int]]:
    """What was written, up to the end of sequence or the padding behind it."""
    written = []
    for row in sequences[:, prompt_length:].tolist():
        end = next((index for index, token in enumerate(row) if token in (EOS, PAD)), len(row))
        written.append(row[:end])
    return written


def in_threads(number: int, work: Callable[[int], Any], times: int = 4) -> list[list[Any]]:
    """What `work(thread)` returns each time, in so many threads that start together."""
    barrier = threading.Barrier(number)

    def repeat(thread: int) -> list[Any]:
        barrier.wait()
        return [work(thread) for _ in range(times)]

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(repeat, range(number)))


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that hooks, contexts and settings could leave behind on a model."""
    return {
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: [len(module._forward_pre_hooks), len(module._forward_hooks), len(module._backward_hooks)]
            for name, module in model.named_modules()
        },
        "attention": {
            name: module.config._attn_implementation
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
    }


def _flash_stand_in(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Takes what flash attention takes, a 2-D padding mask or none, and needs no GPU."""
    query_length, key_length = query.shape[2], key.shape[2]
    # Flash attention takes a single sequence whose positions have gaps for several sequences packed into one.
    assert attention_mask is not None or not _is_packed_sequence(kwargs.get("position_ids"), query.shape[0])
    position = torch.arange(key_length)
    own = position[key_length - query_length :, None]
    mask = ((position <= own) & (position > own - (kwargs.get("sliding_window") or key_length)))[None, None]
    if attention_mask is not None:
        assert attention_mask.shape == (query.shape[0], key_length)
        mask = mask & attention_mask.bool()[:, None, None, :] | torch.eye(key_length).bool()[-query_length:]
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register(FLASH_STAND_IN, _flash_stand_in)
AttentionMaskInterface.register(FLASH_STAND_IN, flash_attention_mask)


class Banned(LogitsProcessor):
    """Forbids a token that depends on the one before it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, (input_ids[:, -1:] + 1) % 50, -torch.inf)


class SumIsRound(StoppingCriteria):
    """Ends a sample when the sum of its tokens is divisible by five."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.sum(dim=1) % 5 == 0


def near_copy(model: PreTrainedModel, noise: float, seed: int = 0) -> PreTrainedModel:
    """A model that mostly says the same: the weights with some noise."""
    generator = torch.Generator().manual_seed(seed)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (each for each in copied.get_decoder().parameters() if each.numel() > 1):
            parameter += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return copied


def tiny_tokenizer(order: int = 1) -> PreTrainedTokenizerFast:
    """A tokenizer for these models: every token is a letter or a digit; another `order` gives them other ids."""
    special = {"<image>": IMAGE, "<eos>": EOS, "<pad>": PAD, "<unk>": PAD + 1}
    letters = {letter: index * order % IMAGE for index, letter in enumerate((ascii_letters + digits)[:IMAGE])}
    backend = Tokenizer(models.WordLevel({**letters, **special}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=["<image>"],
    )
