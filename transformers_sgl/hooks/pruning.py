"""What one `generate` call prunes of the large model: patches in its vision tower, visual tokens in its decoder."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl.hooks.context import HookContext
from transformers_sgl.hooks.vision_tower_pruner import VisionTowerPruner
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.prompt import Prompt

__all__ = ["Pruning"]


class Pruning(HookContext):
    """Lets a model leave out visual tokens that were chosen before.

    What the vision tower does not encode, no layer of the decoder sees; of the rest, it keeps some from `prune_layer`
    on.

    Args:
        model (`PreTrainedModel`): The model.
        prompt ([`Prompt`]): The prompts that it is given.
        keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`): `True` for what the decoder keeps.
        prune_layer (`int`): The first layer of the decoder that sees fewer tokens.
        vision_keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for what the tower
            encodes; by default everything.
        vision_prune_layer (`int`, *optional*): The tower's first layer that sees fewer patches; `None` if whole tiles
            are left out.

    Raises:
        ValueError: As its parts do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        keep_mask: Tensor,
        prune_layer: int,
        vision_keep_mask: Tensor | None = None,
        vision_prune_layer: int | None = None,
    ) -> None:
        tokens = prompt.visual_tokens
        self._tower, first = None, None
        if vision_keep_mask is not None:
            self._tower = VisionTowerPruner(model, prompt.inputs, tokens, vision_keep_mask, vision_prune_layer)
            first = tokens.prompt_keep_mask(vision_keep_mask)
        self._decoder = VisualTokenPruner(model, tokens.prompt_keep_mask(keep_mask), prune_layer, first)

    def _register(self, stack: ExitStack) -> None:
        for each in (self._tower, self._decoder):
            if each is not None:
                stack.enter_context(each)

    def vision_share(self, chosen: Tensor) -> Tensor | None:
        """The part of the tower's layers that runs, `(batch,)`, where only the `chosen` samples of the batch run."""
        if self._tower is None:
            return None
        share = torch.zeros(len(chosen), dtype=torch.float64)
        share[chosen.cpu()] = self._tower.share
        return share
