"""Both models against the large one alone while one thing grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from benchmarks.parts.answers import prescribed
from benchmarks.parts.drafting import guided_answer, one_tile_encoded
from benchmarks.parts.pairing import Pairing
from benchmarks.settings import Drafts
from benchmarks.timing import ratio, take_turns
from transformers_sgl.architectures import visual_tokens_of

__all__ = ["measure_break_even"]

# How drafts are made, and the probability that a token is right which the small model drafts.
Series = tuple[Drafts, float]


def measure_break_even(
    points: Iterable[tuple[float, Pairing, int]],
    series: Sequence[Series] = (("none", 0.0),),
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the pair at the preset "balanced" and the large model alone, at each point.

    Args:
        points (iterable of `float`, [`Pairing`] and `int`): What grows, the models and the question, and the length of
            the answer; each point is made when it is its turn and forgotten after.
        series (sequence of `str` and `float`, defaults to no drafts): `"none"`, `"once"` or in `"rounds"`, and the
            probability that a drafted token is right; all passes of the small model are in the time.
        rounds (`int`, defaults to 5): How often each way is timed.
        seed (`int`, defaults to 0): What answers and drafts are drawn from.

    Returns:
        `dict`: Under `series`, for each of them, the `points` with their `time_over_large`.
    """
    found: dict[Series, list[dict[str, Any]]] = {each: [] for each in series}
    for value, pairing, answer_tokens in points:
        large, inputs = pairing.large, pairing.inputs
        settings = {"max_new_tokens": answer_tokens, **prescribed(large, inputs, answer_tokens, seed)}
        ways: dict[Any, Any] = {"large": partial(large.generate, **inputs, **settings)}
        ways |= {each: partial(guided_answer, pairing, answer_tokens, *each, seed) for each in series}
        with one_tile_encoded(large, pairing.small) as left_out:
            timings = take_turns(ways, rounds, large.device, left_out=left_out)
        for each in series:
            found[each].append(
                {
                    "value": value,
                    "num_visual_tokens": visual_tokens_of(large.config, inputs).num_visual_tokens,
                    "answer_tokens": answer_tokens,
                    "time_over_large": ratio(timings[each], timings["large"]),
                    "large": timings["large"].to_dict(),
                    "pair": timings[each].to_dict(),
                }
            )
        del pairing, large, inputs, ways  # the next point's models may need their memory
    return {
        "series": [
            {"drafts": drafts, "acceptance": None if drafts == "none" else rate, "points": measured}
            for (drafts, rate), measured in found.items()
        ]
    }
