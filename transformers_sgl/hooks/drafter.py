"""Letting the small model go on writing, from any point of its answers.

After its own answer the small model has its cache still. A [`Drafter`] cuts that back to what the answers of the large
model have in common with it, reads what they have instead, and writes a few tokens more. No hook is needed: it makes
plain calls of the model, with the positions and masks that a decoding loop would have made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, LogitsProcessorList, PreTrainedModel

from transformers_sgl.architectures import check_supported, visual_token_ids
from transformers_sgl.batching import without_placeholders
from transformers_sgl.hooks.context import at_once, outside
from transformers_sgl.hooks.kept_tokens import KeptTokens
from transformers_sgl.tokens.vocabulary import Vocabularies
from transformers_sgl.transformers_interface import cache_name, is_plain_layer, keep_columns
from transformers_sgl.whole_batch import WholeBatch

__all__ = ["Drafter", "InOtherTokens"]

_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass(frozen=True)
class Drafter:
    """A small model that has read a batch of prompts and answered them.

    Attributes:
        small (`PreTrainedModel`): The small model.
        prompts (`Tensor` of shape `(batch, small_prompt_length)`): Its prompts, padded on the left.
        cache (`Cache`): Its keys and values of the prompts and of what it has written and read.
        read (`Tensor` of shape `(batch, num_read)`): The tokens that the cache holds behind the prompts, on the CPU.
        processors (`LogitsProcessorList`): The rules of its answers.
        ends (`tuple` of `int`): The tokens that end an answer.
        arguments (`dict`): Further arguments of its `forward`.
        positions (`Tensor` of shape `(..., batch, 1)`, *optional*): The positions of the prompts' last tokens.
        mask (`Tensor` of shape `(batch, num_columns)`, *optional*): `True` for the cache's columns of the prompts that
            are tokens.
        token_types (`dict`): By argument, the mark of an answer's tokens.
        confidence_threshold (`float`): A round ends where no sample's newest token is at least so probable.
    """

    small: PreTrainedModel
    prompts: Tensor
    cache: Cache
    read: Tensor
    processors: LogitsProcessorList
    ends: tuple[int, ...]
    arguments: dict[str, Any]
    positions: Tensor | None
    mask: Tensor | None
    token_types: dict[str, int]
    confidence_threshold: float = 0.4

    @classmethod
    def after(
        cls,
        small: PreTrainedModel,
        inputs: dict[str, Any],
        cache: Cache | None,
        written: Tensor,
        processors: LogitsProcessorList,
        ends: Sequence[int],
        max_new_tokens: int,
    ) -> Drafter | None:
        """Goes on after a `generate` call; `None` where its cache cannot be cut back.

        `inputs` are those of the model's first pass, and `written`, `(batch, length)`, are its answers, whose last
        token it has not read; answers have at most `max_new_tokens`.
        """
        limit = inputs["input_ids"].shape[1] + max_new_tokens
        if cache is None or not all(is_plain_layer(layer, limit) for layer in cache.layers):
            return None
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return None
        positions, batch = inputs.get("position_ids"), len(written)
        answer_type = check_supported(small.config).answer_token_type
        return cls(
            small,
            inputs["input_ids"],
            cache,
            written[:, :-1].cpu(),
            processors,
            tuple(ends),
            {name: value for name, value in inputs.items() if isinstance(value, bool | int) and value is not None},
            None if positions is None else positions[..., -1:].expand(*positions.shape[:-2], batch, 1),
            None if mask is None else mask.bool(),
            {name: answer_type or 0 for name in _TOKEN_TYPES if inputs.get(name) is not None},
        )

    def pruned(self, keep_mask: Tensor) -> Drafter:
        """The same with a cache that holds only the prompts' tokens of a `(batch, small_prompt_length)` mask.

        The cache itself is shortened, so what was before is used up.
        """
        if self.positions is None:  # the model would count positions from the shorter cache
            return self
        kept = KeptTokens.from_mask(keep_mask.to(self.prompts.device))
        if kept.num_dropped == 0:
            return self
        keep_columns(self.cache, kept.positions, kept.prompt_length)
        return replace(self, mask=kept.valid)

    def select(self, chosen: Tensor) -> Drafter:
        """That of the samples that are `chosen`, `(batch,)`; what was before is used up."""
        if bool(chosen.all()):
            return self
        rows = chosen.to(self.prompts.device).nonzero()[:, 0]
        # Rules may know something of each sample, by its number in the batch that they were made for.
        whole = WholeBatch(self.prompts, chosen.to(self.prompts.device), self.prompts[:, :0], 0)
        shown = [whole.processor(each, self.prompts.shape[1]) for each in self.processors]
        self.cache.batch_select_indices(rows)
        return replace(
            self,
            prompts=self.prompts[rows],
            read=self.read[chosen.cpu()],
            processors=LogitsProcessorList(shown),
            positions=None if self.positions is None else self.positions[..., rows, :],
            mask=None if self.mask is None else self.mask[rows],
        )

    def go_on(self, answers: Sequence[list[int] | None], length: int) -> list[list[int]]:
        """What the small model writes behind each answer; nothing behind those that are `None`.

        Samples go on together, up to `length` tokens behind the shortest answer, so a longer one gets fewer. An
        answer's own tokens count, whatever the small model would have written. A draft ends with an end of sequence.
        While another thread uses the small model, there are no drafts.
        """
        running = [each for each in answers if each is not None]
        shortest = min(map(len, running), default=0)
        if not shortest or length < 1:  # the logits behind the prompts are not kept
            return [[] for _ in answers]
        given = torch.zeros(len(answers), max(shortest + length, *map(len, running)), dtype=torch.long)
        lengths = torch.zeros(len(answers), dtype=torch.long)
        for row, answer in enumerate(answers):
            answer = answer or []
            given[row, : len(answer)] = torch.tensor(answer, dtype=torch.long)
            lengths[row] = len(answer)
        given = given[:, : shortest + length]
        is_running = torch.tensor([each is not None for each in answers])
        with at_once(self.small) as is_free, outside():
            if not is_free:  # the large model had better go on alone than wait for another call's guidance
                return [[] for _ in answers]
            written = self._write(given, lengths.clamp(max=given.shape[1]), is_running, shortest)
        drafts = [
            [] if answer is None else row[len(answer) :] for answer, row in zip(answers, written.tolist(), strict=True)
        ]
        return [self._ended(each) for each in drafts]

    def _write(self, given: Tensor, lengths: Tensor, is_running: Tensor, shortest: int) -> Tensor:
        """Answers, `(batch, length)`, whose first `lengths` tokens are `given` and whose others are written."""
        start = self._cut_back(given[is_running][:, : shortest - 1], is_running)
        device = self.prompts.device
        placeholders = list(visual_token_ids(self.small.config))
        known_tokens = getattr(self.small.get_input_embeddings(), "weight", given).shape[0]
        given = given.masked_fill(given >= known_tokens, 0)  # added to the large model alone
        tokens, known = given.to(device), lengths.to(device)
        is_running, end = is_running.to(device), given.shape[1]
        for column in range(shortest, given.shape[1]):
            scores = self._read(without_placeholders(tokens[:, start:column], placeholders), start)
            start = column
            if self.processors:
                scores = self.processors(torch.cat([self.prompts, tokens[:, :column]], dim=1), scores)
            newest = torch.where(column < known, tokens[:, column], scores.argmax(dim=-1))
            tokens[:, column] = newest
            if column + 1 < end and self.confidence_threshold > 0:
                probability = scores.float().softmax(dim=-1).gather(1, newest[:, None])[:, 0]
                goes_on = (probability >= self.confidence_threshold) | (column < known)
                if not bool((goes_on & is_running).any()):
                    end = column + 1
                    break
        written = tokens[:, :end].cpu()
        object.__setattr__(self, "read", without_placeholders(written[:, :start], placeholders))
        return written

    def _cut_back(self, given: Tensor, is_running: Tensor) -> int:
        """Removes from the cache what is not in the `given` answers, `(num_running, length)`; returns what is left."""
        read = self.read[is_running]
        length = min(read.shape[1], given.shape[1])
        agrees = (read[:, :length] == given[:, :length]).all(dim=0)
        common = int(agrees.long().cumprod(dim=0).sum())
        if common < self.read.shape[1]:
            self.cache.crop(common - self.read.shape[1])
        return common

    def _read(self, tokens: Tensor, start: int) -> Tensor:
        """The logits behind further tokens, `(batch, num_tokens)`, of which `start` have been read before."""
        batch, number = tokens.shape
        arguments: dict[str, Any] = dict(self.arguments)
        if self.positions is not None:
            new = torch.arange(start + 1, start + 1 + number, device=self.positions.device)
            arguments["position_ids"] = self.positions + new
        if self.mask is not None:
            since = self.mask.new_ones(batch, start + number)
            arguments["attention_mask"] = torch.cat([self.mask, since], dim=1).long()
        for name, mark in self.token_types.items():
            arguments[name] = torch.full_like(tokens, mark)
        if "logits_to_keep" in arguments:
            arguments["logits_to_keep"] = 1
        logits: Tensor = self.small(input_ids=tokens, **arguments, **{cache_name(): self.cache}).logits
        return logits[:, -1]

    def _ended(self, draft: list[int]) -> list[int]:
        """A draft without what follows its end of sequence."""
        end = next((index for index, token in enumerate(draft) if token in self.ends), len(draft))
        return draft[: end + 1]


@dataclass(frozen=True)
class InOtherTokens:
    """A drafter for answers in the tokens of a large model that has another vocabulary.

    Attributes:
        drafter ([`Drafter`]): Drafts in the small model's tokens.
        vocabularies ([`Vocabularies`]): Both models' tokenizers.
    """

    drafter: Drafter
    vocabularies: Vocabularies

    def go_on(self, answers: Sequence[list[int] | None], length: int) -> list[list[int]]:
        """As [`Drafter.go_on`], where `length` counts the small model's tokens."""
        theirs = [None if each is None else self.vocabularies.in_small(each) for each in answers]
        return [
            [] if answer is None or small is None or not draft else self.vocabularies.go_on(answer, small, draft)
            for answer, small, draft in zip(answers, theirs, self.drafter.go_on(theirs, length), strict=True)
        ]
