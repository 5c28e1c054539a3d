"""One batch of answers, written along drafts: what was read ahead, what of it is right, and what to read next.

Pure bookkeeping on the CPU; the model itself is run by the [`DraftVerifier`].
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from transformers_sgl.batching import pad_rows, without_placeholders
from transformers_sgl.tokens.draft_length import MOST, DraftLength
from transformers_sgl.transformers_interface import next_token_output

__all__ = ["AnswerRun", "GoesOn"]


class GoesOn(Protocol):
    """What drafts anew, from any point of the answers; see [`Drafter.go_on`]."""

    def go_on(self, answers: Sequence[list[int] | None], length: int) -> list[list[int]]:
        """What follows each answer, as far as `length` tokens behind the shortest one."""


class AnswerRun:
    """One batch of answers, written along its drafts.

    Step `k` chooses the answers' token `k`. A pass that reads the answers up to their token `k - 1`, and the drafts
    after that, knows the logits of step `k` and of the steps after it, for as long as the answers follow the drafts.

    Where the answers have left their first drafts, a `drafter` goes on from what they have become. A sample whose
    logits reach further than another's does not lose them: what they say it will write is its next draft.

    Attributes:
        num_chosen (`int`): The tokens of each answer so far.
        num_accepted (`Tensor` of shape `(batch,)`): The drafted tokens that the answers have taken.
        num_drafted (`Tensor` of shape `(batch,)`): All drafted tokens.
        num_rounds (`Tensor` of shape `(batch,)`): How many drafts there were.
    """

    def __init__(
        self,
        draft: Tensor,
        draft_mask: Tensor,
        past: DynamicCache,
        max_new_tokens: int,
        placeholders: list[int],
        ends: list[int],
        pad_token_id: int | None,
        follows_ended: bool,
        drafter: GoesOn | None = None,
        lengths: DraftLength | None = None,
    ) -> None:
        self.num_chosen = 0
        self._past = past
        self._placeholders, self._ends = placeholders, ends
        self._most = max(max_new_tokens - 1, 0)  # an answer's last token is never read
        # What ended answers go on with is padding, where there are ends; its logits count where they are returned.
        self._pad_token_id = [*ends, 0][0] if pad_token_id is None else pad_token_id
        self._pads = bool(ends)
        self._follows_ended = follows_ended or not ends
        self._drafter, self._lengths = drafter, lengths or DraftLength()
        self._chosen: list[Tensor] = []  # (batch,) for each step, where a drafter wants them
        self._finished: Tensor | None = None  # (batch,), of steps for which nothing was compared
        self._logits: Tensor | None = None  # (batch, steps, vocab_size), from step `_first_step` on
        self._first_step = 0
        self._num_read = 0  # the answers' columns in the cache, right or wrong
        self._pass_start: float | None = None  # of a pass that is timed, until its first token is known
        self._step_start: float | None = None  # of one without drafts, until the next one
        self._everyone = torch.ones(draft.shape[0], dtype=torch.bool)
        self._nobody = ~self._everyone
        self._unfinished = self._everyone
        self._follow = self._everyone  # whose answers are what was read, (batch,)
        self.num_accepted = torch.zeros(draft.shape[0], dtype=torch.long)
        self.num_drafted = draft_mask.sum(dim=1).cpu()
        self.num_rounds = (self.num_drafted > 0).long()
        self._is_first = True  # whether the drafts are those that the run began with
        self._take(draft.cpu(), draft_mask.cpu(), draft_mask.cpu())

    def _take(self, draft: Tensor, mask: Tensor, drafted: Tensor) -> None:
        """Takes drafts for the steps from now on, `(batch, length)`, and which of their tokens were `drafted`."""
        self._first_column = self.num_chosen
        # The bookkeeping of single tokens stays on the CPU, where `generate` reads each of them anyway.
        self._draft, self._drafted = draft, drafted
        self._to_read = without_placeholders(draft.masked_fill(~mask, self._pad_token_id), self._placeholders)
        # Nothing follows an end of sequence.
        is_read = mask & ~torch.isin(draft, torch.tensor([*self._placeholders, *self._ends]))
        # How far each draft is worth reading.
        last = (is_read * torch.arange(1, draft.shape[1] + 1)).amax(dim=1) if draft.shape[1] else is_read.sum(dim=1)
        self._readable = last.clamp(max=max(self._most - self.num_chosen, 0))  # (batch,)

    @property
    def _follows(self) -> bool:
        """Whether every sample that counts follows what was read."""
        counts = self._follow if self._follows_ended else self._follow | ~self._unfinished
        return bool(counts.all())

    def note(self, tokens: Tensor, finished: Tensor) -> None:
        """Notes the tokens chosen for every sample, `(batch,)`, and which samples finish with them, `(batch,)`."""
        column = self.num_chosen - self._first_column
        self.num_chosen += 1
        if self._drafter is not None:
            self._chosen.append(tokens)
        if column >= self._draft.shape[1]:  # nothing to compare with, so there is no need to wait for the device
            self._follow = self._nobody
            if self._drafter is not None:
                self._finished = finished if self._finished is None else self._finished | finished
            return
        tokens = tokens.cpu()
        if self._pass_start is not None:
            self._lengths.time_large(time.perf_counter() - self._pass_start)
            self._pass_start = None
        # Once the drafts are no longer read along, an equal token is a coincidence that saves nothing.
        if self.num_chosen == 1 or self._knew_more():
            counts = self._drafted[:, column] & self._unfinished
            agrees = tokens == self._draft[:, column]
            self.num_accepted += agrees & counts
            self._lengths.note(int((agrees & counts).sum()), int((~agrees & counts & self._follow).sum()))
        self._unfinished = self._unfinished & ~finished.cpu()
        self._follow = self._follow & (tokens == self._to_read[:, column])

    def knows_next(self) -> bool:
        """Whether the logits of the next step are known already."""
        known = 0 if self._logits is None else self._logits.shape[1]
        return self.num_chosen - self._first_step < known and self._follows

    def next_output(self) -> Any:
        """The logits of the next step."""
        assert self._logits is not None
        step = self.num_chosen - self._first_step
        return next_token_output(self._logits[:, step : step + 1], self._past)

    def rest(self) -> Tensor:
        """The drafts that the next pass reads; `(batch, columns)`.

        Behind a wrong token, the rest of a first draft is there already. A pass that saved no step shows that it does
        not fit any more: then a drafter drafts anew. Without one, nothing is read along until every unfinished sample
        has come to a token of its draft again. With a drafter, a first draft is read whole only once its beginning has
        turned out right: behind a short prompt, a long wrong one would cost more than a later pass.
        """
        is_new = self.num_chosen == 0
        if self._drafter is not None and not is_new and not (self._is_first and self._goes_along()):
            self._redraft(self._drafter)
            is_new = True
        start = self.num_chosen - self._first_column
        if start >= self._to_read.shape[1]:
            return self._to_read[:, :0]
        fits = is_new or self._goes_along()
        end = int(self._readable[self._unfinished].max()) if fits and self._unfinished.any() else 0
        if self._drafter is not None and self._is_first and (is_new or not self._follows):
            end = min(end, start + MOST)  # nothing says yet that a long draft is worth reading
        if self._pads:
            self._to_read[~self._unfinished, start:] = self._pad_token_id
        return self._to_read[:, start:end]

    def _goes_along(self) -> bool:
        """Whether the drafts go on, and the last pass has saved a step or comes to where they are right again."""
        start = self.num_chosen - self._first_column
        if start >= self._to_read.shape[1] or int(self._readable.max()) <= start:
            return False
        return self.num_chosen - self._first_step > 1 or self._follows

    def learn(self, logits: Tensor, num_draft_tokens: int, start: float) -> None:
        """Keeps the logits of a pass since `start`, `(batch, at least 1 + num_draft_tokens, vocab_size)`."""
        self._logits = logits[:, -1 - num_draft_tokens :]
        self._first_step = self.num_chosen
        self._num_read = self.num_chosen + num_draft_tokens
        self._follow = self._everyone
        self._pass_start = self._step_start = None
        if self.num_chosen and num_draft_tokens and not self._is_first:  # not the prefill, nor as long as that draft
            self._pass_start = start
        elif self.num_chosen and not num_draft_tokens:
            self._step_start = start

    def cut_back(self, length: int) -> None:
        """Removes from the cache everything after the answers' first `length` tokens."""
        excess = self._num_read - max(length, 0)
        if excess > 0:
            self._past.crop(-excess)
            self._num_read -= excess

    def _redraft(self, drafter: GoesOn) -> None:
        """Drafts anew from what the answers have become, where that pays."""
        self._is_first = False
        if self._step_start is not None:  # `generate` waits for every token, so the step has ended
            self._lengths.time_step(time.perf_counter() - self._step_start)
        if self._finished is not None:
            self._unfinished, self._finished = self._unfinished & ~self._finished.cpu(), None
        runs = (self._unfinished if self._pads else torch.ones_like(self._unfinished)).tolist()
        ahead = self._ahead(runs)
        room = max(self._most - self.num_chosen, 0)
        drafts: list[list[int]] = [[] for _ in runs]
        length = min(self._lengths.next_length(self.num_chosen), room)
        if not length and not any(ahead) and self.num_chosen >= self._first_column + self._draft.shape[1]:
            return  # a step as any other
        if length and any(runs):
            written = torch.stack(self._chosen, dim=1).tolist()
            answers = [
                [*row, *(token for token, _ in known)] if counts else None
                for row, known, counts in zip(written, ahead, runs, strict=True)
            ]
            start = time.perf_counter()
            drafts = drafter.go_on(answers, length)
            if any(drafts):
                self._lengths.time_small(time.perf_counter() - start, max(map(len, drafts)))
        drafts = [
            self._readable_by_large(draft)[: max(room - len(known), 0)]
            for draft, known in zip(drafts, ahead, strict=True)
        ]
        new = torch.tensor([len(draft) for draft in drafts])
        self.num_drafted += new
        self.num_rounds += new > 0
        rows = [[*known, *((token, True) for token in draft)] for draft, known in zip(drafts, ahead, strict=True)]
        ids, mask = pad_rows([[token for token, _ in row] for row in rows], self._pad_token_id)
        drafted, _ = pad_rows([[int(is_drafted) for _, is_drafted in row] for row in rows], 0)
        self._take(ids, mask, drafted.bool() & mask)

    def _readable_by_large(self, draft: list[int]) -> list[int]:
        """A draft up to the first token that only the small model knows."""
        size = len(draft) if self._logits is None else self._logits.shape[-1]
        return draft[: next((index for index, token in enumerate(draft) if token >= size), len(draft))]

    def _ahead(self, runs: list[bool]) -> list[list[tuple[int, bool]]]:
        """What each sample will write as far as its logits are known, and which of that was drafted.

        Only where samples part: otherwise none of them knows more than is written.
        """
        step = self.num_chosen - self._first_step
        known = 0 if self._logits is None else self._logits.shape[1]
        knows = [counts and follows for counts, follows in zip(runs, self._follow.tolist(), strict=True)]
        if self._logits is None or step >= known or not any(knows):
            return [[] for _ in runs]
        likely = self._logits[:, step:].argmax(dim=-1).tolist()
        first = self.num_chosen - self._first_column
        rows = []
        for row, tokens in enumerate(likely):
            found: list[tuple[int, bool]] = []
            for column, token in enumerate(tokens if knows[row] else (), start=first):
                was_read = column < self._to_read.shape[1] and int(self._to_read[row, column]) == token
                found.append((token, was_read and bool(self._drafted[row, column])))
                if not was_read:
                    break
            rows.append(found)
        return rows

    def _knew_more(self) -> bool:
        """Whether the last pass read more than the answers."""
        return self._logits is not None and self._logits.shape[1] > 1
