"""How visual tokens are chosen under the settings of one call: the user's steps, then those of the ratios.

Where the small model is unsure of its answer, it may have looked at the wrong place, and a choice by its importance
drops what matters. With an `unsure_threshold` more is kept of such samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.prompt import Prompt
from transformers_sgl.tokens.importance_process import DROPPED, ImportanceProcessor, ImportanceProcessorList
from transformers_sgl.tokens.selection import decoder_processors
from transformers_sgl.tokens.tile_retention import vision_processors
from transformers_sgl.tokens.visual_tokens import VisualTokens
from transformers_sgl.vision_towers import with_tiles

__all__ = ["choose_tokens", "choosing_processors", "unsure_samples"]

_Own = ImportanceProcessor | Iterable[ImportanceProcessor] | None
_Lists = tuple[ImportanceProcessorList, ImportanceProcessorList]


def unsure_samples(decision_score: Tensor | None, settings: SGLGenerationConfig) -> Tensor | None:
    """The samples whose score is below the settings' threshold, of shape `(batch,)`; `None` without one."""
    if decision_score is None or settings.unsure_threshold is None:
        return None
    return ~(decision_score >= settings.unsure_threshold)  # NaN is unsure


def choosing_processors(
    settings: SGLGenerationConfig, own: _Own = None, own_of_tower: _Own = None, unsure: Tensor | None = None
) -> _Lists:
    """What chooses the visual tokens that the large model's vision tower encodes, and those that its decoder keeps.

    Both are empty where every token is encoded or kept. `own` and `own_of_tower` are the user's processors, of the
    decoder and of the tower; `unsure`, `(batch,)`, is `True` for the samples of which more is kept. Raises
    `ValueError` if one of the user's cannot be called.
    """
    lists = (
        ImportanceProcessorList.of_user("vision_processor", own_of_tower),
        ImportanceProcessorList.of_user("importance_processor", own),
    )
    usual, more = _of_ratios(settings), _of_ratios(settings, settings.unsure_retention_ratio or 1.0)
    for processors, of_sure, of_unsure in zip(lists, usual, more, strict=True):
        if unsure is None or not of_sure:
            processors += of_sure
        else:
            processors.append(_PerSample(unsure, of_unsure, of_sure))
    return lists


def choose_tokens(
    prompt: Prompt,
    importance: Tensor,
    features: Tensor | None,
    of_tower: ImportanceProcessorList,
    of_decoder: ImportanceProcessorList,
) -> tuple[Tensor, Tensor | None]:
    """What a decoder keeps of the visual tokens of some prompts, and what the vision tower encodes.

    Importance and both results have the shape `(batch, num_visual_tokens)`, features one axis more. The second is
    `None` where the tower encodes everything; the first is chosen of what it encodes.
    """
    tokens = replace(prompt.visual_tokens, features=features)
    encoded = None
    if of_tower:
        tokens = with_tiles(prompt.config, prompt.inputs, tokens)
        encoded = of_tower.keep_mask(tokens, importance)
        importance = importance.masked_fill(~encoded, DROPPED)
    return of_decoder.keep_mask(tokens, importance), encoded


def _of_ratios(settings: SGLGenerationConfig, at_least: float = 0.0) -> _Lists:
    """What the settings' ratios ask for, of tower and decoder, where each is at least so much."""
    of_tower = vision_processors(
        max(settings.vision_retention_ratio, at_least), settings.vision_prune_layer is not None
    )
    of_decoder = decoder_processors(
        max(settings.retention_ratio, at_least), settings.min_tokens_per_image, selection=settings.selection
    )
    return of_tower, of_decoder


class _PerSample(ImportanceProcessor):
    """Other processors for the `chosen` samples of a batch, `(batch,)`, than for the rest."""

    def __init__(self, chosen: Tensor, of_chosen: ImportanceProcessorList, of_others: ImportanceProcessorList) -> None:
        self._chosen, self._of_chosen, self._of_others = chosen, of_chosen, of_others
        self.needs_features = of_chosen.needs_features or of_others.needs_features

    def __call__(self, visual_tokens: VisualTokens, importance: Tensor) -> Tensor:
        chosen = self._chosen.to(importance.device)[:, None]
        if not chosen.any():
            return self._of_others(visual_tokens, importance)
        of_chosen = self._of_chosen(visual_tokens, importance)
        return (
            of_chosen if chosen.all() else torch.where(chosen, of_chosen, self._of_others(visual_tokens, importance))
        )
