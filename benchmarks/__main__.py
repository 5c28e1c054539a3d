"""The command `python -m benchmarks`.

What a user got wrong leaves as one sentence on standard error and exit code 2, before a model is made. A part that
fails is told and does not stop the others; the exit code is then 1. Ctrl-C ends with 130.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from typing import Any

from benchmarks import settings as benchmark_settings
from benchmarks.settings import PART_NAMES, BenchmarkSettings, check_settings, find_parts
from benchmarks.shapes import SHAPES

# torch and transformers are imported where they are needed: help and most errors do not wait for them.

_PROGRAM = "python -m benchmarks"
_CPU_SHRINK = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _measure(arguments)
    except (OSError, ValueError) as error:
        _say(str(error))
        return 2
    except KeyboardInterrupt:
        _say("Stopped; what was measured is kept.")
        return 130


def _say(text: str) -> None:
    print(f"{_PROGRAM}: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Measures what guidance costs, what pruning saves and when both models together are faster than "
        "the large one alone, on models with random weights, which need no download.",
        epilog=f"Shapes: {', '.join(SHAPES)}. Parts: {', '.join(PART_NAMES)}; break-even and growth stand for all of "
        "theirs. A run that was stopped goes on when the same command is given again; parts that were measured are "
        "kept.",
    )
    default = BenchmarkSettings()
    parser.add_argument("--large", metavar="SHAPE", default=default.large, help="shape of the large model")
    parser.add_argument("--small", metavar="SHAPE", default=default.small, help="shape of the small model")
    parser.add_argument(
        "--shrink",
        metavar="N",
        type=int,
        help=f"divide the widths of both models (default: 1 on a GPU, {_CPU_SHRINK} on a CPU)",
    )
    parser.add_argument(
        "--image-size", metavar="WxH", default="896x1344", help="width and height of the image in pixels (896x1344)"
    )
    for name, what in (
        ("shrink_depth", "divide the numbers of layers of both models"),
        ("prompt_tokens", "text tokens after the image"),
        ("answer_tokens", "tokens that are written"),
        ("batch_size", "prompts read at once, where one model alone is measured"),
        ("rounds", "how often each way is timed"),
        ("sweep_rounds", "the same at each point of the sweeps: drafts, break-even and growth"),
        ("seed", "what everything random is drawn from"),
    ):
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="N", type=int, default=value, help=f"{what} ({value})"
        )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        default=0,
        help="leave out of the sweeps what has more tokens, answers included (default: leave out nothing)",
    )
    parser.add_argument("--parts", metavar="P,...", default="all", help="some of those listed below (default: all)")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:0 (default: what the machine has)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type of the weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("benchmark"), help="folder for what is measured (./benchmark)"
    )
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        help="write figures, tables and the figure to FILE, too, after every part: benchmarks/results/speed.json is "
        "what the documentation shows",
    )
    return parser


def _measure(arguments: argparse.Namespace) -> int:
    # 1. What can be wrong is looked at before a model is made: names, packages, the machine.
    parts = find_parts(arguments.parts)
    settings = _settings(arguments)
    if find_spec("matplotlib") is None:
        raise OSError("The figure needs a package that is missing: pip install matplotlib.")
    settings = _on_device(settings, arguments)
    from benchmarks.run import run_benchmark
    from transformers_sgl.hub import embedded_pair
    from transformers_sgl.storage.files import check_writable_folder

    check_writable_folder(arguments.out)
    files = [arguments.out / "benchmark.json", *([arguments.record] if arguments.record else [])]
    check_writable_folder(files[-1].parent)

    # 2. Part after part; what an earlier call has measured is not measured again.
    missing: list[str] = []

    def announce(part: str) -> None:
        print(f"measuring {part} ...", file=sys.stderr, flush=True)

    def failed(part: str, error: Exception) -> None:
        missing.append(part)
        _tell(part, error, settings.device)

    written: list[Path] = []
    record: dict[str, Any] = {"parts": {}}
    for record in run_benchmark(settings, parts, arguments.out, embedded_pair(), announce, failed):
        written = _write(record, files)

    # 3. What came of it.
    if record["parts"]:
        from benchmarks.tables import as_markdown

        print(as_markdown(record["tables"]))
        print(f"\nwritten: {', '.join(map(str, written))}")
    if missing:
        _say(f"Not measured: {', '.join(missing)}.")
    return 1 if missing else 0


def _settings(arguments: argparse.Namespace) -> BenchmarkSettings:
    """The settings as they are given, checked; what depends on the device is still to be decided."""
    names = ["large", "small", "shrink_depth", "prompt_tokens", "answer_tokens", "batch_size"]
    names += ["rounds", "sweep_rounds", "seed", "max_tokens"]
    width, _, height = arguments.image_size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(
            f"--image-size is {arguments.image_size!r}: write width and height in pixels, such as 896x1344."
        )
    settings = benchmark_settings.BenchmarkSettings(
        **{name: getattr(arguments, name) for name in names},
        shrink=1 if arguments.shrink is None else arguments.shrink,
        image_size=(int(width), int(height)),
    )
    check_settings(settings)
    return settings


def _on_device(settings: BenchmarkSettings, arguments: argparse.Namespace) -> BenchmarkSettings:
    import torch

    from transformers_sgl.opening import check_device

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    on_gpu = torch.device(device).type == "cuda"
    return replace(
        settings,
        device=device,
        dtype=arguments.dtype or ("bfloat16" if on_gpu else "float32"),
        shrink=settings.shrink if on_gpu or arguments.shrink is not None else _CPU_SHRINK,
    )


def _tell(part: str, error: Exception, device: str) -> None:
    """Says why a part failed."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        _say(
            f"The part {part!r} does not fit into the memory of {device!r}: name smaller shapes, or pass a larger "
            "--shrink or a --max-tokens; what was measured before is kept."
        )
    elif isinstance(error, (OSError, ValueError)):
        _say(str(error))
    else:
        traceback.print_exception(error)


def _write(record: dict[str, Any], files: Sequence[Path]) -> list[Path]:
    """Writes figures, tables and the picture, and returns what was written."""
    from benchmarks.figure import draw_figure
    from benchmarks.tables import make_tables
    from transformers_sgl.storage.files import write_atomically

    if not record["parts"]:
        return []
    record["tables"] = make_tables(record)
    for file in files:
        write_atomically(file, json.dumps(record, indent=1) + "\n")
    pictures = [file.with_suffix(".png") for file in files]
    if draw_figure(record, pictures[0]) is None:
        return [*files]
    for picture in pictures[1:]:
        copyfile(pictures[0], picture)
    return [path for pair in zip(files, pictures, strict=True) for path in pair]


if __name__ == "__main__":
    sys.exit(main())
