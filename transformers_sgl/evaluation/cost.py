"""Cost: what a method's answers take beside time, counted on a few batches that are not timed.

Floating-point operations are counted by PyTorch's own counter while the method runs, so everything is in the count:
both models and their vision encoders, recorded attention, the consistency pass, drafts that were rejected, padding.
Its formula is `2 * m * k * n` for the product of an `(m, k)` and a `(k, n)` matrix, for convolutions likewise, and
`2 * queries * keys * (key width + value width)` for each head of an attention, masked or not. The last we tell it for
all of PyTorch's attention kernels: until 2.14 it leaves out the CPU's, and 2.11 refuses heads that share their keys.

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
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Cost", "available_memory", "flop_counter", "measure_cost", "measure_working_memory"]

_CLEAR_PEAK = "5"  # what makes Linux forget a process's peak memory; see proc_pid_clear_refs(5)

# The attention kernels, and which of their arguments, counted from query, key and value on, says whether it is causal.
_ATTENTION_KERNELS = {
    "flash_attention": 1,
    "flash_attention_for_cpu": 1,
    "efficient_attention": 3,
    "cudnn_attention": 3,
}


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
    with _peak_memory(torch.device(device)) as peak, flop_counter() as counter:
        answer()
    return Cost(counter.get_total_flops(), peak[0] if peak else None)


def flop_counter(halves_causal: bool = False) -> FlopCounterMode:
    """PyTorch's counter, which counts every attention kernel alike.

    Args:
        halves_causal (`bool`, defaults to `False`): Whether only the half of a causal attention counts that is needed,
            which is what kernels compute.

    Returns:
        `FlopCounterMode`: A context; `get_total_flops()` tells the count.

    Example:
        ```python
        >>> import torch
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> from transformers_sgl.evaluation.cost import flop_counter

        >>> query, key = torch.ones(1, 4, 10, 8), torch.ones(1, 2, 10, 8)
        >>> with flop_counter() as counter:
        ...     _ = scaled_dot_product_attention(query, key, key, enable_gqa=True)
        >>> counter.get_total_flops() == 4 * 2 * 10 * 10 * (8 + 8)
        True

        ```
    """
    kernels = {
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}"): partial(
            _attention_flops, is_causal_at=place if halves_causal else None
        )
        for name, place in _ATTENTION_KERNELS.items()
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *more: Any, is_causal_at: int | None, **named: Any
) -> int:
    """Those of an attention, of which the counter tells the shapes `(batch, heads, length, width)`."""
    batch_size, num_heads, num_queries, width = query
    pairs = num_queries * key[2]
    if is_causal_at is not None and num_queries == key[2]:
        is_causal = more[is_causal_at] if len(more) > is_causal_at else named.get("is_causal", False)
        pairs -= num_queries * (num_queries - 1) // 2 if is_causal else 0
    return int(2 * batch_size * num_heads * pairs * (width + value[3]))


def measure_working_memory(work: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Runs something and sees how much memory its tensors take at a time, on top of those that were there before.

    That is what the allocator says on CUDA devices and PyTorch's profiler elsewhere: to the byte, and the same each
    time, unlike the memory of a process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        work()  # what libraries keep for themselves from their first call on is not the work's
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device)) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def available_memory(device: torch.device | str = "cpu") -> int | None:
    """How many bytes there are still to be had."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Holds the most memory of what runs inside, in bytes; nothing where the system does not tell."""
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    if not sys.platform.startswith("linux"):
        yield peak
        return
    _give_back_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:  # some containers do not allow it
        yield peak
        return
    yield peak
    most = _kilobytes(Path("/proc/self/status"), "VmHWM")
    peak += [] if most is None else [most]


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
