"""Measures speed and memory on random models of real shapes, by `transformers-sgl bench`, for the README's tables.

    python scripts/benchmark.py --work speed

On a GPU: InternVL 26B guided by 2B in bfloat16, as they are. On a CPU: both in float32, their widths divided by 8, and
by 16 where something grows and much has to be run, which is then not repeated as often. Further options are those of
the command and win over these. `--work` keeps what was measured, part by part, so that a run that was cut off goes on
with the same command. All figures and the tables made of them go to `benchmarks/speed.json` after every part, from
which `scripts/render_tables.py` fills the README, and the plots beside it. A part that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from transformers_sgl.cli import main as transformers_sgl
from transformers_sgl.evaluation.benchmark_report import make_tables
from transformers_sgl.evaluation.benchmark_run import find_parts
from transformers_sgl.storage.files import write_atomically

ROOT = Path(__file__).parents[1]
PAIR = ["--large", "internvl-26b", "--small", "internvl-2b", "--image-size", "896x1344"]
OF_DEVICE = {"cuda": ["--device", "cuda", "--dtype", "bfloat16"], "cpu": ["--device", "cpu", "--dtype", "float32"]}
# Guidance is cheap, and its differences are small: it is timed more often.
RUNS = {
    "guidance": ("startup,guidance", ["--rounds", "9"]),
    "large": ("prefill,decode,end-to-end", ["--rounds", "3"]),
    "tokens": ("break-even-tokens,growth-tokens", ["--rounds", "3", "--sweep-rounds", "2"]),
    "answers": (
        "drafts,break-even-answers,break-even-sizes,growth-batches,growth-answers",
        ["--rounds", "1", "--sweep-rounds", "1"],
    ),
}
SHRINK = {
    "cuda": dict.fromkeys(RUNS, "1"),
    "cpu": {"guidance": "8", "large": "8", "tokens": "16", "answers": "16"},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what was measured, part by part")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "speed.json")
    parser.add_argument("--runs", default=",".join(RUNS), help=f"some of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--parts", default="all", help="only these of the runs' parts, in this order (default: all)")
    arguments, more = parser.parse_known_args(argv)

    asked = [part for name in arguments.parts.split(",") for part in find_parts(name)]
    runs = {part: run for run in arguments.runs.split(",") for part in find_parts(RUNS[run][0])}
    failed = []
    for part in (part for part in asked if part in runs):
        if not is_measured(runs[part], part, arguments.work / runs[part], more):
            failed.append(part)
        write(arguments.work, arguments.output)
    if not list(arguments.work.glob("*/benchmark.json")):
        raise SystemExit("Nothing was written.")
    if failed:
        raise SystemExit(f"Not measured: {', '.join(failed)}.")


def is_measured(run: str, part: str, folder: Path, more: Sequence[str]) -> bool:
    """Measures a part, beside those of its run that have been measured, and tells whether that went well."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [name for name in find_parts(RUNS[run][0]) if name == part or (folder / f"{name}.json").exists()]
    options = [*PAIR, *OF_DEVICE[device], *RUNS[run][1], "--shrink", SHRINK[device][run], *more]  # the last wins
    gc.collect()  # the models of the part before
    try:
        status = transformers_sgl(["bench", *options, "--parts", ",".join(parts), "--out", str(folder)])
    except Exception:  # whatever it is, it is this part's, and is told
        traceback.print_exc()
        return False
    if status == 130:  # stopped by the user
        raise SystemExit(status)
    return status == 0


def write(work: Path, output: Path) -> None:
    """Writes all figures that there are in the work folder, and what is made of them."""
    runs: dict[str, dict[str, Any]] = {}
    for run in RUNS:
        folder = work / run
        if not (folder / "benchmark.json").exists():
            continue
        runs[run] = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
        if (folder / "benchmark.png").exists():
            shutil.copy(folder / "benchmark.png", output.with_name(f"{output.stem}_{run}.png"))
    if not runs:
        return
    heads = [{name: record[name] for name in ("machine", "versions", "seed")} for record in runs.values()]
    if any(head != heads[0] for head in heads):
        raise SystemExit(f"{work} holds figures of several machines, versions or seeds: give another --work.")
    head = {**heads[0], "date": max(record["date"] for record in runs.values())}
    tables = joined([make_tables(record) for record in runs.values()])
    write_atomically(output, json.dumps({**head, "tables": tables, "runs": runs}, indent=1) + "\n")
    print(f"written: {output}", file=sys.stderr)


def joined(parts: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The tables of all runs; one that two of them have gets the rows of both."""
    tables: dict[str, dict[str, Any]] = {}
    for name, table in ((name, table) for part in parts for name, table in part.items() if table["rows"]):
        if name not in tables:
            tables[name] = table
            continue
        first = tables[name]
        conditions = table["caption"][table["caption"].index("Shapes of") :]
        caption = f"{first['caption']} From the row of {table['rows'][0][0]} on: {conditions}"
        tables[name] = {**first, "rows": [*first["rows"], *table["rows"]], "caption": caption}
    return tables


if __name__ == "__main__":
    main()
