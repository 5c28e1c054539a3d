"""Start-up: importing the package, and loading a pair.

Both are compared with what a user of stock transformers waits for anyway: importing it, and loading the pair's two
models one after the other. Things that are compared take turns.

Imports are timed inside processes of their own, from their first statement on; Python's own start is not counted.
Loading is timed in this process, after a first time that is not counted. That also brings every file that is imported
into the operating system's cache, so that no import pays for the disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText

from benchmarks.timing import spread

__all__ = ["measure_startup"]

# What processes execute; of those that hold transformers, the second statement is what a user writes next.
_AUTO_CLASS = "from transformers import AutoModelForImageTextToText"
_STATEMENTS = {
    "transformers": ("import transformers", _AUTO_CLASS),
    "transformers and transformers_sgl": ("import transformers, transformers_sgl", _AUTO_CLASS),
    "transformers_sgl": ("import transformers_sgl",),
}

# Prints how many seconds after its start each of the statements was done.
_TIME_STATEMENTS = """
import json, sys, time
start, seconds = time.perf_counter(), []
for statement in sys.argv[1:]:
    exec(statement)
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def measure_startup(pair: Path, rounds: int = 5) -> dict[str, Any]:
    """Measures how long importing the package and loading a pair take, beside stock transformers.

    Args:
        pair (`Path`): A bundle: a folder with `large/` and `small/`.
        rounds (`int`, defaults to 5): How often everything is measured.

    Returns:
        `dict`: Ready for JSON. `import_s` holds the seconds of `import transformers`, of the same with
        `transformers_sgl` behind it, and of `import transformers_sgl` alone; `auto_class_s`, of the first two, the
        seconds until `AutoModelForImageTextToText` is imported as well; `load_s` those of `from_pretrained` of the two
        models alone and of the pair. Each is a `dict` of median, min and max. So are `import_ratio`,
        `auto_class_ratio` and `load_ratio`: with this package over without it, in each round.

    Raises:
        OSError: If there is no bundle.
        ValueError: If `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` is {rounds}: measure at least once.")
    models, whole = _loading_seconds(pair, rounds)
    imported: dict[str, list[float]] = defaultdict(list)
    auto_class: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, statements in _STATEMENTS.items():
            for measured, seconds in zip((imported, auto_class), _seconds_until(*statements), strict=False):
                measured[name].append(seconds)
    return {
        "rounds": rounds,
        "import_s": {name: spread(seconds) for name, seconds in imported.items()},
        "import_ratio": _ratio(imported["transformers and transformers_sgl"], imported["transformers"]),
        "auto_class_s": {name: spread(seconds) for name, seconds in auto_class.items()},
        "auto_class_ratio": _ratio(auto_class["transformers and transformers_sgl"], auto_class["transformers"]),
        "load_s": {"two models": spread(models), "pair": spread(whole)},
        "load_ratio": _ratio(whole, models),
    }


def _seconds_until(*statements: str) -> list[float]:
    """How many seconds after its start a fresh process is done with each statement."""
    command = [sys.executable, "-c", _TIME_STATEMENTS, *statements]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def _loading_seconds(pair: Path, rounds: int) -> tuple[list[float], list[float]]:
    """How many seconds it takes to load the two models alone, and the pair."""
    contenders = ([pair / "large", pair / "small"], [pair])
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + rounds):
        for folders, measured in zip(contenders, seconds, strict=True):
            start = time.perf_counter()
            loaded = [AutoModelForImageTextToText.from_pretrained(folder, dtype="auto") for folder in folders]
            measured.append(time.perf_counter() - start)
            del loaded  # the next may need its memory
    return seconds[0][1:], seconds[1][1:]


def _ratio(values: Sequence[float], stock: Sequence[float]) -> dict[str, float]:
    return spread([value / other for value, other in zip(values, stock, strict=True)])
