"""What every measurement says about itself: where, when, with what."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["measurement_record"]


def measurement_record(seed: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, versions, seed and date, as they stand at the head of every benchmark's JSON.

    Args:
        seed (`int`): What the measurement draws its randomness from.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the models ran.

    Returns:
        `dict`: The fields `machine`, `versions`, `seed` and `date` (UTC).

    Example:
        ```python
        >>> from transformers_sgl.evaluation.records import measurement_record

        >>> sorted(measurement_record(seed=0))
        ['date', 'machine', 'seed', 'versions']

        ```
    """
    device = torch.device(device)
    machine = f"{os.cpu_count()} cores of {_processor_name()}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    date = datetime.now(timezone.utc).date().isoformat()
    return {"machine": machine, "versions": versions, "seed": seed, "date": date}


def _processor_name() -> str:
    """The processor's name as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()
