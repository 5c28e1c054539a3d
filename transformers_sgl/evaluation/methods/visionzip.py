"""VisionZip: the vision tower's own attention chooses tokens, and the others are merged into a few."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_sgl.evaluation.methods.base import Batch, Pair, Setting
from transformers_sgl.evaluation.methods.guides import Guide
from transformers_sgl.hooks.attention_listening import listen
from transformers_sgl.hooks.attention_rows import AttentionScores, received_attention
from transformers_sgl.hooks.context import HookContext
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.transformers_interface import is_attention
from transformers_sgl.vision_towers import (
    check_tower_prunable,
    encoded_tokens,
    vision_layers,
    with_tiles,
)

__all__ = ["TokenMerger", "VisionZip", "num_contextual", "zip_tokens"]

# Of 64 tokens of a tile the authors choose 54 and merge into 10.
_CONTEXTUAL = 10 / 64


@dataclass(frozen=True)
class VisionZip(Guide):
    """Keeps the tokens that the vision tower attends to, and merges the others into a few (arXiv 2412.04467).

    Within each tile, in the layer of the tower whose output the projector is handed:

    - dominant tokens get the most attention of the class token, or of all patches where there is none;
    - of the others every so many becomes a contextual token: to it are added, averaged, those whose keys (averaged
      over heads) are more similar to its own than to another's. This is what the authors' code does; the projector of
      most models begins with a norm, for which this is the same as an average.

    The contextual tokens stand where they were, and so do the dominant ones; all others are gone from the decoder's
    first layer on. Of 64 tokens, 54 are dominant and 10 contextual, and so in proportion. A token of several patches
    has the mean of their attention and of their keys, and is merged patch by patch. The authors also hand on the class
    token, for which prompts in transformers have no place. The budget of a prompt is divided evenly among its tiles.

    Works on models whose vision tower reads tiles of one size and has been verified for pruning
    (`transformers_sgl.vision_towers`); others are refused.
    """

    # Whether the class token's attention chooses, where there is one, or that of all its tile.
    by_class_token: bool = True

    def setting(self, setting: Setting) -> Setting:
        return setting.from_layer(0)

    @contextmanager
    def rank(
        self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens, setting: Setting
    ) -> Iterator[Callable[[], Tensor]]:
        with self.merger(pair.model.large, inputs, tokens, setting.retention_ratio) as merger:
            yield lambda: merger.kept.float()

    def merger(self, model: PreTrainedModel, inputs: Any, tokens: VisualTokens, retention_ratio: float) -> TokenMerger:
        """What merges in a model's vision tower while it encodes the images of these inputs."""
        return TokenMerger(model, inputs, tokens, retention_ratio, self.by_class_token)


class TokenMerger(HookContext):
    """Merges visual tokens in the vision tower; `kept` tells those that stay, `(batch, num_visual_tokens)`."""

    def __init__(
        self, model: PreTrainedModel, inputs: Any, tokens: VisualTokens, retention_ratio: float, by_class_token: bool
    ) -> None:
        self._layer, self._attention, self._all_attention = _merging_layer(model)
        calls = list(encoded_tokens(model.config, inputs, tokens))
        for call in calls:
            made = call.patches.rows[call.patches.tile >= 0].flatten()
            if call.patches.tile_sizes is not None:
                raise _refused(model.config, "it reads patches of images of all sizes side by side")
            if len(made.unique()) < len(made):
                raise _refused(model.config, "some of its patches stand behind several visual tokens")
        self._by_class_token = by_class_token and calls[0].patches.prefix > 0
        self._calls = cycle(calls)
        self._call = calls[0]
        self._budget = _budget_of_tiles(with_tiles(model.config, inputs, tokens), retention_ratio)
        self._received = self._keys = torch.empty(0)
        self.kept = torch.zeros_like(tokens.valid)

    def _register(self, stack: ExitStack) -> None:
        listen(stack, self, [self._attention], self._all_attention, self._attention.config)
        self._add_hook(stack, self._layer.register_forward_hook, self._merge)

    def record(self, module: nn.Module, query: Tensor, key: Tensor, scores: Callable[[], AttentionScores]) -> None:
        """Notes the attention that rows of the tower get, `(tiles, rows)`, and their keys, `(tiles, rows, width)`."""
        self._call = next(self._calls)
        query = query[:, :, :1] if self._by_class_token else query  # it comes first
        num_queries = query.shape[2]
        weights = torch.ones(query.shape[0], num_queries, device=query.device)
        self._received = received_attention(query, key, scores(), key.shape[2] - num_queries, weights)
        self._keys = key.float().mean(dim=1)

    def _merge(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Layer hook: puts merged tokens where the contextual ones stood."""
        if not isinstance(output, Tensor):
            return (self._merge(layer, args, output[0]), *output[1:])
        hidden = output.flatten(0, -2).clone()  # (num_rows, width)
        received, keys = self._received.flatten(), self._keys.flatten(0, 1)
        places, patches = self._call.places.to(hidden.device), self._call.patches.to(hidden.device)
        budget = self._budget.to(hidden.device)[tuple(places.T)]
        # The tokens tile by tile, and of all tiles with as many tokens and the same budget at once.
        tokens = torch.argsort(patches.tile, stable=True)[int((patches.tile < 0).sum()) :]
        _, sizes = patches.tile[tokens].unique_consecutive(return_counts=True)
        first = sizes.cumsum(0) - sizes
        kinds = torch.stack([sizes, budget[tokens[first]]], dim=1)
        for size, num_kept in kinds.unique(dim=0).tolist():
            of_kind = first[(kinds == kinds.new_tensor([size, num_kept])).all(dim=1)]
            chosen = tokens[of_kind[:, None] + torch.arange(size, device=of_kind.device)]  # (tiles, size)
            rows = patches.rows[chosen]  # (tiles, size, patches_per_token)
            kept, merged = zip_tokens(received[rows].mean(dim=2), keys[rows].mean(dim=2), hidden[rows], num_kept)
            hidden[rows] = merged
            self.kept[tuple(places[chosen[kept]].to(self.kept.device).T)] = True
        return hidden.view(output.shape)


def zip_tokens(attention: Tensor, keys: Tensor, features: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Chooses dominant tokens of each tile, and merges the others into contextual ones.

    Args:
        attention: What each token gets, `(tiles, num_tokens)`.
        keys: Its key, `(tiles, num_tokens, head_dim)`.
        features: What is merged, `(tiles, num_tokens, ...)`.
        num_kept: How many tokens of a tile stay.

    Returns:
        Which stay, `(tiles, num_tokens)`, and the features, with those of the contextual tokens merged.
    """
    num_tiles, number = attention.shape
    kept = torch.zeros_like(attention, dtype=torch.bool)
    num_kept = min(num_kept, number)
    num_merged = num_contextual(num_kept)
    dominant = attention.argsort(dim=1, descending=True, stable=True)[:, : num_kept - num_merged]
    kept.scatter_(1, dominant, True)
    rest = (~kept).nonzero()[:, 1].view(num_tiles, -1)  # in the order of the image
    if num_merged == 0:
        return kept, features
    step = rest.shape[1] // num_merged
    places = torch.arange(rest.shape[1], device=rest.device)
    is_target = (places % step == 0) & (places < step * num_merged)
    targets, others = rest[:, is_target], rest[:, ~is_target]
    kept.scatter_(1, targets, True)
    tile = torch.arange(num_tiles, device=rest.device)[:, None]
    unit = normalize(keys, dim=-1)
    nearest = (unit[tile, others] @ unit[tile, targets].transpose(1, 2)).argmax(dim=2)  # (tiles, others)
    belongs = one_hot(nearest, num_merged).to(features.dtype)  # (tiles, others, targets)
    counts = belongs.sum(dim=1).clamp(min=1)[..., None]
    means = belongs.transpose(1, 2) @ features[tile, others].flatten(2) / counts
    merged = features.clone()
    merged[tile, targets] += means.view(num_tiles, num_merged, *features.shape[2:])
    return kept, merged


def num_contextual(num_kept: int) -> int:
    """How many of the tokens that stay are contextual: one at least where there are two."""
    return max(1, round(num_kept * _CONTEXTUAL)) if num_kept > 1 else 0


def _budget_of_tiles(tokens: VisualTokens, retention_ratio: float) -> Tensor:
    """How many tokens of its tile stay, for every visual token; `(batch, num_visual_tokens)`."""
    assert tokens.tile_index is not None
    total = torch.floor(tokens.counts.double() * retention_ratio).long().clamp(min=1)[:, None]
    tile = tokens.tile_index
    number = tile.amax(dim=1, keepdim=True) + 1
    return (tile + 1) * total // number.clamp(min=1) - tile * total // number.clamp(min=1)


def _merging_layer(model: PreTrainedModel) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    """The layer of the vision tower whose output is handed on, its attention, and that of all layers."""
    try:
        check_tower_prunable(model.config)
    except ValueError as error:
        raise _refused(model.config, "nothing tells which of its patches stand behind a visual token") from error
    layers = vision_layers(model)
    names = ("vision_feature_layer", "vision_feature_layers")  # the second of several, with older transformers
    index = next((getattr(model.config, name) for name in names if hasattr(model.config, name)), -1)
    if not isinstance(index, int):
        raise _refused(model.config, "its projector reads several of its layers")
    # Before the first layer's output there is what enters it.
    layer = layers[index if index < 0 else index - 1]
    attention = [module for module in layers.modules() if is_attention(module)]
    own = [module for module in layer.modules() if is_attention(module)]
    if len(own) != 1:
        raise _refused(model.config, "its layers have no attention, or several")
    return layer, own[0], attention


def _refused(config: PreTrainedConfig, reason: str) -> ValueError:
    return ValueError(
        f"VisionZip cannot merge in the vision tower of this {config.model_type!r} model, because {reason}: leave "
        "visionzip out of `methods`."
    )
