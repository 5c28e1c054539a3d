"""What every measurement says about itself, and what the records of a run depend on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from transformers_sgl import __version__
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.storage.identity import fingerprint, fingerprint_in_memory
from transformers_sgl.transformers_interface import newest_commit

__all__ = ["measurement_record", "pair_facts"]


def measurement_record(seed: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, versions, seed and date, as they stand at the head of every benchmark's JSON."""
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


def pair_facts(model: Any, source: str | Path | None, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """What the records of a run depend on as far as the pair goes, for `run.json`.

    `source` is where the pair was loaded from, `None` for one that was given as an object; `without` names settings
    that the records do not depend on.
    """
    settings = SGLGenerationConfig.from_generation_config(model.generation_config)
    for setting in without:
        setattr(settings, setting, None)
    if source is None:
        name: str = model.name_or_path
        weights: str | None = fingerprint_in_memory(model)
    elif Path(source).is_dir():
        name, weights = str(Path(source).resolve()), fingerprint(Path(source))
    else:
        name, weights = str(source), newest_commit(str(source))
    return {
        "model": name,
        "weights": weights,
        "dtype": [str(part.dtype) for part in (model.large, model.small)],
        "generation_config": json.loads(settings.to_json_string(ignore_metadata=True)),
        "transformers_sgl": __version__,
    }


def _processor_name() -> str:
    """The processor's name as the system tells it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()
