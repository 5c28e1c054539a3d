"""CDPruner: visual tokens that matter for the instruction and differ from each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from transformers_sgl.evaluation.methods.base import Batch, Pair, Setting
from transformers_sgl.evaluation.methods.guides import FeatureRanker, Guide
from transformers_sgl.tokens.visual_tokens import VisualTokens

__all__ = ["CDPruner", "conditional_diversity", "instruction_relevance"]

# Added to the relevance before it is normalised, as in the authors' code: the least relevant token can be chosen, too.
_LEAST = 1e-6
# What is left of a token's unit length, squared, once it counts as a combination of those that are chosen.
_DEPENDENT = 1e-5


@dataclass(frozen=True)
class CDPruner(Guide):
    """Keeps the tokens that maximise conditional diversity (arXiv 2506.10967), from the decoder's first layer on.

    A conditional determinantal point process with the kernel `relevance x cosine similarity x relevance`, of which the
    most probable choice is sought greedily. The similarity is that of the features that enter the decoder.

    The relevance is the mean cosine similarity of a visual token to the tokens of the instruction, min-max normalised.
    For LLaVA the authors take it from CLIP, whose vision tower it has, with the text tower of CLIP's own checkpoint
    (and with the opposite sign, which only CLIP needs). Checkpoints in transformers hold no such text tower, and most
    vision towers never had one. So this is the variant for models without: the projected visual tokens are compared
    with the language model's own embeddings of the instruction, which is the question without the chat template.

    The authors choose within each tile, as many tokens of each. Here the tokens of the whole prompt share the budget,
    as with the other methods.
    """

    # How much relevance weighs against diversity, from 0 to less than 1; by default as it is. With it the kernel's
    # relevance is exp(weight / (2 * (1 - weight)) * relevance), the authors' option, so that no token is ruled out.
    weight: float | None = None

    def setting(self, setting: Setting) -> Setting:
        return setting.from_layer(0)

    @contextmanager
    def rank(
        self, pair: Pair, batch: Batch, inputs: Any, tokens: VisualTokens, setting: Setting
    ) -> Iterator[Callable[[], Tensor]]:
        tokenizer = getattr(pair.processor.large_processor, "tokenizer", pair.processor.large_processor)
        instructions = [tokenizer(sample.prompt, add_special_tokens=False)["input_ids"] for sample in batch.samples]
        order = partial(self._order, pair.model.large, instructions, tokens.valid, setting.retention_ratio)
        with FeatureRanker(pair.model.large, tokens, order) as ranker:
            yield lambda: ranker.ranking

    def _order(
        self, model: Any, instructions: list[list[int]], valid: Tensor, retention_ratio: float, features: Tensor
    ) -> Tensor:
        """The ranking for the token ids of each sample's instruction."""
        ids = pad_sequence([torch.tensor(each, dtype=torch.long) for each in instructions], batch_first=True)
        lengths = torch.tensor([len(each) for each in instructions])
        embeddings = model.get_input_embeddings()
        text = embeddings(ids.to(next(embeddings.parameters()).device)).to(features.device)
        valid = valid.to(features.device)
        relevance = instruction_relevance(features, valid, text, lengths.to(features.device))
        if self.weight is not None:
            relevance = torch.exp(self.weight / (2 * (1 - self.weight)) * relevance)
        return conditional_diversity(features, valid, relevance, retention_ratio)


def instruction_relevance(features: Tensor, valid: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    """The mean cosine similarity to an instruction's tokens, from 0 to 1 over a sample: `(batch, num_visual_tokens)`.

    Args:
        features: Those of the visual tokens, `(batch, num_visual_tokens, width)`.
        valid: `True` for a token, `False` for padding, `(batch, num_visual_tokens)`.
        text: The instructions' embeddings, `(batch, num_text_tokens, width)`.
        lengths: How many of these are of the instruction; the others come behind. `(batch,)`.
    """
    is_text = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
    # The mean of cosines is the cosine to the mean of unit vectors, but for its length.
    mean = (normalize(text.float(), dim=-1) * is_text[..., None]).sum(dim=1) / lengths.clamp(min=1)[:, None]
    similarity = (normalize(features.float(), dim=-1) @ mean[..., None])[..., 0]
    low = similarity.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    high = similarity.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    relevance = (similarity - low + _LEAST) / (high - low).clamp(min=_LEAST)
    return relevance.masked_fill(~valid, 0.0)


def conditional_diversity(features: Tensor, valid: Tensor, relevance: Tensor, retention_ratio: float = 1.0) -> Tensor:
    """Ranks visual tokens, `(batch, num_visual_tokens)`, in the order in which greedy MAP inference chooses them.

    Each next token is the one with which the determinant of the chosen tokens' kernel is greatest. Its gain is the
    square of its relevance times what is left of its unit feature beside those that are chosen, so that is what is
    kept up to date (the incremental Cholesky factorisation of arXiv 1709.05135). Features of some width are
    combinations of so many others: from there on every determinant is 0, and the most relevant tokens follow. Those
    beyond the `retention_ratio` get 0.

    `features` has the shape `(batch, num_visual_tokens, width)`; the others are `(batch, num_visual_tokens)`.
    """
    unit = normalize(features.float(), dim=-1)
    similarity = unit @ unit.transpose(1, 2)  # (batch, num_visual_tokens, num_visual_tokens)
    batch_size, number = valid.shape
    rows = torch.arange(batch_size, device=unit.device)
    left, rank = valid.clone(), torch.zeros_like(relevance)
    remaining = similarity.diagonal(dim1=1, dim2=2).clone()
    num_steps = max(1, math.ceil(retention_ratio * number))
    factors = unit.new_zeros(batch_size, num_steps, number)
    for step in range(num_steps):
        gain = relevance.square() * remaining
        # These gains are negative, so the dependent ones come last.
        gain = torch.where(remaining > _DEPENDENT, gain, -1 / (relevance + _LEAST)).masked_fill(~left, -torch.inf)
        chosen = gain.argmax(dim=1)
        is_left = left[rows, chosen]
        rank[rows, chosen] = torch.where(is_left, float(number - step), rank[rows, chosen])
        left[rows, chosen] = False
        before = factors[:, :step]
        explained = (before[rows, :, chosen][:, None] @ before)[:, 0]
        own = remaining[rows, chosen]
        adds = is_left & (own > _DEPENDENT)
        factor = (similarity[rows, chosen] - explained) * own.clamp(min=_DEPENDENT).rsqrt()[:, None]
        factors[:, step] = factor * adds[:, None]
        remaining = remaining - factors[:, step].square()
    return rank
