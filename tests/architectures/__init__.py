"""A tiny random model of every architecture, from its own configuration class, and prompts for it.

One entry of [`TINY`] is all that the conformance test needs to know of an architecture. Ids below 50 are text; the
others have a meaning, and models are kept from writing them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE, NUM_TEXT_IDS = 64, 50
IMAGE, EOS, PAD, VIDEO, START, END, BREAK = 60, 61, 62, 59, 58, 57, 56

Generator = torch.Generator
Inputs = dict[str, Tensor]


def _joined(inputs: list[Inputs]) -> Inputs:
    """The image inputs of several samples as those of one batch: one below the other."""
    return {name: torch.cat([each[name] for each in inputs if name in each]) for name in inputs[0]}


@dataclass(frozen=True)
class TinyArchitecture:
    """How to build a tiny model of one architecture, and what it reads.

    Attributes:
        config: From a number of decoder layers to a configuration.
        images: From the configuration and a number of images to the prompt tokens that stand for each of them (start,
            end and separators included), and the input tensors of all of them. Sizes differ from image to image where
            the architecture allows it.
        videos: The same for videos; `None` where the architecture knows none.
        joined: How the image inputs of samples become those of a batch.
        token_types: The name of the input that marks visual tokens with 1 (images) and 2 (videos), if there is one.
    """

    config: Callable[[int], PreTrainedConfig]
    images: Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]
    videos: Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]] | None = None
    joined: Callable[[list[Inputs]], Inputs] = _joined
    token_types: str | None = None


TINY: dict[str, TinyArchitecture] = {}  # filled by the modules of this package, with what this transformers has


def tiny_model(
    name: str, num_layers: int = 4, attn_implementation: str = "sdpa", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of that architecture, with weights large enough that its answers depend on everything."""
    config = TINY[name].config(num_layers)
    for attribute, value in changes.items():
        setattr(config.get_text_config(decoder=True), attribute, value)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attn_implementation).eval()
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [*range(NUM_TEXT_IDS, EOS), *range(EOS + 1, VOCAB_SIZE)]
    return model


def tiny_samples(
    name: str,
    images: tuple[int, ...] = (1, 2, 1),
    text: tuple[int, ...] = (5, 3, 9),
    seed: int = 0,
    video: bool = False,
) -> list[Inputs]:
    """Prompts one by one: so many images (or videos) with a text token between them, then so many text tokens."""
    tiny = TINY[name]
    config = tiny.config(4)
    samples = []
    for number, (num_images, length) in enumerate(zip(images, text, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        make = tiny.videos if video else tiny.images
        assert make is not None
        spans, inputs = make(config, num_images, generator) if num_images else ([], {})
        row = _text(2, generator)
        for span in spans:
            row += span + _text(1, generator)
        row += _text(length, generator)
        input_ids = torch.tensor([row])
        samples.append({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **inputs})
        if tiny.token_types:
            samples[-1][tiny.token_types] = (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()
    return samples


def tiny_batch(name: str, samples: list[Inputs], padding_side: str = "left") -> Inputs:
    """The same prompts as one padded batch."""
    width = max(sample["input_ids"].shape[1] for sample in samples)

    def padded(row: Tensor, value: int) -> Tensor:
        missing = width - row.shape[1]
        left, right = (missing, 0) if padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(row, (left, right), value=value)

    per_token = {"input_ids": PAD, "attention_mask": 0}
    if TINY[name].token_types:
        per_token[TINY[name].token_types] = 0
    batch = {key: torch.cat([padded(sample[key], value) for sample in samples]) for key, value in per_token.items()}
    rest = [{key: value for key, value in sample.items() if key not in per_token} for sample in samples]
    rest = [inputs for inputs in rest if inputs]
    return {**batch, **(TINY[name].joined(rest) if rest else {})}


def _text(length: int, generator: Generator) -> list[int]:
    return torch.randint(0, NUM_TEXT_IDS, (length,), generator=generator).tolist()
