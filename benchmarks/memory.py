"""Memory: what tensors take at a time, to the byte, and what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf
from typing import Any

import psutil
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel

__all__ = ["available_memory", "in_gib", "measure_memory", "measure_memory_within", "measure_working_memory"]

_SPAN = "a module's call"


def measure_working_memory(work: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Runs something and returns the most bytes its tensors take at a time, on top of those that were there before.

    CUDA's allocator says so, or PyTorch's profiler elsewhere; unlike a process's memory it is the same each time.

    Example:
        ```python
        >>> import torch
        >>> from benchmarks.memory import measure_working_memory

        >>> measure_working_memory(lambda: torch.ones(1024) + torch.ones(1024))  # three vectors of 4 KiB
        12288

        ```
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
    return _peak(profiler.profiler.kineto_results.events())


def measure_memory_within(module: nn.Module, work: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Runs something and returns the most bytes that tensors take at a time while a module runs.

    They are counted on top of what there was when a call of the module began; it is the largest of its calls' peaks.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    before, peaks = [0], [0]
    span = record_function(_SPAN)

    def begin(*_: Any) -> None:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            before[0] = torch.cuda.memory_allocated(device)
        else:
            span.__enter__()

    def end(*_: Any) -> None:
        if on_gpu:
            peaks.append(torch.cuda.max_memory_allocated(device) - before[0])
        else:
            span.__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(begin, prepend=True), module.register_forward_hook(end)]
    try:
        if on_gpu:
            work()
            return int(max(peaks))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
    finally:
        for handle in handles:
            handle.remove()
    events = profiler.profiler.kineto_results.events()
    spans = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name() == _SPAN]
    return max((_peak(events, *span) for span in spans), default=0)


def _peak(events: Sequence[Any], start: float = -inf, end: float = inf) -> int:
    """The most bytes at a time that the profiler's events between two moments add up to."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((change for moment, change in changes if start <= moment <= end), initial=0))


def measure_memory(work: Callable[[], Any], *models: PreTrainedModel) -> dict[str, int]:
    """The bytes of models and of what they do."""
    weights = sum(model.get_memory_footprint() for model in models)
    working = measure_working_memory(work, models[0].device)
    return {"weights_bytes": weights, "working_bytes": working, "peak_bytes": weights + working}


def available_memory(device: torch.device | str = "cpu") -> int:
    """How many bytes are left on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    return int(psutil.virtual_memory().available)


def in_gib(number: float) -> str:
    """A number of bytes for people.

    Example:
        ```python
        >>> from benchmarks.memory import in_gib

        >>> in_gib(3 * 2**29)
        '1.5 GiB'

        ```
    """
    return f"{number / 2**30:.1f} GiB"
