"""The large model's vision tower without its decoder: what vLLM is sent instead of pixels.

It runs in the process of the small model. The pixels are there already, whole tiles that nobody looks at are not
encoded at all, and only the features of kept tokens go to the engine, which needs no tower of its own.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transformers_sgl.hooks.vision_tower_pruner import VisionTowerPruner
from transformers_sgl.prompt import Prompt

__all__ = ["image_features", "tower_device_map"]


def tower_device_map(model: PreTrainedModel, device: str | torch.device) -> dict[str, Any]:
    """A `device_map` that loads everything of a model but its decoder, whose weights stay in their files."""
    named = {module: name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    decoder = [named[each] for each in (model.get_decoder(), head) if each is not None]
    placed: dict[str, Any] = {}

    def place(prefix: str, module: nn.Module) -> None:
        placed.update({f"{prefix}{name}": device for name, _ in module.named_parameters(recurse=False)})
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if any(each.startswith(f"{path}.") for each in decoder):
                place(f"{path}.", child)
            else:
                placed[path] = "disk" if path in decoder else device

    place("", model)
    return placed


@torch.no_grad()
def image_features(
    large: PreTrainedModel,
    prompt: Prompt,
    keep_mask: Tensor,
    vision_keep_mask: Tensor | None = None,
    vision_prune_layer: int | None = None,
) -> list[Tensor]:
    """What the decoder would be given for the kept visual tokens of each prompt.

    Args:
        large (`PreTrainedModel`): The large model, of which only the vision tower needs weights.
        prompt ([`Prompt`]): The prompts, with the pixels of their images.
        keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`): `True` for the tokens that are kept.
        vision_keep_mask (`Tensor` of shape `(batch, num_visual_tokens)`, *optional*): `True` for those that the tower
            encodes; by default all.
        vision_prune_layer (`int`, *optional*): The tower's first layer that sees fewer patches.

    Returns:
        `list` of `Tensor` of shape `(num_kept, width)`: One for each prompt; with deepstack, `width` is a multiple of
        the decoder's.
    """
    tokens = prompt.visual_tokens
    encode = large.base_model.get_image_features
    device = next(each.device for each in large.parameters() if each.device.type != "meta")
    inputs = {
        name: prompt.inputs[name].to(device) if isinstance(prompt.inputs[name], Tensor) else prompt.inputs[name]
        for name in inspect.signature(encode).parameters
        if prompt.inputs.get(name) is not None
    }
    with ExitStack() as stack:
        if vision_keep_mask is not None:
            pruner = VisionTowerPruner(large, prompt.inputs, tokens, vision_keep_mask, vision_prune_layer)
            stack.enter_context(pruner)
        output = encode(**inputs, return_dict=True)
    features = _rows(output.pooler_output)
    levels = getattr(output, "deepstack_features", None)
    if levels is not None:
        features = torch.cat([features, *map(_rows, levels)], dim=1)
    chosen = keep_mask.to(tokens.valid.device)[tokens.valid].to(features.device)
    if len(features) != len(chosen):
        raise ValueError(
            f"The prompts have {len(chosen)} visual tokens, but the vision tower makes {len(features)} of the pixels: "
            "pass the images that the prompts speak of, once each."
        )
    return list(features[chosen].cpu().split((keep_mask & tokens.valid).sum(dim=1).tolist()))


def _rows(features: Any) -> Tensor:
    """The features of all images under each other, `(num_visual_tokens, width)`."""
    if isinstance(features, (list, tuple)):
        return torch.cat([_rows(each) for each in features])
    rows: Tensor = features.flatten(0, -2)
    return rows
