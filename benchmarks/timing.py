"""Timing: several ways to do the same work, measured side by side.

A machine is never equally fast for long, so the contenders take turns (A, B, A, B, ...), and times are compared within
a round: the ratio of two ways is the median of their ratios in each round, with the least and the greatest beside it,
and not the ratio of two medians.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from transformers_sgl.clock import now_ms

__all__ = ["Timing", "ratio", "spread", "take_turns", "uncollected"]

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """How long something took, round by round.

    Attributes:
        samples: Milliseconds, one entry for each round.
    """

    samples: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """`median_ms`, `min_ms`, `max_ms` and `samples_ms`, ready for JSON."""
        return {
            **{f"{name}_ms": value for name, value in spread(self.samples).items()},
            "samples_ms": list(self.samples),
        }


def take_turns(
    contenders: Mapping[Name, Callable[[], Any]],
    rounds: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    left_out: Callable[[], float] = float,
) -> dict[Name, Timing]:
    """Times several things in turn: A, B, A, B, ..., each until the device has finished it.

    Python's garbage collector runs between the rounds and not within them; what a contender returns is forgotten.

    Args:
        contenders (mapping to `Callable`): What to time, by name.
        rounds (`int`): How often each has its turn.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where they run.
        warmup (`int`, defaults to 1): How many rounds run before and do not count.
        left_out (`Callable`, *optional*): Tells how many milliseconds the contenders have spared so far, which count
            as if they had taken them.

    Returns:
        `dict` to [`Timing`]: By the same names.

    Raises:
        ValueError: If there is no round.

    Example:
        ```python
        >>> import time
        >>> from benchmarks.timing import ratio, take_turns

        >>> timings = take_turns({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.03)}, rounds=3)
        >>> len(timings["long"].samples), ratio(timings["long"], timings["short"])["min"] > 1
        (3, True)

        ```
    """
    if rounds < 1:
        raise ValueError(f"`rounds` is {rounds}: pass a whole number of 1 or more.")
    device = torch.device(device)
    samples: dict[Name, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        with uncollected():
            for name, run in contenders.items():
                start = now_ms(device) + left_out()
                run()
                took = now_ms(device) - start + left_out()
                if number >= warmup:
                    samples[name].append(took)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def ratio(of: Timing, to: Timing) -> dict[str, float]:
    """How many times as long one took as the other: `median`, `min` and `max` of the rounds' ratios.

    Example:
        ```python
        >>> from benchmarks.timing import Timing, ratio

        >>> ratio(Timing((2.0, 8.0, 3.0)), to=Timing((1.0, 2.0, 1.0)))
        {'median': 3.0, 'min': 2.0, 'max': 4.0}

        ```
    """
    return spread([mine / other for mine, other in zip(of.samples, to.samples, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """`median`, `min` and `max` of at least one value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@contextmanager
def uncollected() -> Iterator[None]:
    """Collects garbage first, then disables the collector for the block."""
    gc.collect(1)  # what is young: nothing else can have become garbage since
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
