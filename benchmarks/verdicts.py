"""When is the pair faster? Only what the measured intervals allow is said.

Least and greatest of five rounds hold the median in 15 of 16 cases, if rounds are independent. A point is faster or
slower if its whole interval lies on one side of 1; with fewer rounds, or if the interval contains 1, it is neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["FEWEST_ROUNDS", "verdict"]

# What rests on fewer rounds has no interval and no verdict.
FEWEST_ROUNDS = 5

Interval = dict[str, float]


def verdict(
    points: Sequence[tuple[float, Interval]], rounds: int, show: Callable[[float], str] = "{:g}".format
) -> str:
    """Where a ratio of times lies below 1.

    A crossing between a slower and a faster point is taken on the straight line between their medians.

    Args:
        points (sequence of `float` and `dict`): What grows, in ascending order, and the ratio's `median`, `min` and
            `max` there.
        rounds (`int`): How many rounds each interval rests on.
        show (`Callable`): How a value is written.

    Returns:
        `str`: `"always"`, `"never"`, `"above N"`, `"from N on"`, `"below N"`, `"up to N"` or `"not clear"`; empty with
        too few rounds.

    Example:
        ```python
        >>> from benchmarks.verdicts import verdict

        >>> slower, unclear, faster = ({"median": m, "min": m - 0.1, "max": m + 0.1} for m in (1.4, 1.0, 0.8))
        >>> verdict([(100, slower), (200, faster)], rounds=5)
        'above 166.667'
        >>> verdict([(100, slower), (200, unclear), (300, faster)], rounds=5)
        'from 300 on'
        >>> verdict([(100, slower), (200, unclear)], rounds=5)
        'not clear'

        ```
    """
    if rounds < FEWEST_ROUNDS or not points:
        return ""
    faster = [interval["max"] < 1 for _, interval in points]
    slower = [interval["min"] > 1 for _, interval in points]
    if all(faster):
        return "always"
    if all(slower):
        return "never"
    number = sum(faster)
    last = len(points) - number - 1  # the last that is not faster, if all that are stand behind it
    if number and all(faster[last + 1 :]):
        if slower[last]:
            return f"above {show(_crossing(points[last], points[last + 1]))}"
        return f"from {show(points[last + 1][0])} on"
    if number and all(faster[:number]):
        if slower[number]:
            return f"below {show(_crossing(points[number - 1], points[number]))}"
        return f"up to {show(points[number - 1][0])}"
    return "not clear"


def _crossing(left: tuple[float, Interval], right: tuple[float, Interval]) -> float:
    """Where the line between two medians is 1."""
    before, after = left[1]["median"], right[1]["median"]
    return left[0] + (right[0] - left[0]) * (1 - before) / (after - before)
