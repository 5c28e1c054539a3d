"""Cost: what a method's answers take beside time, counted on a few batches that are not timed.

Floating-point operations are counted by PyTorch's own counter while the method runs, so everything is in the count:
both models and their vision encoders, recorded attention, the consistency pass, drafts that were rejected, padding.
Its formula is `2 * m * k * n` for the product of an `(m, k)` and a `(k, n)` matrix, for convolutions likewise, and
`2 * queries * keys * (key width + value width)` for each head of an attention, masked or not.

Peak memory holds the weights of both models, whichever runs: on CUDA devices what PyTorch allocated, elsewhere (Linux)
the process's resident memory. Working memory is what comes on top of what was held before.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "Memory", "available_memory", "measure_cost", "measure_memory"]

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
    with _watched_memory(torch.device(device)) as seen, FlopCounterMode(display=False) as counter:
        answer()
    return Cost(counter.get_total_flops(), seen[0].peak_bytes if seen else None)


@dataclass(frozen=True)
class Memory:
    """The memory that something took.

    Attributes:
        before_bytes: What was held before it began, weights included.
        peak_bytes: The most that was held at a time.
    """

    before_bytes: int
    peak_bytes: int

    @property
    def working_bytes(self) -> int:
        """What came on top of what was held before."""
        return max(0, self.peak_bytes - self.before_bytes)


def measure_memory(work: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 3) -> Memory | None:
    """Runs something several times and takes the time at which it needed least: whatever else goes on only adds.

    Args:
        work (`Callable`): What to run.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where it runs.
        repeats (`int`, defaults to 3): How often.

    Returns:
        [`Memory`]: What it took; `None` where the system does not tell.

    Example:
        ```python
        >>> import torch
        >>> from transformers_sgl.evaluation.cost import measure_memory

        >>> memory = measure_memory(lambda: torch.ones(2**24))  # 64 MiB
        >>> memory is None or memory.working_bytes > 2**25
        True

        ```
    """
    found: list[Memory] = []
    gc.collect(1)  # what is young; the old rubbish of a process takes long to find and does not grow
    for _ in range(repeats):
        with _watched_memory(torch.device(device)) as seen:
            work()
        found += seen
    return min(found, key=lambda memory: memory.working_bytes, default=None)


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """How many bytes there are still to be had.

    Args:
        device (`torch.device` or `str`, defaults to `"cpu"`): Where.

    Returns:
        `int`: The bytes; `None` where the system does not tell.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


@contextmanager
def _watched_memory(device: torch.device) -> Iterator[list[Memory]]:
    """Holds the memory that what runs inside took; nothing where the system does not tell."""
    seen: list[Memory] = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield seen
        seen.append(Memory(before, torch.cuda.max_memory_allocated(device)))
        return
    forget, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not sys.platform.startswith("linux"):
        yield seen
        return
    _give_back_free_memory()
    try:
        forget.write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:  # some containers do not allow it
        yield seen
        return
    resident = _kilobytes(status, "VmRSS")
    yield seen
    peak = _kilobytes(status, "VmHWM")
    if resident is not None and peak is not None:
        seen.append(Memory(resident, peak))


def _kilobytes(file: Path, name: str) -> int | None:
    """A line such as `VmHWM:   1234 kB` of one of Linux's own files, in bytes."""
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _give_back_free_memory() -> None:
    """What earlier work freed would else still count as the process's."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
