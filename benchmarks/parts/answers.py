"""Prescribed answers, and drafts of them that are right as often as is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from transformers_sgl.architectures import visual_token_ids
from transformers_sgl.hooks.draft_verifier import DraftVerifier

__all__ = ["Prescribed", "first_draft", "prescribed", "random_answer", "random_draft", "verifier_of"]


class Prescribed(LogitsProcessor):
    """Lets a model write one answer and no other, `(batch, answer_tokens)`."""

    def __init__(self, answer: Tensor, prompt_length: int) -> None:
        self._answer, self._prompt_length = answer, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave no choice."""
        token = self._answer[:, input_ids.shape[1] - self._prompt_length, None]
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def prescribed(model: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int, seed: int = 0) -> dict[str, Any]:
    """The argument of `generate` that makes the model write a random answer."""
    processor = Prescribed(random_answer(model, inputs, answer_tokens, seed), inputs["input_ids"].shape[1])
    return {"logits_processor": LogitsProcessorList([processor])}


def random_answer(model: PreTrainedModel, inputs: dict[str, Tensor], answer_tokens: int, seed: int) -> Tensor:
    """A random answer without special tokens, `(batch, answer_tokens)`."""
    plain = _plain_token_ids(model)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(plain), (len(inputs["input_ids"]), answer_tokens), generator=generator)
    return plain[chosen].to(inputs["input_ids"].device)


def random_draft(
    model: PreTrainedModel, inputs: dict[str, Tensor], length: int, acceptance: float, seed: int
) -> Tensor:
    """The answer, with each token right with this probability and otherwise another; `(batch, length)`."""
    answer = random_answer(model, inputs, length, seed)
    plain = _plain_token_ids(model).to(answer.device)
    generator = torch.Generator().manual_seed(seed + 1)
    wrong = torch.rand(answer.shape, generator=generator).to(answer.device) >= acceptance
    other = plain[(torch.searchsorted(plain, answer) + 1) % len(plain)]
    return torch.where(wrong, other, answer)


def first_draft(
    model: PreTrainedModel, inputs: dict[str, Tensor], length: int, acceptance: float, seed: int
) -> Tensor:
    """[`random_draft`] up to its first wrong token; where a model has left an answer, nothing is right by itself."""
    draft = random_draft(model, inputs, length, acceptance, seed)
    agrees = (draft == random_answer(model, inputs, length, seed)).long().cumprod(dim=1).bool()
    return torch.where(agrees, draft, random_draft(model, inputs, length, 0.0, seed))


def verifier_of(large: PreTrainedModel, draft: Tensor | None) -> DraftVerifier:
    """A verifier of a draft without padding, or of none."""
    return DraftVerifier(large, draft, None if draft is None else torch.ones_like(draft).bool())


def _plain_token_ids(model: PreTrainedModel) -> Tensor:
    """All ids that are neither a placeholder nor something that ends or fills up an answer."""
    special = set(visual_token_ids(model.config))
    for name in ("eos_token_id", "pad_token_id"):
        ids = getattr(model.generation_config, name, None)
        special.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    size = model.config.get_text_config(decoder=True).vocab_size
    return torch.tensor([token for token in range(size) if token not in special])
