"""The models of a run, made when they are first needed, and prompts for them."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.memory import available_memory, in_gib
from benchmarks.parts.pairing import Pairing
from benchmarks.random_models import random_inputs, random_model
from benchmarks.settings import BenchmarkSettings
from transformers_sgl.architectures import check_supported, visual_tokens_of

__all__ = ["Workbench", "count_visual_tokens", "num_parameters", "with_tiles"]

# How much of the memory that is left a model's weights may fill; the rest is for its work.
_USABLE = 0.9


class Workbench:
    """The models of a run, made when they are first needed, and prompts for them.

    Args:
        settings ([`BenchmarkSettings`]): What is measured.
        pair (`Path`): A saved pair, for the part that loads one.
    """

    def __init__(self, settings: BenchmarkSettings, pair: Path) -> None:
        self.settings = settings
        self.pair = pair
        self._models: dict[str, PreTrainedModel] = {}

    @property
    def large(self) -> PreTrainedModel:
        """The large model."""
        return self.model(self.settings.large)

    @property
    def small(self) -> PreTrainedModel:
        """The small model."""
        return self.model(self.settings.small)

    def model(self, name: str) -> PreTrainedModel:
        """The model of a shape; raises a `ValueError` if it does not fit into memory."""
        if name not in self._models:
            settings, dtype = self.settings, getattr(torch, self.settings.dtype)
            needed = num_parameters(name, settings.shrink) * dtype.itemsize
            left = available_memory(settings.device)
            if needed > _USABLE * left:
                raise ValueError(
                    f"The weights of {name!r} take {in_gib(needed)}, but {in_gib(left)} of memory are left: name a "
                    "smaller shape, or pass a larger --shrink."
                )
            self._models[name] = random_model(
                name, settings.shrink, settings.device, dtype, settings.seed, settings.shrink_depth
            )
        return self._models[name]

    def forget_all_but(self, *names: str) -> None:
        """Frees the memory of the other models."""
        self._models = {name: model for name, model in self._models.items() if name in names}
        gc.collect()
        if torch.device(self.settings.device).type == "cuda":
            torch.cuda.empty_cache()

    def inputs(
        self, model: PreTrainedModel, batch_size: int | None = None, image_size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """Prompts for a model, with pictures."""
        settings = self.settings
        return random_inputs(
            model,
            image_size or settings.image_size,
            settings.prompt_tokens,
            batch_size or settings.batch_size,
            settings.seed,
        )

    def pairing(self, large: str | None = None, image_size: tuple[int, int] | None = None) -> Pairing:
        """Both models and one prompt."""
        model = self.model(large or self.settings.large)
        return Pairing(model, self.small, self.inputs(model, batch_size=1, image_size=image_size))

    def inputs_with(self, num_visual_tokens: int, batch_size: int = 1) -> dict[str, Tensor]:
        """Prompts for the small model with about this many visual tokens; exactly as many where images are tiles."""
        if check_supported(self.small.config).inputs == {"pixel_values": "tile"}:
            side = self.small.config.vision_config.image_size[0]
            inputs = self.inputs(self.small, batch_size, (side, side))
            number = num_visual_tokens // count_visual_tokens(self.small, inputs)
            return with_tiles(self.small, inputs, max(1, number))
        # Twice the tokens are an image twice as wide, or twice as high.
        doublings = (num_visual_tokens // 256).bit_length() - 1
        size = 448 * 2 ** (doublings - doublings // 2), 448 * 2 ** (doublings // 2)
        return self.inputs(self.small, batch_size, size)

    def takes(self, inputs: dict[str, Tensor], answer_tokens: int) -> bool:
        """Whether a point of a sweep is to be measured."""
        batch_size, length = inputs["input_ids"].shape
        limit = self.settings.max_tokens
        return limit == 0 or batch_size * (length + answer_tokens) <= limit


def with_tiles(model: PreTrainedModel, inputs: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """Prompts whose image is one tile, with so many tiles instead."""
    tokens = visual_tokens_of(model.config, inputs)
    first, last = int(tokens.positions.min()), int(tokens.last_position.max())
    ids = inputs["input_ids"]
    image = ids[:, first : last + 1].repeat(1, number)
    input_ids = torch.cat([ids[:, :first], image, ids[:, last + 1 :]], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": inputs["pixel_values"].repeat_interleave(number, dim=0),
    }


def count_visual_tokens(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """How many visual tokens a prompt has."""
    return visual_tokens_of(model.config, inputs).num_visual_tokens


def num_parameters(name: str, shrink: int = 1) -> int:
    """How many parameters a shape has."""
    return int(random_model(name, shrink, "meta").num_parameters())
