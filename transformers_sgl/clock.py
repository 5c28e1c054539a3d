"""The one clock of the package."""

from __future__ import annotations

import time

import torch

__all__ = ["Clock", "now_ms"]


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


class Clock:
    """Wall-clock milliseconds of each step; waits for the devices to finish."""

    def __init__(self, *devices: torch.device) -> None:
        self._devices = devices
        self._started = self._last = now_ms(*devices)
        self._laps = {"guidance_ms": 0.0, "large_ms": 0.0}

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to those of this name."""
        now = now_ms(*self._devices)
        self._laps[name] += now - self._last
        self._last = now

    @property
    def timings(self) -> dict[str, float]:
        """The laps and their total."""
        return {**self._laps, "total_ms": self._last - self._started}
