"""What a verified draft saves the large model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.parts.answers import prescribed, random_draft, verifier_of
from benchmarks.parts.pairing import presets_of, sizes
from benchmarks.timing import ratio, take_turns

__all__ = ["measure_drafts"]


def measure_drafts(
    large: PreTrainedModel,
    inputs: dict[str, Tensor],
    answer_lengths: Sequence[int],
    acceptances: Sequence[float],
    rounds: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures the large model with a draft to verify, pruned at the preset "balanced".

    Args:
        large (`PreTrainedModel`): The large model.
        inputs (`dict`): Its inputs, `input_ids` of shape `(batch, prompt_length)` among them.
        answer_lengths (sequence of `int`): How many tokens are written.
        acceptances (sequence of `float`): The probability that a draft's token is right.
        rounds (`int`, defaults to 5): How often each is timed.
        seed (`int`, defaults to 0): What answers and drafts are drawn from.

    Returns:
        `dict`: Under `rows`, for each length and acceptance: `num_forward_passes`, `passes_per_token`, `time` and
        `time_over_no_draft`; an acceptance of `None` is without a draft.
    """
    presets, kept = presets_of(large, inputs, seed)
    rows = []
    for length in answer_lengths:
        settings = {"max_new_tokens": length, **prescribed(large, inputs, length, seed)}
        drafts: dict[float | None, Tensor | None] = {None: None}
        drafts |= {rate: random_draft(large, inputs, length, rate, seed) for rate in acceptances}
        passes: dict[float | None, int] = {}

        def run(rate: float | None, drafts: Any = drafts, settings: Any = settings, passes: Any = passes) -> None:
            verifier = verifier_of(large, drafts[rate])
            with presets["balanced"]():
                verifier.generate(**inputs, **settings)
            passes[rate] = verifier.num_forward_passes

        timings = take_turns({rate: partial(run, rate) for rate in drafts}, rounds, large.device)
        rows += [
            {
                "answer_tokens": length,
                "acceptance": rate,
                "num_forward_passes": passes[rate],
                "passes_per_token": passes[rate] / length,
                "time": timings[rate].to_dict(),
                "time_over_no_draft": ratio(timings[rate], timings[None]),
            }
            for rate in drafts
        ]
    return {**sizes(large, inputs), **kept["balanced"], "rows": rows}
