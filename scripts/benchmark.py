"""Measures speed and memory on random models of real shapes, by `transformers-sgl bench`, for the README's tables.

    python scripts/benchmark.py --work speed

On a GPU: InternVL 26B guided by 2B in bfloat16, as they are. On a CPU: both in float32, their widths divided by 8.
Further options are those of the command and win over these. `--work` keeps what was measured, part by part, so that a
run that was cut off goes on with the same command. All figures and the tables made of them go to
`benchmarks/speed.json`, from which `scripts/render_tables.py` fills the README, and the plot to
`benchmarks/speed.png`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from transformers_sgl.cli import main as transformers_sgl
from transformers_sgl.evaluation.benchmark_report import make_tables

ROOT = Path(__file__).parents[1]
PAIR = ["--large", "internvl-26b", "--small", "internvl-2b", "--image-size", "896x1344"]
OF_DEVICE = {
    "cuda": ["--device", "cuda", "--dtype", "bfloat16", "--shrink", "1", "--rounds", "10"],
    "cpu": ["--device", "cpu", "--dtype", "float32", "--shrink", "8", "--rounds", "5"],
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for what was measured, part by part")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "speed.json")
    arguments, more = parser.parse_known_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = [*PAIR, *OF_DEVICE[device], *more]  # of two the last wins
    if transformers_sgl(["bench", *options, "--out", str(arguments.work)]) != 0:
        raise SystemExit("Nothing was written.")
    record = json.loads((arguments.work / "benchmark.json").read_text(encoding="utf-8"))
    head = {name: record.pop(name) for name in ("machine", "versions", "seed", "date")}
    text = json.dumps({**head, "tables": make_tables({**head, **record}), **record}, indent=1)
    arguments.output.write_text(text + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")
    figure = arguments.work / "benchmark.png"
    if figure.exists():
        shutil.copy(figure, arguments.output.with_suffix(".png"))
        print(f"written: {arguments.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
