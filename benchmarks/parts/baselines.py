"""What the pair has to beat, as the evaluation has it: random pruning, FastV, DivPrune, and a smaller image.

The evaluation's methods ask a pair for inputs and answers; here one stands in for it that has neither processors nor
questions in words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GotOcr2ImageProcessor, PreTrainedModel

from benchmarks.parts.pairing import Pairing
from transformers_sgl.architectures import check_supported, decoder_layers, visual_tokens_of
from transformers_sgl.evaluation.methods import Batch, DivPrune, Downsample, FastV, Method, Pair, Random, Setting
from transformers_sgl.generation_config_sgl import SGLGenerationConfig

__all__ = ["baselines", "smaller_inputs"]

_RANKERS: dict[str, Method] = {"DivPrune": DivPrune(), "FastV": FastV(), "random": Random()}


def baselines(
    pairing: Pairing,
    image_size: tuple[int, int],
    points: dict[str, dict[str, Any]],
    answer_tokens: int = 16,
    seed: int = 0,
) -> dict[str, Callable[[], dict[str, float]]]:
    """The ways to an answer at each average retention.

    Args:
        pairing ([`Pairing`]): The large model and a question, of a single prompt.
        image_size (`tuple` of two `int`): Width and height of its image in pixels.
        points (`dict`): By name, what is kept: `average_retention` and `prune_layer`.
        answer_tokens (`int`, defaults to 16): How many tokens are written.
        seed (`int`, defaults to 0): What random pruning is drawn from.

    Returns:
        `dict` from `str` to `Callable`: By name. Each writes an answer and returns the `average_retention` that came
        of it, and the `tower_share`. A smaller image is left out where images are not cut into tiles.
    """
    large, inputs = pairing.large, pairing.inputs
    pair = _StandIn.of(large, inputs, answer_tokens, seed)
    batch = Batch([SimpleNamespace(prompt="")], [0], [_image(image_size, seed)])  # type: ignore[list-item]
    ways: dict[str, Callable[[], dict[str, float]]] = {}
    num_layers = len(decoder_layers(large))
    settings = {
        name: Setting(point["average_retention"], point["prune_layer"], num_layers) for name, point in points.items()
    }
    for rival, method in _RANKERS.items():
        for name, setting in settings.items():
            ways[f"{rival}, as {name}"] = partial(_rank, method, pair, batch, setting)
    if check_supported(large.config).inputs == {"pixel_values": "tile"}:
        for name, setting in settings.items():
            smaller = smaller_inputs(pair, batch, setting)
            shares = _shares(large, smaller, inputs)
            ways[f"smaller image, as {name}"] = partial(_write, large, smaller, answer_tokens, shares)
    return ways


def smaller_inputs(pair: _StandIn, batch: Batch, setting: Setting) -> dict[str, Tensor]:
    """The large model's inputs with a smaller image: fewer tiles, or smaller ones."""
    Downsample().answer(pair, batch, setting)
    return pair.read_last.pop()


@dataclass(frozen=True)
class _StandIn(Pair):
    """A pair whose only question is a prompt that is there already; it says nothing in words."""

    given: dict[str, Tensor] = field(default_factory=dict)  # the large model's inputs
    read_last: list[dict[str, Tensor]] = field(default_factory=list)  # the inputs of the last smaller image

    @classmethod
    def of(cls, large: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int, seed: int) -> _StandIn:
        model = SimpleNamespace(large=large, generation_config=SGLGenerationConfig())
        return cls(model, SimpleNamespace(large_processor=_processor(large)), answer_tokens, seed, inputs)

    def inputs(self, processor: Any, samples: Any, images: Sequence[Image.Image], **options: Any) -> Any:
        if not options:
            return self.given
        processed = processor.image_processor(list(images), return_tensors="pt", **options)
        number = int(processed["num_patches"].sum()) * processor.image_seq_length
        return _with_image(self.model.large, self.given, processed["pixel_values"], number)

    def write(self, model: Any, processor: Any, inputs: Any) -> list[tuple[str, int]]:
        if inputs is not self.given:
            self.read_last.append(inputs)  # prepared only, as those of the other methods are
        else:
            model.generate(**inputs, max_new_tokens=self.max_new_tokens)
        return [("", self.max_new_tokens)]


def _processor(large: PreTrainedModel) -> Any:
    """What the evaluation asks a processor of tiles for."""
    config: Any = large.config
    if check_supported(config).inputs != {"pixel_values": "tile"}:
        return None
    height, width = config.vision_config.image_size
    image_processor = GotOcr2ImageProcessor(size={"height": height, "width": width}, crop_to_patches=True)
    return SimpleNamespace(image_processor=image_processor, image_seq_length=config.image_seq_length)


def _with_image(model: PreTrainedModel, inputs: dict[str, Tensor], pixels: Tensor, number: int) -> dict[str, Tensor]:
    """A prompt with another image, of so many visual tokens."""
    tokens, ids = visual_tokens_of(model.config, inputs), inputs["input_ids"]
    first, last = int(tokens.positions.min()), int(tokens.last_position.max())
    image = ids[:, first : first + 1].expand(-1, number)
    input_ids = torch.cat([ids[:, :first], image, ids[:, last + 1 :]], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def _image(image_size: tuple[int, int], seed: int) -> Image.Image:
    width, height = image_size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _rank(method: Method, pair: Pair, batch: Batch, setting: Setting) -> dict[str, float]:
    (answer,) = method.answer(pair, batch, setting)
    return {"average_retention": float(answer.retention or 0), "tower_share": 1.0}


def _write(
    large: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int, shares: dict[str, float]
) -> dict[str, float]:
    large.generate(**inputs, max_new_tokens=answer_tokens)
    return shares


def _shares(model: PreTrainedModel, smaller: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, float]:
    """The fractions of the visual tokens and of the patches that are left."""
    left, before = (visual_tokens_of(model.config, each).num_visual_tokens for each in (smaller, inputs))
    return {
        "average_retention": left / before,
        "tower_share": smaller["pixel_values"].numel() / inputs["pixel_values"].numel(),
    }
