"""Records: what every measurement says about itself, and files that survive a run that is cut off.

A run owns a folder. `run.json` says what its records depend on, so that those of another run are never mixed in; the
records are JSON lines, each written whole or not at all, so that a run goes on where it was.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from transformers_sgl import __version__
from transformers_sgl.generation_config_sgl import SGLGenerationConfig
from transformers_sgl.storage.files import write_atomically
from transformers_sgl.storage.identity import fingerprint, fingerprint_in_memory
from transformers_sgl.transformers_interface import newest_commit

__all__ = ["check_claim", "claim", "measurement_record", "not_a_record", "pair_facts", "read_lines"]


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


def claim(folder: Path, facts: dict[str, Any]) -> None:
    """Makes the folder this run's, or raises if it is another's; nothing is touched then."""
    check_claim(folder, facts, complete=True)
    if not (folder / "run.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "run.json", json.dumps(facts, indent=2) + "\n")


def check_claim(folder: Path, facts: dict[str, Any], *, complete: bool = False) -> None:
    """Raises if the folder is another run's, as far as that is known; nothing is touched."""
    cure = f"give another `out`, or delete the folder {str(folder)!r}"
    file = folder / "run.json"
    if not file.exists():
        if (folder / "samples.jsonl").exists():
            raise ValueError(f"{str(folder)!r} holds records, but no run.json that says what they are of: {cure}.")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {**found, **facts} if complete else facts
        different = [name for name in names if found.get(name) != facts.get(name)]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as the record of a run: {cure}.") from error
    if different:
        raise ValueError(
            f"{str(folder)!r} holds the records of another run, which differs in {' and '.join(different)}: {cure}."
        )


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of an earlier call. A last line that was cut off is taken away; its sample is run again."""
    if not file.exists():
        return
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
        except ValueError as error:
            raise not_a_record(file, number, error) from error
        yield number, fields


def not_a_record(file: Path, number: int, error: Exception) -> ValueError:
    """What to raise where a line is not what the run writes."""
    return ValueError(
        f"{str(file)!r}, line {number}: this is no record of a sample ({error}); delete the folder "
        f"{str(file.parent)!r} to run all samples again."
    )


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
