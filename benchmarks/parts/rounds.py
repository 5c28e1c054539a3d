"""Drafts in rounds: after each correction by the large model the small one goes on from the corrected text."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.parts.answers import first_draft, prescribed, random_draft
from benchmarks.parts.drafting import counted_calls, drafter_behind, guided_answer, one_tile_encoded, told
from benchmarks.parts.pairing import Pairing, presets_of, random_keep_mask, sizes
from benchmarks.timing import Timing, ratio, take_turns
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.clock import now_ms
from transformers_sgl.hooks.draft_verifier import DraftVerifier
from transformers_sgl.hooks.drafter import Drafter
from transformers_sgl.tokens.draft_length import DraftLength

__all__ = ["measure_passes", "measure_rounds", "measure_wrong_drafts"]

_ALONE = "none", 0.0
_DRAFTED = 4  # tokens, where passes are measured


@dataclass(frozen=True)
class _Run:
    """What one answer took.

    Attributes:
        answer_ms: Without guidance: the large model's first pass, decoding, and the small model's passes of all rounds.
        decoding_ms: From the first token to the last.
        large_passes: The large model's passes, the first one included.
        small_passes: The small model's, those of guidance not included.
        accepted: Drafted tokens that were right.
        drafted: All drafted tokens.
    """

    answer_ms: float
    decoding_ms: float
    large_passes: int
    small_passes: int
    accepted: int
    drafted: int


def measure_rounds(
    pairing: Pairing, answer_lengths: Sequence[int], acceptances: Sequence[float], rounds: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Measures the large model, pruned at the preset "balanced", with drafts in rounds, with one draft and with none.

    The small model's first answer is there already, as it is after guidance; everything later is in the time. Every
    round of the measurement draws another answer and other drafts.

    Args:
        pairing ([`Pairing`]): The models and the prompt.
        answer_lengths (sequence of `int`): How many tokens are written, each 2 or more.
        acceptances (sequence of `float`): The probability that a token which the small model drafts is right.
        rounds (`int`, defaults to 5): How often each is timed.
        seed (`int`, defaults to 0): What answers and drafts are drawn from.

    Returns:
        `dict`: Under `rows`, for each length and acceptance, and for drafts `"once"` and in `"rounds"`: the
        times of `decoding` and of the whole `answer`, with their `speed_up` over no drafts (and of rounds over one
        draft), and the medians of `large_passes`, `small_passes`, and of the share of drafted tokens that were
        `accepted`.
    """
    if not answer_lengths:
        return {"rows": []}
    rows: list[dict[str, Any]] = []
    with one_tile_encoded(pairing.large, pairing.small) as left_out:
        answers = _Answers(pairing, max(answer_lengths), left_out, seed)
        answers.run(min(answer_lengths), "rounds", 0.5, 0)  # warms up
        for length in answer_lengths:
            rows += _rows(answers, length, acceptances, rounds)
    return {**sizes(pairing.large, pairing.inputs), **answers.kept, "rows": rows}


def _rows(answers: _Answers, length: int, acceptances: Sequence[float], rounds: int) -> list[dict[str, Any]]:
    ways = [_ALONE, *((drafts, rate) for rate in acceptances for drafts in ("once", "rounds"))]
    runs: dict[tuple[str, float], list[_Run]] = {way: [] for way in ways}

    def run(way: tuple[str, float]) -> None:
        runs[way].append(answers.run(length, *way, len(runs[way])))

    take_turns({way: partial(run, way) for way in ways}, rounds, answers.device, warmup=0)
    times = {
        part: {way: Timing(tuple(getattr(each, f"{part}_ms") for each in found)) for way, found in runs.items()}
        for part in ("decoding", "answer")
    }
    rows = []
    for way in ways:
        drafts, rate = way
        found: dict[str, Any] = {}
        for part, timings in times.items():
            found[part] = {"time": timings[way].to_dict(), "speed_up": ratio(timings[_ALONE], timings[way])}
            if drafts == "rounds":
                found[part]["speed_up_over_once"] = ratio(timings["once", rate], timings[way])
        counts = {name: median(getattr(each, name) for each in runs[way]) for name in ("large_passes", "small_passes")}
        accepted = median(each.accepted / max(each.drafted, 1) for each in runs[way])
        row = {"answer_tokens": length, "drafts": drafts, "acceptance": None if way == _ALONE else rate}
        rows.append({**row, **counts, "accepted": accepted, **found})
    return rows


class _Answers:
    """One prompt that the large model, pruned, answers in several ways."""

    def __init__(self, pairing: Pairing, max_answer_tokens: int, left_out: Any, seed: int) -> None:
        presets, kept = presets_of(pairing.large, pairing.inputs, seed)
        self.pruned, self.kept = presets["balanced"], kept["balanced"]
        self.device = pairing.large.device
        self._pairing, self._left_out, self._seed = pairing, left_out, seed
        draft = random_draft(pairing.large, pairing.inputs, 2, 1.0, seed)
        self._drafter = told(pairing, draft, max_answer_tokens).drafter

    def run(self, length: int, drafts: str, acceptance: float, number: int) -> _Run:
        """An answer of this length with such drafts, for the time of this number."""
        large, inputs, seed = self._pairing.large, self._pairing.inputs, self._seed + number
        settings = {"max_new_tokens": length, **prescribed(large, inputs, length, seed)}
        draft = None if drafts == "none" else first_draft(large, inputs, length, acceptance, seed)
        if draft is not None and drafts == "rounds":
            later = random_draft(large, inputs, length, acceptance, seed)
            assert self._drafter is not None
            self._drafter = drafter_behind(self._drafter, draft, later, self._pairing.for_small)
        verifier = DraftVerifier(
            large,
            draft,
            None if draft is None else torch.ones_like(draft).bool(),
            drafter=self._drafter if drafts == "rounds" else None,
        )
        clock = _Ends(length, self.device)
        with self.pruned(), counted_calls(self._pairing.small) as small_passes:
            left_out, start = self._left_out(), now_ms(self.device)
            verifier.generate(**inputs, **settings, stopping_criteria=StoppingCriteriaList([clock]))
            took = now_ms(self.device) - start + self._left_out() - left_out
        counts = verifier.num_accepted, verifier.num_drafted
        accepted, drafted = (0 if each is None else int(each.sum()) for each in counts)
        first, last = clock.times
        return _Run(took, last - first, verifier.num_forward_passes, small_passes[0], accepted, drafted)


class _Ends(StoppingCriteria):
    """Ends nothing, but notes when an answer's first and its last token were there."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.times: list[float] = []  # milliseconds
        self._number, self._length, self._device = 0, length, device

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._number += 1
        if self._number in (1, self._length):
            self.times.append(now_ms(self._device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def measure_wrong_drafts(
    pairing: Pairing, answer_lengths: Sequence[int], rounds: int = 5, seed: int = 0
) -> dict[str, Any]:
    """Measures what drafts cost where none of their tokens is ever right, in whole answers of the pair.

    Guidance is in the time: with drafts, the small model is kept ready to go on. The small model's answer is as long
    as the large one's.

    Returns:
        `dict`: Under `rows`, for each length and for drafts `"once"` and in `"rounds"`, the `time`, the
        `time_over_no_drafts`, and the number of `rounds` that were tried.
    """
    rows = []
    with one_tile_encoded(pairing.large, pairing.small) as left_out:
        for length in answer_lengths:
            tried: dict[str, int] = {}

            def run(drafts: Any, length: int = length, tried: dict[str, int] = tried) -> None:
                found = guided_answer(pairing, length, drafts, 0.0, seed).num_rounds
                tried[drafts] = 0 if found is None else int(found.max())

            ways = {drafts: partial(run, drafts) for drafts in ("none", "once", "rounds")}
            timings = take_turns(ways, rounds, pairing.large.device, left_out=left_out)
            rows += [
                {
                    "answer_tokens": length,
                    "drafts": drafts,
                    "rounds": tried[drafts],
                    "time": timings[drafts].to_dict(),
                    "time_over_no_drafts": ratio(timings[drafts], timings["none"]),
                }
                for drafts in ways
            ]
    return {**sizes(pairing.large, pairing.inputs), "rows": rows}


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
    return {**conditions, "drafted": _DRAFTED, "rows": rows}


def _drafters(pairing: Pairing, retention_ratios: Sequence[float], length: int, seed: int) -> dict[float, Drafter]:
    """The small model behind wrong drafts, by the fraction of visual tokens that its cache holds."""
    tokens = visual_tokens_of(pairing.small.config, pairing.for_small)
    draft = random_draft(pairing.large, pairing.inputs, length, 0.0, seed)
    whole = told(pairing, draft[:, :2], length).drafter
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
