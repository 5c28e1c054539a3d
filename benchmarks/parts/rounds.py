"""Drafts in rounds: after each correction by the large model the small one goes on from the corrected text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.parts.answers import first_draft, prescribed, random_draft
from benchmarks.parts.drafting import counted_calls, drafter_behind, one_tile_encoded, told
from benchmarks.parts.first_pass import FirstPass, VerifierWithFirstPass, remembered_features
from benchmarks.parts.pairing import Pairing, presets_of, random_keep_mask, sizes
from benchmarks.settings import Drafts
from benchmarks.timing import Timing, ratio, uncollected
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.clock import now_ms
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.drafter import Drafter
from transformers_sgl.tokens.draft_length import DraftLength

__all__ = ["measure_passes", "measure_rounds"]

_Way = tuple[Drafts, float]

# Without drafts.
_ALONE: _Way = ("none", 0.0)
_DRAFTED = 4  # tokens, where passes are measured
_PARTS = ("decoding", "answer", "whole")


def measure_rounds(
    pairing: Pairing,
    answer_lengths: Sequence[int],
    acceptances: Sequence[float],
    acceptances_once: Sequence[float] = (),
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the large model, pruned at the preset "balanced", with drafts in rounds, with one draft and with none.

    A round of the measurement draws an answer and drafts, and runs in turn: guidance, with the small model kept ready
    to go on and without; the large model's first pass, with as much of the small model's answer as it reads along; and
    for each way the tokens after the first, for which the first pass is not repeated.

    Args:
        pairing ([`Pairing`]): The models and the prompt.
        answer_lengths (sequence of `int`): How many tokens are written, each 2 or more.
        acceptances (sequence of `float`): The probability that a token which the small model drafts is right.
        acceptances_once (sequence of `float`, defaults to none): The same for one draft, the small model's answer.
        rounds (`int`, defaults to 5): How often each is timed.
        seed (`int`, defaults to 0): What answers and drafts are drawn from.

    Returns:
        `dict`: Under `rows`, for each length and way: the `drafts` (`"none"`, `"once"` or in `"rounds"`), the
        `acceptance`, the medians of `large_passes`, and of `small_passes` without those of guidance, and the times,
        with their `speed_up` over no drafts, of `decoding` from the first token to the last, of the `answer`, which
        the first pass belongs to, and of the `whole` with guidance.
    """
    if not answer_lengths:
        return {"rows": []}
    ways = [_ALONE, *(("once", rate) for rate in acceptances_once), *(("rounds", rate) for rate in acceptances)]
    rows: list[dict[str, Any]] = []
    with one_tile_encoded(pairing.large, pairing.small) as left_out:
        answers = _Answers(pairing, max(answer_lengths), left_out, seed)
        answers.run_all(min(answer_lengths), ways[-1:], 0)  # warms up
        for length in answer_lengths:
            found = [answers.run_all(length, ways, number) for number in range(rounds)]
            rows += [_row(length, way, found) for way in ways]
    drafting = {"draft_retention_ratio": SGLGenerationConfig.extra_defaults()["draft_retention_ratio"]}
    return {**sizes(pairing.large, pairing.inputs), **answers.kept, **drafting, "rounds": rounds, "rows": rows}


def _row(length: int, way: _Way, rounds: Sequence[Mapping[_Way, _Run]]) -> dict[str, Any]:
    drafts, acceptance = way
    row: dict[str, Any] = {"answer_tokens": length, "drafts": drafts}
    row["acceptance"] = None if way == _ALONE else acceptance
    for name in ("large_passes", "small_passes"):
        row[name] = median(getattr(found[way], name) for found in rounds)
    for part in _PARTS:
        of_all, of_way = (
            Timing(tuple(getattr(found[each], f"{part}_ms") for found in rounds)) for each in (_ALONE, way)
        )
        row[part] = {"time": of_way.to_dict(), "speed_up": ratio(of_all, of_way)}
    return row


@dataclass(frozen=True)
class _Run:
    """What one answer took.

    Attributes:
        decoding_ms: From the first token to the last, with the small model's passes of all rounds.
        first_ms: The large model's time to the first token.
        guidance_ms: The small model's answer.
        large_passes: The large model's passes, the first one included.
        small_passes: The small model's, those of guidance not included.
    """

    decoding_ms: float
    first_ms: float
    guidance_ms: float
    large_passes: int
    small_passes: int

    @property
    def answer_ms(self) -> float:
        """Without guidance."""
        return self.first_ms + self.decoding_ms

    @property
    def whole_ms(self) -> float:
        """With guidance."""
        return self.guidance_ms + self.answer_ms


class _Answers:
    """One prompt that the large model, pruned, answers in several ways."""

    def __init__(self, pairing: Pairing, max_answer_tokens: int, left_out: Callable[[], float], seed: int) -> None:
        presets, kept = presets_of(pairing.large, pairing.inputs, seed)
        self.kept = kept["balanced"]
        self._pruned, self._device = presets["balanced"], pairing.large.device
        self._pairing, self._left_out, self._seed = pairing, left_out, seed
        draft = random_draft(pairing.large, pairing.inputs, 2, 1.0, seed)
        self._drafter = told(pairing, draft, max_answer_tokens).drafter

    def run_all(self, length: int, ways: Sequence[_Way], number: int) -> dict[_Way, _Run]:
        """Each way once, for an answer and drafts of this number, and without drafts."""
        seed = self._seed + number
        ways = [way for way in ways if way != _ALONE]
        draft = random_draft(self._pairing.large, self._pairing.inputs, length, 0.0, seed)
        with uncollected():
            guidance: dict[Drafts, float] = {
                "none": self._guidance(draft, False),
                "rounds": self._guidance(draft, True),
            }
            guidance["once"] = guidance["none"]
            first_passes = {name: self._first_pass(name, draft, length, seed) for name in guidance}
            found = {}
            for way in [_ALONE, *ways]:
                first_pass = first_passes[way[0]]
                decoding, large_passes, small_passes = self._decoding(first_pass, length, way, seed)
                found[way] = _Run(decoding, first_pass.took_ms, guidance[way[0]], large_passes, small_passes)
        return found

    def _now(self) -> float:
        return now_ms(self._device) + self._left_out()

    def _guidance(self, draft: Tensor, ready: bool) -> float:
        start = self._now()
        told(self._pairing, draft, draft.shape[1] if ready else None)
        return self._now() - start

    def _first_pass(self, drafts: Drafts, draft: Tensor, length: int, seed: int) -> FirstPass:
        """The large model's time to the first token, and what it knows then; with all that is read along."""
        first_pass, start = FirstPass(), self._now()
        clock = _Ends(self._now, 1)
        drafter = self._drafter if drafts == "rounds" else None  # which has nothing to do before the first token
        self._answer(first_pass, None if drafts == "none" else draft, length, seed, clock, drafter)
        first_pass.took_ms = clock.times[0] - start
        return first_pass

    def _decoding(self, first_pass: FirstPass, length: int, way: _Way, seed: int) -> tuple[float, int, int]:
        """Milliseconds from the first token to the last, and the passes of both models."""
        drafts, acceptance = way
        pairing, draft, drafter = self._pairing, None, None
        if drafts != "none":
            draft = first_draft(pairing.large, pairing.inputs, length, acceptance, seed)
        if draft is not None and drafts == "rounds":
            later = random_draft(pairing.large, pairing.inputs, length, acceptance, seed)
            assert self._drafter is not None
            drafter = self._drafter = drafter_behind(self._drafter, draft, later, pairing.for_small)
        clock = _Ends(self._now, length)
        with counted_calls(pairing.small) as small_passes:
            verifier = self._answer(first_pass, draft, length, seed, clock, drafter)
        return clock.times[-1] - clock.times[0], verifier.num_forward_passes, small_passes[0]

    def _answer(
        self,
        first_pass: FirstPass,
        draft: Tensor | None,
        length: int,
        seed: int,
        clock: _Ends,
        drafter: Drafter | None = None,
    ) -> DraftVerifier:
        large, inputs = self._pairing.large, self._pairing.inputs
        mask = None if draft is None else torch.ones_like(draft).bool()
        verifier = VerifierWithFirstPass(large, draft, mask, drafter=drafter)
        verifier.first_pass = first_pass
        with self._pruned(), remembered_features(large, first_pass):
            verifier.generate(
                **inputs,
                max_new_tokens=length,
                stopping_criteria=StoppingCriteriaList([clock]),
                **prescribed(large, inputs, length, seed),
            )
        return verifier


class _Ends(StoppingCriteria):
    """Notes when an answer's first and its last token were there, and ends it then."""

    def __init__(self, now: Callable[[], float], length: int) -> None:
        self.times: list[float] = []  # milliseconds
        self._number, self._length, self._now = 0, length, now

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._number += 1
        if self._number in (1, self._length):
            self.times.append(self._now())
        ends = self._number == self._length
        return torch.full((len(input_ids),), ends, dtype=torch.bool, device=input_ids.device)


def measure_passes(
    pairings: Iterable[Pairing], retention_ratios: Sequence[float], rounds: int = 12, seed: int = 0
) -> dict[str, Any]:
    """Measures single passes: the large model's of one token and of several, and the small model's.

    Args:
        pairings (iterable of [`Pairing`]): The models and prompts, each made when it is its turn and forgotten after.
        retention_ratios (sequence of `float`): The fractions of visual tokens that the small model's cache holds.
        rounds (`int`, defaults to 12): How often each pass is timed.
        seed (`int`, defaults to 0): What answers and drafts are drawn from.

    Returns:
        `dict`: Under `rows`, for each prompt and pass: the `model`, the number of `tokens` that it reads, the
        `retention_ratio` of the small model's cache, the `time`, and `time_over_step`, to the large model's pass of
        one token. A pass of the small model is the mean of a round, with everything that drafting takes.
    """
    rows: list[dict[str, Any]] = []
    conditions: dict[str, Any] = {}
    for pairing in pairings:
        with one_tile_encoded(pairing.large, pairing.small):
            presets, kept = presets_of(pairing.large, pairing.inputs, seed)
            conditions = {**sizes(pairing.large, pairing.inputs), **kept["balanced"]}
            turns = _Turns(_drafters(pairing, retention_ratios, 2 * rounds + 2, seed))
            length = 2 * rounds + 2
            draft = random_draft(pairing.large, pairing.inputs, length, 0.0, seed)
            verifier = DraftVerifier(
                pairing.large, draft[:, :1], torch.ones_like(draft[:, :1]).bool(), drafter=turns, lengths=turns
            )
            clock = _PassClock(pairing.large.device)
            handles = clock.on(pairing.large)
            settings = {"max_new_tokens": length, **prescribed(pairing.large, pairing.inputs, length, seed)}
            try:
                with presets["balanced"]():
                    verifier.generate(**pairing.inputs, **settings)
            finally:
                for handle in handles:
                    handle.remove()
        rows += _pass_rows(pairing, clock.times, turns.times, rounds)
        del pairing, turns, verifier
    return {**conditions, "rounds": rounds, "drafted": _DRAFTED, "rows": rows}


def _drafters(pairing: Pairing, retention_ratios: Sequence[float], length: int, seed: int) -> dict[float, Drafter]:
    """The small model behind wrong drafts, by the fraction of visual tokens that its cache holds."""
    tokens = visual_tokens_of(pairing.small.config, pairing.for_small)
    draft = random_draft(pairing.large, pairing.inputs, length, 0.0, seed)
    whole = told(pairing, draft[:, :2], length, draft_retention_ratio=1.0).drafter
    assert whole is not None
    drafters = {}
    for share in retention_ratios:
        kept = tokens.prompt_keep_mask(random_keep_mask(tokens, share, seed))
        drafter = replace(whole, cache=deepcopy(whole.cache)).pruned(kept)
        drafters[share] = drafter_behind(drafter, draft, draft, pairing.for_small)
    return drafters


class _Turns(DraftLength):
    """Lets several drafters draft in turn, before every other step of an answer, and notes how long each takes."""

    def __init__(self, drafters: dict[float, Drafter]) -> None:
        super().__init__()
        self.times: dict[float, list[float]] = {share: [] for share in drafters}  # milliseconds of a pass
        self._drafters, self._number = drafters, 0

    def next_length(self, num_written: int) -> int:
        self._number += 1
        return _DRAFTED if self._number % 2 else 0

    def go_on(self, answers: Sequence[list[int] | None], length: int) -> list[list[int]]:
        """What the last of them drafts."""
        drafts: list[list[int]] = []
        for share, drafter in self._drafters.items():
            start = time.perf_counter()
            drafts = drafter.go_on(answers, length)  # which ends with the tokens on the CPU
            self.times[share].append(1000 * (time.perf_counter() - start) / length)
        return drafts


class _PassClock:
    """Notes how long the passes of a model take, in milliseconds, by the number of tokens that they read."""

    def __init__(self, device: torch.device) -> None:
        self.times: dict[int, list[float]] = {}
        self._device, self._start, self._width = device, 0.0, 0

    def on(self, model: Any) -> list[Any]:
        """Begins; returns handles of hooks, to be removed."""
        return [
            model.register_forward_pre_hook(self._begins, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._ends),
        ]

    def _begins(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._width, self._start = kwargs["input_ids"].shape[1], now_ms(self._device)

    def _ends(self, *_: Any) -> None:
        self.times.setdefault(self._width, []).append(now_ms(self._device) - self._start)


def _pass_rows(
    pairing: Pairing, of_large: dict[int, list[float]], of_small: dict[float, list[float]], rounds: int
) -> list[dict[str, Any]]:
    number = visual_tokens_of(pairing.large.config, pairing.inputs).num_visual_tokens
    passes: list[tuple[str, int, float | None, list[float]]] = [
        *(("large", width, None, of_large[width]) for width in (1, 1 + _DRAFTED)),
        *(("small", 1, share, found) for share, found in of_small.items()),
    ]
    least = min(rounds, *(len(found) for *_, found in passes))
    step = Timing(tuple(of_large[1][-least:]))  # the first ones warm up
    rows = []
    for model, width, share, found in passes:
        timing = Timing(tuple(found[-least:]))
        row = {"num_visual_tokens": number, "model": model, "tokens": width, "retention_ratio": share}
        rows.append({**row, "time": timing.to_dict(), "time_over_step": ratio(timing, step)})
    return rows
