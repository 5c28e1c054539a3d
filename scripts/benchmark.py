"""Measures speed and memory on random models of real shapes, by `transformers-sgl bench`, for the README's tables.

    python scripts/benchmark.py --work speed

On a GPU: InternVL 26B guided by 2B in bfloat16, as they are. On a CPU: both in float32, their widths divided by 8, and
by 16 where something grows and much has to be run, which is then not repeated as often. Further options are those of
the command and win over these. `--work` keeps what was measured, part by part, so that a run that was cut off goes on
with the same command. All figures and the tables made of them go to `benchmarks/speed.json`, from which
`scripts/render_tables.py` fills the README, and the plots beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from transformers_sgl.cli import main as transformers_sgl
from transformers_sgl.evaluation.benchmark_report import make_tables

ROOT = Path(__file__).parents[1]
PAIR = ["--large", "internvl-26b", "--small", "internvl-2b", "--image-size", "896x1344"]
OF_DEVICE = {"cuda": ["--device", "cuda", "--dtype", "bfloat16"], "cpu": ["--device", "cpu", "--dtype", "float32"]}
# Guidance is cheap, and its differences are small: it is timed more often.
RUNS = {
    "guidance": ["--parts", "startup,guidance", "--rounds", "9"],
    "large": ["--parts", "prefill,decode,end-to-end", "--rounds", "3"],
    "tokens": ["--parts", "break-even-tokens,growth-tokens", "--rounds", "3", "--sweep-rounds", "2"],
    "answers": [
        *("--parts", "drafts,break-even-answers,break-even-sizes,growth-batches,growth-answers"),
        *("--rounds", "1", "--sweep-rounds", "1"),
    ],
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
    arguments, more = parser.parse_known_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs: dict[str, dict[str, Any]] = {}
    for name in arguments.runs.split(","):
        folder = arguments.work / name
        options = [*PAIR, *OF_DEVICE[device], *RUNS[name], "--shrink", SHRINK[device][name], *more]  # the last wins
        if transformers_sgl(["bench", *options, "--out", str(folder)]) != 0:
            raise SystemExit("Nothing was written.")
        runs[name] = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
        if (folder / "benchmark.png").exists():
            figure = arguments.output.with_name(f"{arguments.output.stem}_{name}.png")
            shutil.copy(folder / "benchmark.png", figure)
            print(f"written: {figure}")

    last = list(runs.values())[-1]
    record = {
        **{name: last[name] for name in ("machine", "versions", "seed", "date")},
        "tables": joined([make_tables(run) for run in runs.values()]),
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


def joined(parts: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The tables of all runs; one that two of them have gets the rows of both."""
    tables: dict[str, dict[str, Any]] = {}
    for name, table in ((name, table) for part in parts for name, table in part.items()):
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
