"""What guidance costs while prompts, batches or answers grow, and by which power of what grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.parts.guidance import compare_guidance

__all__ = ["measure_growth", "power_law"]


def measure_growth(
    points: Iterable[tuple[PreTrainedModel, float, dict[str, Tensor], int]], rounds: int = 5, memory: bool = True
) -> dict[str, Any]:
    """Measures guidance at each point and fits a power law through all.

    Args:
        points (iterable): The small model, what grows, the inputs and the length of the answer; each point is made
            when it is its turn and forgotten after.
        rounds (`int`, defaults to 5): How often each way is timed.
        memory (`bool`, defaults to `True`): Whether memory is measured, too.

    Returns:
        `dict`: Under `points` what [`compare_guidance`] finds at each; under `power_laws`, by way, the exponents of
        `time`, `working_memory` and `extra_memory` (over plain), each with the number of points.
    """
    measured = [
        {"value": value, **compare_guidance(small, inputs, answer_tokens, rounds, memory, whole=False)}
        for small, value, inputs, answer_tokens in points
    ]
    laws: dict[str, dict[str, Any]] = {}
    for name in ("plain", "capture", "published"):
        there = [point for point in measured if "skipped" not in point["ways"][name]]
        values = [point["value"] for point in there]
        costs = [point["ways"][name] for point in there]
        laws[name] = {
            "time": power_law(values, [cost["time"]["median_ms"] for cost in costs]),
            "working_memory": power_law(values, [(cost["memory"] or {}).get("working_bytes", 0) for cost in costs]),
            "extra_memory": power_law(values, [cost["extra_memory_bytes"] or 0 for cost in costs]),
        }
    return {"points": measured, "power_laws": laws}


def power_law(values: Sequence[float], costs: Sequence[float]) -> dict[str, Any] | None:
    """Fits a power law: a line through the logarithms, by least squares.

    Args:
        values (sequence of `float`): What grows.
        costs (sequence of `float`): What it costs; those that are not above 0 are left out.

    Returns:
        `dict`: `exponent` and `num_points`; `None` with fewer than two points.

    Example:
        ```python
        >>> from benchmarks.parts.growth import power_law

        >>> law = power_law([1, 2, 4], [3, 12, 48])
        >>> round(law["exponent"], 6), law["num_points"]
        (2.0, 3)

        ```
    """
    pairs = [(value, cost) for value, cost in zip(values, costs, strict=True) if value > 0 and cost > 0]
    if len({value for value, _ in pairs}) < 2:
        return None
    logs = np.log(np.array(pairs, dtype=float))
    exponent, _ = np.polyfit(logs[:, 0], logs[:, 1], deg=1)
    return {"exponent": float(exponent), "num_points": len(pairs)}
