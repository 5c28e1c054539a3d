"""Mutated bundles and recipes: loaded or refused in one sentence, soon, in little memory, and none of their code runs.

`SGL_MUTATIONS=2000` runs more cases than a test can wait for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytestmark = [pytest.mark.mechanics, pytest.mark.skipif(sys.platform != "linux", reason="limits a child's memory")]

CASES = int(os.environ.get("SGL_MUTATIONS", "60"))


def test_every_mutation_ends_in_a_pair_or_in_a_sentence() -> None:
    command = [sys.executable, str(Path(__file__).with_name("mutations.py")), "--cases", str(CASES)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # transformers prints, too, perhaps in front of a result.
    lines = (line[line.index(start) :] for line in run.stdout.splitlines() if (start := '{"number"') in line)
    results = [json.loads(line) for line in lines]
    counts = Counter(result["outcome"] for result in results)
    print(dict(counts), max(result["seconds"] for result in results))
    bad = [result for result in results if result["outcome"] not in ("loaded", "refused", "stock")]
    assert not bad, bad[:3]
    assert len(results) == CASES
    # The Auto classes read `config.json` and `processor_config.json` before this package is asked.
    assert counts["stock"] <= CASES // 20
    assert counts["refused"] >= CASES // 4
