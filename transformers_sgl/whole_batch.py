"""What the caller's own objects see while a model runs: the batch that was passed, whatever the model reads of it.

Samples that exit early leave the batch, padding is dropped or moves to the other side, and a small model of another
family reads another prompt. Streamers, logits processors, stopping criteria and `prefix_allowed_tokens_fn` see none of
that: for them there are always all samples, in their order, and the prompts as they were passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

__all__ = ["WholeBatch", "WholeBatchStreamer", "copied"]

# The arguments of `generate` that hold the caller's own objects.
_OWN_OBJECTS = ("logits_processor", "prefix_allowed_tokens_fn", "stopping_criteria")
# What such an object may hold that is not its own state.
_SHARED = (nn.Module, PreTrainedTokenizerBase, Event)


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the caller's own objects among the arguments of `generate`, so that a draft does not use them up.

    Models, tokenizers and events that they hold are not copied. Raises `ValueError` if one cannot be copied.
    """
    copies = {}
    for name in _OWN_OBJECTS:
        own = arguments.get(name)
        if own is None:
            continue
        objects = own if isinstance(own, list) else [own]
        held = [part for each in objects for part in getattr(each, "__dict__", {}).values()]
        memo = {id(part): part for part in held if isinstance(part, _SHARED)}
        try:
            copies[name] = deepcopy(own, memo)
        except Exception as error:  # whatever stands in the way of a copy
            raise ValueError(
                f"An early exit needs a copy of `{name}` for the small model's answer, which cannot be made "
                f"({type(error).__name__}: {error}): leave it out, or pass `early_exit_threshold=None`, which never "
                "exits, and leave out `confirmation_threshold`."
            ) from error
    return copies


@dataclass(frozen=True)
class WholeBatch:
    """A batch as it was passed, and which of its samples a model runs.

    Attributes:
        prompts (`Tensor` of shape `(batch, prompt_length)`): The prompts as they were passed.
        runs (`Tensor` of shape `(batch,)`): `True` for the samples that the model runs.
        early (`Tensor` of shape `(batch, early_length)`): The answers of those that it does not run.
        pad_token_id (`int`): What stands behind an answer.
    """

    prompts: Tensor
    runs: Tensor
    early: Tensor
    pad_token_id: int

    @classmethod
    def of_all(cls, prompts: Tensor) -> WholeBatch:
        """A batch whose samples all run."""
        return cls(prompts, torch.ones_like(prompts[:, 0], dtype=torch.bool), prompts[:, :0], 0)

    def sequences(self, answers: Tensor) -> Tensor:
        """Prompts and answers of all samples, given the answers so far of those that run; `(num_running, length)`."""
        written = self.prompts.new_full((len(self.prompts), answers.shape[1]), self.pad_token_id)
        early = self.early[:, : answers.shape[1]]
        written[:, : early.shape[1]] = early
        return torch.cat([self.prompts, self.rows(answers.to(written.device), written)], dim=1).to(answers.device)

    def rows(self, running: Tensor, others: Tensor | float = 0) -> Tensor:
        """One row for every sample, given those of the samples that run, of shape `(num_running, ...)`."""
        whole = running.new_empty(len(self.runs), *running.shape[1:])
        whole[:] = others
        whole[self.runs.to(whole.device)] = running
        return whole

    def shown(self, own: dict[str, Any], prompt_length: int) -> dict[str, Any]:
        """All the caller's objects of a call, by argument, for a model whose prompts have `prompt_length` tokens."""
        makers = {"logits_processor": self.processor, "stopping_criteria": self.criterion}
        return {
            name: [makers[name](each, prompt_length) for each in objects]
            if name in makers
            else self.function(objects, prompt_length)
            for name, objects in own.items()
        }

    def criterion(self, own: Any, prompt_length: int) -> StoppingCriteria:
        """A stopping criterion of the caller, for a model whose prompts have `prompt_length` tokens."""
        return _ShownCriterion(own, self, prompt_length)

    def processor(self, own: Any, prompt_length: int) -> LogitsProcessor:
        """A logits processor of the caller, for a model whose prompts have `prompt_length` tokens."""
        return _ShownProcessor(own, self, prompt_length)

    def function(
        self, allowed: Callable[[int, Tensor], list[int]], prompt_length: int
    ) -> Callable[[int, Tensor], list[int]]:
        """A `prefix_allowed_tokens_fn` of the caller, for a model whose prompts have `prompt_length` tokens."""
        numbers = self.runs.nonzero()[:, 0].tolist()

        def shown(number: int, sequence: Tensor) -> list[int]:
            prompt = self.prompts[numbers[number]].to(sequence.device)
            return allowed(numbers[number], torch.cat([prompt, sequence[prompt_length:]]))

        return shown


class _Shown:
    """One of the caller's own objects and what it sees."""

    def __init__(self, own: Any, batch: WholeBatch, prompt_length: int) -> None:
        self._own, self._batch, self._prompt_length = own, batch, prompt_length

    def __getattr__(self, name: str) -> Any:  # `generate` recognizes an end-of-sequence criterion by its attribute
        return getattr(self.__dict__["_own"], name)

    def _sequences(self, input_ids: Tensor) -> Tensor:
        return self._batch.sequences(input_ids[:, self._prompt_length :])


class _ShownProcessor(_Shown, LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores that the caller's processor makes of those of all samples, which are 0 for those not running."""
        processed: Tensor = self._own(self._sequences(input_ids), self._batch.rows(scores))
        return processed[self._batch.runs.to(processed.device)]


class _ShownCriterion(_Shown, StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Which of the running samples the caller's criterion ends."""
        if isinstance(scores, tuple):
            scores = tuple(map(self._batch.rows, scores))
        ends = self._own(self._sequences(input_ids), scores, **kwargs)
        if isinstance(ends, Tensor) and ends.shape[:1] == self._batch.runs.shape:
            return ends[self._batch.runs.to(ends.device)]
        return ends


class WholeBatchStreamer:
    """Passes the whole batch on to a streamer, though the large model runs only a part of it."""

    def __init__(self, streamer: Any, batch: WholeBatch) -> None:
        self._streamer = streamer
        self._early = batch.early.cpu()
        self._is_early = ~batch.runs.cpu()
        self._pad_token_id = batch.pad_token_id
        self._step = -1  # the large model first puts its prompts
        streamer.put(batch.prompts.cpu())

    def put(self, value: Tensor) -> None:
        """Passes on one token of every sample, given those of the samples that the large model runs; `(num_late,)`."""
        if self._step >= 0:
            self._streamer.put(self._column(value))
        self._step += 1

    def end(self) -> None:
        """Passes on the rest of the early answers, and the end."""
        nothing = torch.full((int((~self._is_early).sum()),), self._pad_token_id)
        self._step = max(self._step, 0)
        while self._step < self._early.shape[1]:
            self.put(nothing)
        self._streamer.end()

    def _column(self, late: Tensor) -> Tensor:
        column = torch.full(self._is_early.shape, self._pad_token_id)
        column[~self._is_early] = late.cpu()
        if self._step < self._early.shape[1]:
            column[self._is_early] = self._early[self._is_early, self._step]
        return column
