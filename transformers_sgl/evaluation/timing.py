"""Timing: several ways to do the same work, measured side by side.

A machine is never equally fast for long, so the contenders take turns (A, B, A, B, ...), and what is compared are the
two times of one round: the ratio of two ways is the median of their ratios in each round, with the least and the
greatest beside it, and not the ratio of two medians.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "now_ms", "ratio", "spread", "take_turns"]


@dataclass(frozen=True)
class Timing:
    """How long something took, round by round.

    Attributes:
        samples: Milliseconds, one entry for each round.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over the rounds, in milliseconds."""
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        """The shortest round, in milliseconds."""
        return min(self.samples)

    @property
    def max(self) -> float:
        """The longest round, in milliseconds."""
        return max(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON.

        Returns:
            `dict`: `median_ms`, `min_ms`, `max_ms` and `samples_ms`.
        """
        return {
            "median_ms": self.median,
            "min_ms": self.min,
            "max_ms": self.max,
            "samples_ms": list(self.samples),
        }


def take_turns(
    contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device | str = "cpu", warmup: int = 1
) -> dict[str, Timing]:
    """Times several things in turn: A, B, A, B, ..., each until the device has finished it.

    Python's garbage collector runs between the rounds and not within them; what a contender returns is forgotten.

    Args:
        contenders (`dict` from `str` to `Callable`): What to time, by name.
        rounds (`int`): How often each has its turn.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where they run.
        warmup (`int`, defaults to 1): How many rounds go before and do not count.

    Returns:
        `dict` from `str` to [`Timing`]: By the same names.

    Raises:
        ValueError: If there is no round.

    Example:
        ```python
        >>> import time
        >>> from transformers_sgl.evaluation.timing import ratio, take_turns

        >>> timings = take_turns({"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.03)}, rounds=3)
        >>> len(timings["long"].samples), ratio(timings["long"], timings["short"])["min"] > 1
        (3, True)

        ```
    """
    if rounds < 1:
        raise ValueError(f"`rounds` is {rounds}: pass a whole number of 1 or more.")
    device = torch.device(device)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        with _uncollected():
            for name, run in contenders.items():
                start = now_ms(device)
                run()
                took = now_ms(device) - start
                if number >= warmup:
                    samples[name].append(took)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def ratio(of: Timing, to: Timing) -> dict[str, float]:
    """How many times as long one took as the other, within each round.

    Args:
        of ([`Timing`]): The one.
        to ([`Timing`]): The other, from the same rounds.

    Returns:
        `dict`: `median`, `min` and `max` of the rounds' ratios.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.timing import Timing, ratio

        >>> ratio(Timing((2.0, 8.0, 3.0)), to=Timing((1.0, 2.0, 1.0)))
        {'median': 3.0, 'min': 2.0, 'max': 4.0}

        ```
    """
    return spread([mine / other for mine, other in zip(of.samples, to.samples, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """The middle and the ends of some values.

    Args:
        values (`Sequence[float]`): At least one.

    Returns:
        `dict`: `median`, `min` and `max`.
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def now_ms(device: torch.device) -> float:
    """The clock, once the device has done all that it was asked to.

    Args:
        device (`torch.device`): The device to wait for.

    Returns:
        `float`: Milliseconds from a moment that does not matter.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()


@contextmanager
def _uncollected() -> Any:
    """Takes the rubbish out, and then leaves what comes together inside until later."""
    gc.collect(1)  # what is young: nothing else can have become rubbish since
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
