"""Makes random calls of random pairs of every architecture, and counts the answers that are wrong.

    python scripts/check_identity.py --cases 10000 --processes 2
    python scripts/check_identity.py --cases 1200 --promise rounds --out benchmarks/results/identity_rounds.json

What is drawn and what must be true of it: `tests/identity.py`. A short run of the same is a test; the last long run is
in `benchmarks/results/identity.json`. A case that fails is named by its number: `--first NUMBER --cases 1` runs it
again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from transformers_sgl.evaluation.run_folder import measurement_record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import identity  # noqa: E402

_AT_ONCE = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--promise", choices=identity.PROMISES, help="only cases of this one")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "identity.json")
    arguments = parser.parse_args()

    every = len(identity.PROMISES) if arguments.promise else 1
    first = arguments.first + (identity.PROMISES.index(arguments.promise) if arguments.promise else 0)
    numbers = range(first, first + arguments.cases * every, every)
    parts = [numbers[start : start + _AT_ONCE] for start in range(0, len(numbers), _AT_ONCE)]
    counts, wrong, progress = Counter(), [], tqdm(total=arguments.cases)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn")) as pool:
        for found, failures in pool.map(check, parts):
            counts += found
            wrong += failures
            progress.update(sum(found.values()))
            for failure in failures:
                progress.write(failure)
    record = {
        **measurement_record(arguments.first),
        "cases": arguments.cases,
        "architectures": len(identity.supported_names()),
        "wrong": wrong,
        "tables": {f"identity-{arguments.promise}" if arguments.promise else "identity": table(counts)},
    }
    arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.exit(bool(wrong))


def table(counts: Counter) -> dict:
    """The verdicts by promise."""
    promises = {
        "stock": "unpruned: what the stock model writes, or the small one where it exits early",
        "draft": "pruned: a verified draft changes nothing",
        "rounds": "long answers, greedy or sampled from a seed: drafts in rounds change nothing",
        "batch": "pruned: a sample of a padded batch is answered as it is alone",
    }
    verdicts = ("equal", "tie", "wrong")
    rows = [
        [text, *(counts[promise, verdict] for verdict in verdicts)]
        for promise, text in promises.items()
        if any(counts[promise, verdict] for verdict in verdicts)
    ]
    caption = (
        f"Random calls of tiny random pairs of {len(identity.supported_names())} architectures and variants, with "
        "padding, images, videos, exits and random settings of `generate`. In a tie the scores of two tokens differ "
        f"by less than {identity.ROUNDING}, which is rounding."
    )
    return {"columns": ["promise", *verdicts], "rows": rows, "caption": caption}


def check(numbers: range) -> tuple[Counter, list[str]]:
    """The verdicts on the cases of these numbers, counted by promise, and what was wrong."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    counts, wrong = Counter(), []
    for number in numbers:
        case = identity.draw(number)
        try:
            failure = identity.failure_of(case)
        except Exception as error:  # the other cases count, too
            failure = f"{type(error).__name__}: {error}"
        if failure not in (None, identity.TIE):
            wrong.append(f"{number}: {failure}: {case}")
        counts[case.promise, {None: "equal", identity.TIE: "tie"}.get(failure, "wrong")] += 1
    return counts, wrong


if __name__ == "__main__":
    main()
