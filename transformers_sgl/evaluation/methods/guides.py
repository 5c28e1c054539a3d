"""Guides without a small model: each ranks the large model's visual tokens in its own way.

A new guide is a dataclass here with a method `importance`, or `rank` if it has to watch the large model run, and a
line in [`METHODS`].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from transformers_sgl.architectures import decoder, visual_tokens_of
from transformers_sgl.evaluation.methods.base import Answer, Batch, Method, Pair, Setting
from transformers_sgl.generation_config_sgl import SGLGenerationConfig, average_retention
from transformers_sgl.hooks.attention_recorder import AttentionRecorder
from transformers_sgl.hooks.context import HookContext
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.tokens.importance_process import ImportanceProcessorList
from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = ["DivPrune", "FastV", "FeatureRanker", "Guide", "Oracle", "Random", "max_min_diversity"]


class Guide(Method):
    """A method that ranks the large model's visual tokens; the large model keeps the best ones.

    A subclass says how: by [`importance`] before the large model runs, or by [`rank`] while it does.
    """

    @contextmanager
    def rank(
        self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens, setting: Setting
    ) -> Iterator[Callable[[], Tensor]]:
        """Watches the large model run; yields a function that gives the importance.

        The function is called when the prefill reaches the prune layer.
        """
        importance = self.importance(pair, batch, inputs, tokens)
        yield lambda: importance

    def importance(self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens) -> Tensor:
        """The importance of every visual token, `(batch, num_visual_tokens)`, before the large model runs."""
        raise NotImplementedError(f"{type(self).__name__} gives no importance.")

    def setting(self, setting: Setting) -> Setting:
        """Where this guide prunes; by default where all do."""
        return setting

    def facts(self, setting: Setting) -> dict[str, Any]:
        setting = self.setting(setting)
        return {"retention_ratio": setting.retention_ratio, "prune_layer": setting.prune_layer}

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        large, processor = pair.model.large, pair.processor.large_processor
        setting = self.setting(setting)
        inputs = pair.inputs(processor, batch.samples, batch.images)
        tokens = visual_tokens_of(large.config, inputs)
        # As in the pair's own `generate`.
        settings = SGLGenerationConfig().resolved(pair.model.generation_config)
        choose = ImportanceProcessorList.of_settings(setting.retention_ratio, settings.min_tokens_per_image)
        kept: list[Tensor] = []
        with ExitStack() as stack:
            importance = stack.enter_context(self.rank(pair, batch, inputs, tokens, setting))

            def keep_mask() -> Tensor:
                kept.append(choose.keep_mask(tokens, importance().float()))
                return tokens.prompt_keep_mask(kept[0])

            stack.enter_context(VisualTokenPruner(large, keep_mask, setting.prune_layer))
            answers = pair.write(large, processor, inputs)
        counts = zip(kept[0].sum(dim=1).tolist(), tokens.counts.clamp(min=1).tolist(), strict=True)
        return [
            Answer(text, length, average_retention(num_kept / number, setting.prune_layer, setting.num_layers))
            for (text, length), (num_kept, number) in zip(answers, counts, strict=True)
        ]


@dataclass(frozen=True)
class Random(Guide):
    """Keeps visual tokens at random: the baseline that every guide has to beat."""

    def importance(self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens) -> Tensor:
        draws = [np.random.default_rng([pair.seed, index]).random(tokens.num_visual_tokens) for index in batch.indices]
        drawn = torch.tensor(np.stack(draws), dtype=torch.float32, device=tokens.valid.device)
        return drawn * tokens.valid


@dataclass(frozen=True)
class FastV(Guide):
    """The large model ranks its own tokens by what the prompt's last token attends to early on (arXiv 2403.06764).

    The attention is that of the layer before the prune layer, summed over its heads. It is read in the prefill itself,
    so it costs nothing. Where the others prune from the first layer on, FastV prunes the same number of tokens from
    the second, and so processes more.
    """

    def setting(self, setting: Setting) -> Setting:
        if setting.prune_layer > 0:
            return setting
        average = average_retention(setting.retention_ratio, 1, setting.num_layers)
        return Setting(average, 1, setting.num_layers)

    @contextmanager
    def rank(
        self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens, setting: Setting
    ) -> Iterator[Callable[[], Tensor]]:
        before = [setting.prune_layer - 1]
        with AttentionRecorder(pair.model.large, tokens, queries="last", layers=before) as recorder:
            yield lambda: recorder.importance


@dataclass(frozen=True)
class Oracle(Guide):
    """The large model's own attention over all layers, prompt and answer, from an unpruned run beforehand.

    It saves nothing; it is the upper bound for guides of this kind.
    """

    def importance(self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens) -> Tensor:
        with AttentionRecorder(pair.model.large, tokens) as recorder:
            pair.write(pair.model.large, pair.processor.large_processor, inputs)
        return recorder.importance


@dataclass(frozen=True)
class DivPrune(Guide):
    """Keeps the tokens that differ most from each other: max-min diversity (arXiv 2503.02175).

    The distance of two visual tokens is one minus the cosine of the features that enter the decoder. The first token
    is the one farthest from its nearest neighbour; each next one is the farthest from those already chosen.
    """

    # Whether to prune before the first layer, as published, or where the others do, to the same average retention.
    from_first_layer: bool = True

    def setting(self, setting: Setting) -> Setting:
        return setting.from_layer(0) if self.from_first_layer else setting

    @contextmanager
    def rank(
        self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens, setting: Setting
    ) -> Iterator[Callable[[], Tensor]]:
        order = partial(max_min_diversity, valid=tokens.valid, retention_ratio=setting.retention_ratio)
        with FeatureRanker(pair.model.large, tokens, order) as ranker:
            yield lambda: ranker.ranking


class FeatureRanker(HookContext):
    """Ranks visual tokens by the features that enter the decoder; `ranking` is `(batch, num_visual_tokens)`.

    `order` makes it of these features, `(batch, num_visual_tokens, width)`.
    """

    ranking: Tensor

    def __init__(self, model: PreTrainedModel, tokens: VisualTokens, order: Callable[[Tensor], Tensor]) -> None:
        self._decoder = decoder(model)
        self._tokens = tokens
        self._order = order

    def _register(self, stack: ExitStack) -> None:
        self._add_hook(stack, self._decoder.register_forward_pre_hook, self._read, with_kwargs=True)

    def _read(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is not None and not hasattr(self, "ranking"):  # the prefill: answers are read token by token
            places = self._tokens.positions[..., None].to(embeddings.device)
            features = embeddings.take_along_dim(places.expand(-1, -1, embeddings.shape[-1]), dim=1)
            self.ranking = self._order(features)


def max_min_diversity(features: Tensor, valid: Tensor, retention_ratio: float = 1.0) -> Tensor:
    """Ranks visual tokens, `(batch, num_visual_tokens)`, by the order in which max-min diversity chooses them.

    Those beyond the `retention_ratio` get 0. `features` has the shape `(batch, num_visual_tokens, width)`.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    valid = valid.to(unit.device)
    distance = 1 - unit @ unit.transpose(1, 2)  # (batch, num_visual_tokens, num_visual_tokens)
    number, rows = valid.shape[1], torch.arange(valid.shape[0], device=unit.device)
    not_itself = distance.masked_fill(torch.eye(number, dtype=torch.bool, device=unit.device), torch.inf)
    nearest = not_itself.masked_fill(~valid[:, None, :], torch.inf).amin(dim=2)  # to any other token
    left, rank = valid.clone(), torch.zeros_like(nearest)
    for step in range(max(1, math.ceil(retention_ratio * number))):
        chosen = nearest.masked_fill(~left, -torch.inf).argmax(dim=1)
        rank[rows, chosen] = torch.where(left[rows, chosen], float(number - step), rank[rows, chosen])
        left[rows, chosen] = False
        to_chosen = distance[rows, chosen]
        nearest = to_chosen if step == 0 else torch.minimum(nearest, to_chosen)
    return rank
