"""A tiny random model of every architecture, from its own configuration class, and prompts for it.

One entry of [`TINY`] is all that the conformance test needs to know of an architecture. Ids below 50 are text; the
others have a meaning, and models are kept from writing them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE, NUM_TEXT_IDS = 64, 50
IMAGE, EOS, PAD, VIDEO, START, END, BREAK = 60, 61, 62, 59, 58, 57, 56

Generator = torch.Generator
Inputs = dict[str, Any]  # tensors, but for a few lists that processors do not turn into tensors


def _joined(inputs: list[Inputs]) -> Inputs:
    """The image inputs of several samples as those of one batch: one below the other."""
    joined: Inputs = {}
    for name in dict.fromkeys(name for each in inputs for name in each):
        rows = [each[name] for each in inputs if name in each]
        joined[name] = list(chain(*rows)) if isinstance(rows[0], list) else torch.cat(rows)
    return joined


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
        token_types: The name of the input that marks visual tokens with 1 (images) and 2 (videos), or, where that is
            not all, a function from `input_ids` to the inputs of the same shape.
        attn_implementations: What its decoder's attention can run on without a GPU.
    """

    config: Callable[[int], PreTrainedConfig]
    images: Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]]
    videos: Callable[[PreTrainedConfig, int, Generator], tuple[list[list[int]], Inputs]] | None = None
    joined: Callable[[list[Inputs]], Inputs] = _joined
    token_types: str | Callable[[Tensor], Inputs] | None = None
    batches_alike: bool = True
    attn_implementations: tuple[str, ...] = ("sdpa", "eager")

    def per_token(self, input_ids: Tensor) -> Inputs:
        """The inputs beside `input_ids` that have one entry per prompt token; 0 stands for text and padding."""
        if self.token_types is None:
            return {}
        if callable(self.token_types):
            return self.token_types(input_ids)
        return {self.token_types: (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long()}


TINY: dict[str, TinyArchitecture] = {}  # filled by the modules of this package, with what this transformers has


def tiny_model(
    name: str, num_layers: int = 4, attn_implementation: str | None = None, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of that architecture, with weights large enough that its answers depend on everything."""
    config = TINY[name].config(num_layers)
    for attribute, value in changes.items():
        setattr(config.get_text_config(decoder=True), attribute, value)
    # For the decoder alone, because some vision towers know only eager attention.
    decoder = next((key for key, part in vars(config).items() if part is config.get_text_config(decoder=True)), None)
    attn_implementation = attn_implementation or TINY[name].attn_implementations[0]
    implementation = {decoder: attn_implementation} if decoder else attn_implementation
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():  # what training would move away from zero
            if not path.endswith("bias") and not parameter.any():
                parameter.normal_(std=0.3)
    for part in model.modules():  # some models hand `generate` on to their decoder
        if hasattr(part, "generation_config"):
            part.generation_config.eos_token_id = EOS
            part.generation_config.pad_token_id = PAD
            part.generation_config.suppress_tokens = [*range(NUM_TEXT_IDS, EOS), *range(EOS + 1, VOCAB_SIZE)]
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
        per_token = {"attention_mask": torch.ones_like(input_ids), **tiny.per_token(input_ids)}
        samples.append({"input_ids": input_ids, **per_token, **inputs})
    return samples


def tiny_batch(name: str, samples: list[Inputs], padding_side: str = "left") -> Inputs:
    """The same prompts as one padded batch."""
    width = max(sample["input_ids"].shape[1] for sample in samples)

    def padded(row: Tensor, value: int) -> Tensor:
        missing = width - row.shape[1]
        left, right = (missing, 0) if padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(row, (left, right), value=value)

    per_token = {"input_ids": PAD, "attention_mask": 0}
    per_token.update(dict.fromkeys(TINY[name].per_token(samples[0]["input_ids"]), 0))
    batch = {key: torch.cat([padded(sample[key], value) for sample in samples]) for key, value in per_token.items()}
    rest = [{key: value for key, value in sample.items() if key not in per_token} for sample in samples]
    rest = [inputs for inputs in rest if inputs]
    return {**batch, **(TINY[name].joined(rest) if rest else {})}


def _text(length: int, generator: Generator) -> list[int]:
    return torch.randint(0, NUM_TEXT_IDS, (length,), generator=generator).tolist()


# At the end, because these modules fill the table above.
from . import grids, natives, others, tiles  # noqa: E402, F401
