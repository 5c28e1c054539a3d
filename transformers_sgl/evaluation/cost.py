"""Cost: what a method's answers take beside time, counted on a few batches that are not timed.

Floating-point operations are counted by PyTorch's own counter while the method runs, so everything is in the count:
both models and their vision encoders, recorded attention, the consistency pass, drafts that were rejected, padding.
Its formula is `2 * m * k * n` for the product of an `(m, k)` and a `(k, n)` matrix, for convolutions likewise, and
`2 * queries * keys * (key width + value width)` for each head of an attention, masked or not.

Peak memory holds the weights of both models, whichever runs: on CUDA devices what PyTorch allocated, elsewhere (Linux)
the process's resident memory.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "measure_cost"]

_CLEAR_PEAK = "5"  # what makes Linux forget a process's peak memory; see proc_pid_clear_refs(5)


@dataclass(frozen=True)
class Cost:
    """What answering a batch took.

    Attributes:
        flops: Floating-point operations of the whole batch.
        peak_memory_bytes: The most memory held at a time; `None` where the system does not tell.
    """

    flops: int
    peak_memory_bytes: int | None


def measure_cost(answer: Callable[[], Any], device: torch.device | str = "cpu") -> Cost:
    """Runs something and counts; it takes longer than usual, so time is not taken.

    Args:
        answer (`Callable`): What to run.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where it runs.

    Returns:
        [`Cost`]: What it took.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl.evaluation.cost import measure_cost

        >>> layer = torch.nn.Linear(10, 20, bias=False)
        >>> measure_cost(lambda: layer(torch.ones(3, 10))).flops == 2 * 3 * 10 * 20
        True

        ```
    """
    with _peak_memory(torch.device(device)) as peak, FlopCounterMode(display=False) as counter:
        answer()
    return Cost(counter.get_total_flops(), peak[0] if peak else None)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Holds the most memory of what runs inside, in bytes; nothing where the system does not tell."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    forget, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not sys.platform.startswith("linux"):
        yield peak
        return
    _give_back_free_memory()
    try:
        forget.write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:  # some containers do not allow it
        yield peak
        return
    yield peak
    lines = status.read_text(encoding="utf-8").splitlines()
    peak += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]


def _give_back_free_memory() -> None:
    """What earlier work freed would else still count as the process's."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
