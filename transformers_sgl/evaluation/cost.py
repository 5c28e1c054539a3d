"""Cost: operations and memory of a method's answers, counted on a few batches that are not timed.

Floating-point operations are counted by PyTorch's own counter while the method runs, so everything is in the count:
both models and their vision encoders, recorded attention, the consistency pass, rejected drafts, padding. The formula
is `2 * m * k * n` for the product of an `(m, k)` and a `(k, n)` matrix, likewise for convolutions, and
`2 * queries * keys * (key width + value width)` for each head of an attention, masked or not. Attention kernels are
registered here: PyTorch's counter leaves out the CPU's until 2.14, and 2.11 refuses heads that share their keys.

Where a pair answers, the operations are also told apart: the large model's vision encoder, its decoder, and all else,
which is the small model.

Peak memory includes the weights of both models: on CUDA devices what PyTorch allocated, elsewhere (Linux) the
process's resident memory.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from transformers_sgl.architectures import decoder

__all__ = ["Cost", "flop_counter", "measure_cost"]

_CLEAR_PEAK = "5"  # makes Linux forget a process's peak memory; see proc_pid_clear_refs(5)
# The attention kernels, and which of their arguments after query, key and value tells whether it is causal.
_ATTENTION_KERNELS = {
    "flash_attention": 1,
    "flash_attention_for_cpu": 1,
    "efficient_attention": 3,
    "cudnn_attention": 3,
}


@dataclass(frozen=True)
class Cost:
    """What answering a batch took."""

    flops: int  # floating-point operations of the whole batch
    peak_memory_bytes: int | None  # the most memory held at a time; `None` where the system does not tell
    vision_flops: int = 0  # those of the large model's vision encoder
    decoder_flops: int = 0  # those of its decoder; the rest is the small model's


def measure_cost(
    answer: Callable[[], Any], device: torch.device | str = "cpu", large: PreTrainedModel | None = None
) -> Cost:
    """Runs something and counts; that takes longer than usual, so time is not measured.

    Of the `large` model's operations it tells its vision encoder's and its decoder's.
    """
    vision, of_decoder = ([], []) if large is None else _parts(large)
    with ExitStack() as stack:
        peak = stack.enter_context(_peak_memory(torch.device(device)))
        counter = stack.enter_context(flop_counter())
        flops = [stack.enter_context(_flops_within(modules, counter)) for modules in (vision, of_decoder)]
        answer()
    return Cost(counter.get_total_flops(), peak[0] if peak else None, *(total for (total,) in flops))


def _parts(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules of a model's vision encoder, whatever encloses them, and those of its decoder."""
    of_decoder: list[nn.Module] = [decoder(model), model.get_output_embeddings()]
    path = next(name for name, module in model.named_modules() if module is of_decoder[0]).split(".")
    parents = (model.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    beside = [
        child
        for parent, name in zip(parents, path, strict=True)
        for key, child in parent.named_children()
        if key != name
    ]
    return [module for module in beside if module is not of_decoder[1]], of_decoder


@contextmanager
def _flops_within(modules: Sequence[nn.Module], counter: FlopCounterMode) -> Iterator[list[int]]:
    """Adds up, in a list of one number, what is counted while one of the modules runs."""
    total = [0]

    def begin(*_: Any) -> None:
        total[0] -= counter.get_total_flops()

    def end(*_: Any) -> None:
        total[0] += counter.get_total_flops()

    handles = [
        handle
        for module in modules
        for handle in (
            module.register_forward_pre_hook(begin, prepend=True),
            module.register_forward_hook(end, always_call=True),
        )
    ]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def flop_counter(halves_causal: bool = False) -> FlopCounterMode:
    """PyTorch's counter, for all attention kernels; `halves_causal` counts only half of a causal attention."""
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
    """The operations of an attention of shapes `(batch, heads, length, width)`."""
    batch_size, num_heads, num_queries, width = query
    pairs = num_queries * key[2]
    if is_causal_at is not None and num_queries == key[2]:
        is_causal = more[is_causal_at] if len(more) > is_causal_at else named.get("is_causal", False)
        pairs -= num_queries * (num_queries - 1) // 2 if is_causal else 0
    return int(2 * batch_size * num_heads * pairs * (width + value[3]))


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
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    peak += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]  # it is in kB


def _give_back_free_memory() -> None:
    """Memory that earlier work freed would still count as the process's."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
