"""A model's inputs together with the places of their visual tokens, found once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from transformers_sgl.architectures import check_supported, visual_tokens_of
from transformers_sgl.batching import left_padded, row_owners, select_samples
from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = ["Prompt"]


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    Attributes:
        config (`PreTrainedConfig`): The configuration of the model that reads them.
        inputs (`dict`): The model's inputs, with `input_ids` of shape `(batch, prompt_length)`.
        visual_tokens (`VisualTokens`): Where the visual tokens stand in them.
    """

    config: PreTrainedConfig
    inputs: dict[str, Any]
    visual_tokens: VisualTokens

    @classmethod
    def of(cls, config: PreTrainedConfig, inputs: dict[str, Any], as_passed: bool = False) -> Prompt:
        """The prompts in a model's inputs, padded on the left, or `as_passed`; raises `ValueError` as its parts do."""
        inputs = inputs if as_passed else left_padded(inputs)
        return cls(config, inputs, visual_tokens_of(config, inputs))

    @classmethod
    def find(cls, config: PreTrainedConfig, inputs: dict[str, Any]) -> Prompt | None:
        """The same, or `None` where only a part of the prompts, or only embeddings, were passed."""
        input_ids, attention_mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if input_ids is None or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            return None
        return cls.of(config, inputs)

    def select(self, chosen: Tensor) -> Prompt:
        """The prompts that are `chosen`, `(batch,)`, without the padding that only the others needed."""
        return Prompt.of(self.config, select_samples(self.inputs, chosen, self.row_owners()), as_passed=True)

    def row_owners(self) -> dict[str, Tensor]:
        """The prompt to which each row of an image input belongs, by input name; tensors of shape `(num_rows,)`.

        Inputs with one row per prompt are left out.

        Raises:
            ValueError: If nothing tells to which prompts the rows of an input belong.
        """
        owners = {}
        for name, kind in check_supported(self.config).inputs.items():
            if self.inputs.get(name) is None:
                continue
            if kind == "sample":  # or one for each prompt with images
                with_images = self.visual_tokens.counts.nonzero()[:, 0]
                if len(self.inputs[name]) == len(with_images):
                    owners[name] = with_images
                continue
            if kind == "batch":
                raise ValueError(
                    f"Some prompts of this batch exit early, but nothing tells to which prompts the rows of `{name}` "
                    "belong: pass such prompts one at a time, or without `early_exit_threshold`."
                )
            modality = "video" if "video" in name or kind == "video" else "image"
            tokens = visual_tokens_of(self.config, self.inputs, modality)
            if not tokens.counts.any():  # some models write videos with the placeholders of images
                tokens = self.visual_tokens
            of_images = kind in ("image", "video")
            weights = tokens.image_index.amax(dim=1) + 1 if of_images else tokens.counts
            sizes = self.inputs[kind].prod(dim=1) if kind in self.inputs else None
            owners[name] = row_owners(len(self.inputs[name]), weights, sizes)
        return owners
