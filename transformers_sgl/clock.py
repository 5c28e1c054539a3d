"""The one clock of the package."""

from __future__ import annotations

import time

import torch

__all__ = ["now_ms"]


def now_ms(*devices: torch.device) -> float:
    """Waits for all work queued on the devices, then reads the clock.

    Args:
        *devices (`torch.device`): The devices to wait for; a CPU has no queue.

    Returns:
        `float`: Milliseconds since an arbitrary moment.
    """
    for device in {device for device in devices if device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return 1000 * time.perf_counter()
