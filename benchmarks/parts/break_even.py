"""Both models against the large one alone while one thing grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.parts.answers import prescribed, random_draft, verifier_of
from benchmarks.parts.pairing import Pairing
from benchmarks.timing import ratio, take_turns
from transformers_sgl.architectures import visual_tokens_of
from transformers_sgl.generation_config_sgl import PRESETS
from transformers_sgl.hooks.attention_recorder import AttentionRecorder
from transformers_sgl.hooks.visual_token_pruner import VisualTokenPruner
from transformers_sgl.tokens.selection import decoder_processors

__all__ = ["measure_break_even"]


def measure_break_even(
    points: Iterable[tuple[float, Pairing, int]],
    acceptances: Sequence[float | None] = (None,),
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the pair at the preset "balanced" and the large model alone, at each point.

    Args:
        points (iterable of `float`, [`Pairing`] and `int`): What grows, the models and the question, and the length of
            the answer; each point is made when it is its turn and forgotten after.
        acceptances (sequence of `float` or `None`, defaults to no drafts): The probability that a draft's token is
            right; `None` is without drafts.
        rounds (`int`, defaults to 5): How often each way is timed.
        seed (`int`, defaults to 0): What answers and drafts are drawn from.

    Returns:
        `dict`: Under `series`, for each acceptance, the `points` with their `time_over_large`.
    """
    found: dict[float | None, list[dict[str, Any]]] = {rate: [] for rate in acceptances}
    for value, pairing, answer_tokens in points:
        ways = _ways(pairing, answer_tokens, acceptances, seed)
        timings = take_turns(ways, rounds, pairing.large.device)
        for rate in acceptances:
            found[rate].append(
                {
                    "value": value,
                    "num_visual_tokens": visual_tokens_of(pairing.large.config, pairing.inputs).num_visual_tokens,
                    "answer_tokens": answer_tokens,
                    "time_over_large": ratio(timings[str(rate)], timings["large"]),
                    "large": timings["large"].to_dict(),
                    "pair": timings[str(rate)].to_dict(),
                }
            )
        del pairing, ways  # the next point's models may need their memory
    return {"series": [{"acceptance": rate, "points": measured} for rate, measured in found.items()]}


def _ways(
    pairing: Pairing, answer_tokens: int, acceptances: Sequence[float | None], seed: int
) -> dict[str, Callable[[], Any]]:
    """The large model alone, and the pair with each draft, all of which write the same answer."""
    large, inputs = pairing.large, pairing.inputs
    settings = {"max_new_tokens": answer_tokens, **prescribed(large, inputs, answer_tokens, seed)}
    ways: dict[str, Callable[[], Any]] = {"large": partial(large.generate, **inputs, **settings)}
    for rate in acceptances:
        draft = None if rate is None else random_draft(large, inputs, answer_tokens, rate, seed)
        ways[str(rate)] = partial(_guided_with_draft, pairing, draft, settings)
    return ways


def _guided_with_draft(pairing: Pairing, draft: Tensor | None, settings: dict[str, Any]) -> None:
    """One guided answer with a draft that is not the small model's, which would never be right."""
    preset, small, large = PRESETS["balanced"], pairing.small, pairing.large
    seen = visual_tokens_of(small.config, pairing.for_small)
    with AttentionRecorder(small, seen, records_features=True) as recorder:
        small.generate(**pairing.for_small, max_new_tokens=settings["max_new_tokens"])
    tokens = replace(visual_tokens_of(large.config, pairing.inputs), features=recorder.features)
    processors = decoder_processors(preset["retention_ratio"], min_tokens_per_image=1, selection=preset["selection"])
    kept = processors.keep_mask(tokens, recorder.importance)
    with VisualTokenPruner(large, tokens.prompt_keep_mask(kept), preset["prune_layer"]):
        verifier_of(large, draft).generate(**pairing.inputs, **settings)
