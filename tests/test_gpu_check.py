"""The script around the tests and the benchmark: what it starts, says and returns; neither of the two is run here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEED = {
    "tables": {"speed-end-to-end": {"columns": ["way", "ms"], "rows": [["large model alone", 12]], "caption": ""}}
}
# Takes the place of Python: notes what is asked, and does nothing but what PRETEND says: for a word in the command,
# how long it takes and with which status it ends.
STAND_IN = """#!{python}
import json, os, sys, time
words = sys.argv[1:]
if words[0] == "-" and not words[1].endswith("speed.json"):  # the check of the packages
    sys.stdin.read()
    print(os.environ["DEVICE"], *(word for word in words[1:]))
    print("a machine")
    sys.exit()
if words[0] == "-":
    os.execv({python!r}, [{python!r}, *words])
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps([words, os.environ["PYTHONPATH"]]) + "\\n")
print("words of", *words[:2])
sys.stdout.flush()
name = words[words.index("--parts") + 1] if "--parts" in words else "tests"
seconds, status = json.loads(os.environ["PRETEND"]).get(name, (0, 0))
time.sleep(seconds)
if status == 0 and name != "tests":
    with open(words[words.index("--record") + 1], "w") as file:
        file.write(os.environ["SPEED"])
sys.exit(status)
"""


def check(
    folder: Path, *arguments: str, device: str = "cuda", **pretend: tuple[float, int]
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """The script's end, and the commands that it gave."""
    stand_in, asked = folder / "python", folder / "asked.jsonl"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    names = {name.replace("_", "-"): what for name, what in pretend.items()}
    environment = {
        **os.environ,
        "PYTHON": str(stand_in),
        "DEVICE": device,
        "ASKED": str(asked),
        "PRETEND": json.dumps(names),
        "SPEED": json.dumps(SPEED),
        "PYTHONPATH": "elsewhere",
    }
    environment.pop("GPU_CHECK_SECONDS", None)
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(folder / "out"), *arguments]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in asked.read_text().splitlines()] if asked.exists() else []
    assert {path for _, path in lines} <= {f"{ROOT}:elsewhere"}
    return result, [words for words, _ in lines]


def parts_of(asked: list[list[str]]) -> list[str]:
    return [words[words.index("--parts") + 1] for words in asked if "--parts" in words]


def test_tests_come_first_and_then_the_most_telling_part(tmp_path: Path) -> None:
    result, asked = check(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    tests, first, *_ = asked
    assert tests[:4] == ["-m", "pytest", "-m", "gpu"]
    with_mark = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/**/test_*.py")
        if "\n@pytest.mark.gpu" in path.read_text()
    }
    assert with_mark <= set(tests)
    assert first[:2] == ["-m", "benchmarks"]
    assert "--shrink" not in first  # the models as they are
    assert parts_of(asked)[:3] == ["end-to-end", "prefill", "guidance"]
    assert "large model alone | 12" in result.stdout
    assert "no test and no part failed" in result.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    records = ["speed.json", "speed_methods.json", "speed_rounds.json"]
    assert names == ["benchmark.txt", *records, "summary.txt", "tests.txt"]


def test_without_a_gpu_everything_is_shrunk(tmp_path: Path) -> None:
    result, asked = check(tmp_path, device="cpu")
    assert result.returncode == 0
    assert all("--shrink" in words for words in asked if "--parts" in words)


def test_what_fails_stops_nothing_and_is_told(tmp_path: Path) -> None:
    result, asked = check(tmp_path, tests=(0, 1), prefill=(0, 1))
    assert result.returncode == 1
    assert parts_of(asked)[:3] == ["end-to-end", "prefill", "guidance"]
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "tests: FAILED with status 1" in summary
    assert "prefill: FAILED with status 1" in summary
    assert "guidance: done" in summary
    assert "words of -m benchmarks" in result.stdout  # the end of the log


def test_what_takes_too_long_is_cut_off_and_the_rest_left_out(tmp_path: Path) -> None:
    result, asked = check(tmp_path, "12", tests=(30, 0))
    assert parts_of(asked) == []
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "tests: cut off after" in summary
    assert "end-to-end: left out, since" in summary
    assert result.returncode == 1  # the tests did not come to their end


@pytest.mark.parametrize("word", ["wrapt", "torch"])
def test_missing_packages_are_named_before_anything_runs(tmp_path: Path, word: str) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # one that finds no package at all
    bare.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(bare)}
    environment.pop("PYTHONPATH", None)
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("Missing: ")
    assert word in result.stderr
    assert "pip download --no-deps -d wheels" in result.stderr
    assert result.stderr.count("\n") == 1
