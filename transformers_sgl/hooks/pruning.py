"""What one `generate` call prunes of the large model: patches in its vision tower, visual tokens in its decoder."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl.hooks.context import HookContext
from transformers_sgl.hooks.vision_tower_pruner import VisionTowerPruner
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.prompt import Prompt
from transformers_sgl.tokens.importance_process import DROPPED, ImportanceProcessorList
from transformers_sgl.vision_towers import with_tiles

__all__ = ["Pruning"]


class Pruning(HookContext):
    """Chooses visual tokens by their importance, and lets a model leave out the others.

    First `of_tower` chooses what the vision tower encodes; the decoder sees nothing else. Of this, `of_decoder`
    chooses what the decoder keeps from `prune_layer` on.

    Args:
        model (`PreTrainedModel`): The model.
        prompt ([`Prompt`]): The prompts that it is given.
        importance (`Tensor` of shape `(batch, num_visual_tokens)`): The importance of their visual tokens.
        of_tower ([`ImportanceProcessorList`]): Empty where the tower encodes everything.
        of_decoder ([`ImportanceProcessorList`]): Empty where the decoder keeps all of that.
        prune_layer (`int`): The first layer of the decoder that sees fewer tokens.
        vision_prune_layer (`int`, *optional*): The same for the tower; `None` if whole tiles are left out.
        features (`Tensor` of shape `(batch, num_visual_tokens, width)`, *optional*): What their features are.

    Raises:
        ValueError: As its parts do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        importance: Tensor,
        of_tower: ImportanceProcessorList,
        of_decoder: ImportanceProcessorList,
        prune_layer: int,
        vision_prune_layer: int | None = None,
        features: Tensor | None = None,
    ) -> None:
        tokens = replace(prompt.visual_tokens, features=features)
        self._tower = None
        self._fields: dict[str, Any] = {"prune_layer": prune_layer, "vision_prune_layer": vision_prune_layer}
        encoded = None
        if of_tower:
            tokens = with_tiles(prompt.config, prompt.inputs, tokens)
            encoded = of_tower.keep_mask(tokens, importance)
            self._tower = VisionTowerPruner(model, prompt.inputs, tokens, encoded, vision_prune_layer)
            importance = importance.masked_fill(~encoded, DROPPED)
        kept = of_decoder.keep_mask(tokens, importance)
        first = None if encoded is None else tokens.prompt_keep_mask(encoded)
        self._decoder = VisualTokenPruner(model, tokens.prompt_keep_mask(kept), prune_layer, first)
        self._masks = {"keep_mask": kept, "vision_keep_mask": encoded}

    def _register(self, stack: ExitStack) -> None:
        for each in (self._tower, self._decoder):
            if each is not None:
                stack.enter_context(each)

    def fields(self, chosen: Tensor, num_visual_tokens: int) -> dict[str, Any]:
        """The fields of the output that tell what was pruned, for a batch of which only the `chosen` samples ran.

        `chosen` has the shape `(batch,)`, the masks that of `(batch, num_visual_tokens)`.
        """
        fields = dict(self._fields)
        for name, mask in self._masks.items():
            if mask is not None:
                fields[name] = mask.new_zeros(len(chosen), num_visual_tokens)
                fields[name][chosen.to(mask.device), : mask.shape[1]] = mask
        if self._tower is not None:
            fields["vision_share"] = torch.zeros(len(chosen), dtype=torch.float64)
            fields["vision_share"][chosen.cpu()] = self._tower.share
        return fields
