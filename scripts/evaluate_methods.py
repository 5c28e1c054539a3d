"""Compares guided pruning of the embedded pairs with everything else that prunes.

    python scripts/evaluate_methods.py --work methods

On the easy-VQA test split and on 2,000 held-out scenes with the pair `sgl-tiny`, and on 2,000 pages to read with
`sgl-tiny-reading`, at 64, 35, 20, 9 and 5 % average retention: the pair, from the first layer or from the middle,
with each selection, without and with pruning of its vision tower, random pruning, FastV, DivPrune, CDPruner,
VisionZip, a smaller image, and both models alone. On 1,000 questions of each (`--only guides`): which of the small
model's layers and queries guide best, and the oracle.

`--work` keeps the records, so that a run that was cut off goes on. The methods are evaluated in groups, each with the
large model in it; `--data` and `--only` take some of them, so that they can run side by side, and a data set by
itself:

    python scripts/evaluate_methods.py --work methods --data reading --only baselines

What the groups of a data set have answered so far is put together, of those that have begun or of those that `--join`
names: summaries and tables go to `benchmarks/results/sgl_tiny_methods.json` and `sgl_tiny_guides.json`, from which
`scripts/render_tables.py` fills the README, the documentation and the cards, and the figures into the pairs' cards.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from joined_evaluations import Records, joined, operations_of_parts, report, versus_large
from method_tables import (
    LABEL,
    additions_table,
    by_small_answer_table,
    guides_table,
    losses_table,
    methods_table,
    metrics_table,
)
from method_verdicts import claims_table, every_verdict, summary_table

from transformers_sgl.evaluation import evaluate, load_samples
from transformers_sgl.evaluation.figure import draw_figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Questions:
    """What is asked."""

    title: str  # what the tables call it
    pair: str  # the folder of the pair among the cards
    metrics: tuple[str, ...] = ("exact_match",)  # the first one decides


DATA = {
    "easy-vqa": Questions("easy-VQA", "sgl-tiny"),
    "scenes": Questions("scenes", "sgl-tiny"),
    "reading": Questions("reading", "sgl-tiny-reading", ("anls", "relaxed_accuracy", "exact_match")),
}
GROUPS = {
    "baselines": [
        *("large", "small", "random", "fastv", "divprune", "divprune-late", "cdpruner", "cdpruner-weighted"),
        *("visionzip", "visionzip-mean", "downsample"),
    ],
    "guided": ["large", "sgp", "sgp-first", "sgp-facility", "sgp-facility-late", "sgp-facility-prompt", "sgp-dpp"],
    "unsure": ["large", "unsure"],
    "exits": ["large", "sgl", "sgl-facility"],
    "vision": ["large", "sgp-vision", "sgl-vision"],
    "confirmed": ["large", "confirmed", "sgl-confirmed"],
}
# In the order of the tables.
METHODS = ["large", "small", "sgp", "sgl", "sgp-first", "sgp-facility", "sgl-facility", "sgp-facility-prompt"]
METHODS += ["sgp-facility-late", "sgp-dpp", "unsure", "sgp-vision", "sgl-vision", "confirmed", "sgl-confirmed"]
METHODS += [name for name in GROUPS["baselines"] if name not in METHODS]
# Whose standing among the others the documentation counts.
COUNTED = ("sgp-facility", "sgl-facility", "sgp-vision", "confirmed", "sgl-confirmed")
# What the figures leave out, because another of its kind is there.
NOT_DRAWN = ("divprune-late", "cdpruner-weighted", "visionzip-mean", "sgl-vision", "sgl-confirmed", "unsure")
NOT_DRAWN += ("sgp-first", "sgp-facility-late", "sgp-facility-prompt", "sgp-dpp", "sgl-facility")
GUIDES = ["large", "sgp", "oracle"]
GUIDES += [f"sgp-{part}" for part in ("10%", "30%", "50%", "70%", "last", "prompt", "generated")]
RETENTIONS = (0.64, 0.35, 0.20, 0.09, 0.05)
GUIDES_LIMIT = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=Path, default=ROOT / "model_cards", help="folder of the pairs")
    parser.add_argument("--work", type=Path, required=True, help="folder for the records of the evaluations")
    parser.add_argument("--data", choices=DATA, nargs="*", default=list(DATA), help="what to evaluate now")
    parser.add_argument("--only", choices=[*GROUPS, "guides", "tables"], nargs="*", help="what to evaluate now")
    parser.add_argument("--join", choices=GROUPS, nargs="*", default=list(GROUPS), help="what to put together")
    parser.add_argument("--limit", type=int, help="the most questions, drawn at random")
    parser.add_argument("--calibration-limit", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--figures", type=Path, help="folder for the figures (default: the pairs' cards)")
    arguments = parser.parse_args()

    for data in arguments.data:
        for name in arguments.only or [*GROUPS, "guides"]:
            if name != "tables":
                run_group(arguments, data, name)
    begun = {data: [arguments.work / data / group for group in arguments.join] for data in DATA}
    begun = {data: [each for each in folders if (each / "run.json").exists()] for data, folders in begun.items()}
    # Without both models alone there is nothing to compare with.
    whole = {data: folders for data, folders in begun.items() if arguments.work / data / "baselines" in folders}
    if whole:
        write_methods(arguments, whole)
    guides = {data: arguments.work / data / "guides" for data in DATA}
    guides = {data: folder for data, folder in guides.items() if (folder / "summary.json").exists()}
    if guides:
        write_guides(arguments, guides)


def run_group(arguments: argparse.Namespace, data: str, name: str) -> None:
    """Lets a group of methods answer; one that has is left as it is."""
    folder = arguments.work / data / name
    if (folder / "summary.json").exists():
        return
    evaluation = evaluate(
        arguments.cards / DATA[data].pair,
        data,
        out=folder,
        methods=GUIDES if name == "guides" else GROUPS[name],
        retentions=RETENTIONS,
        metric=DATA[data].metrics[0],
        limit=GUIDES_LIMIT if name == "guides" else arguments.limit,
        calibration_limit=arguments.calibration_limit,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    print(f"{data}, {name}\n{evaluation.to_markdown()}\n")


def write_methods(arguments: argparse.Namespace, folders: dict[str, list[Path]]) -> None:
    """Puts the groups together, and writes tables and figures."""
    operations, found = operations_of_parts(), {}
    for data, of_data in folders.items():
        pair = arguments.cards / DATA[data].pair
        samples = load_samples(data, limit=arguments.limit, seed=arguments.seed)
        groups = [Records.of(folder, pair, samples) for folder in of_data]
        records = joined(groups)
        answered = [samples[index] for index in records.answered]
        found[data] = report(records, answered, METHODS, operations, DATA[data].metrics)
        found[data]["versus_large"] = [versus_large(group, samples) for group in groups]
        figure = (arguments.figures or pair) / f"methods-{data}.png"
        draw_figure(*drawn(found[data]), figure)
        print(f"written: {figure}")
    by_name = {DATA[data].title: each for data, each in found.items()}
    tables = {data: methods_table(each) for data, each in found.items()}
    tables |= {
        f"{data}-metrics": metrics_table(each, DATA[data].title)
        for data, each in found.items()
        if len(DATA[data].metrics) > 1
    }
    tables["additions"] = additions_table(by_name)
    tables["losses"] = losses_table(by_name)
    tables["by-small-answer"] = by_small_answer_table(by_name)
    tables["summary"] = summary_table(by_name, LABEL, COUNTED)
    tables["claims"] = claims_table(by_name)
    tables = {f"methods-{name}": table for name, table in tables.items() if table["rows"]}
    speed = next(iter(found.values()))["speed"]
    content = {
        "tables": tables,
        "verdicts": without_comparisons(every_verdict(by_name)),
        "evaluations": without_comparisons(found),
    }
    write_record(arguments.output / "sgl_tiny_methods.json", speed, content)


def without_comparisons(found: Any) -> Any:
    """Evaluations less what the verdicts say, and no more digits than anyone reads."""
    if isinstance(found, dict):
        repeated = ("comparisons", "at_equal_operations", "at_equal_time")
        return {name: without_comparisons(each) for name, each in found.items() if name not in repeated}
    if isinstance(found, list):
        return [without_comparisons(each) for each in found]
    return round(found, 6) if isinstance(found, float) else found


def drawn(evaluation: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summary and speed of what the figure shows."""
    summary, speed = evaluation["summary"], evaluation["speed"]
    places = [place for place, row in enumerate(summary["rows"]) if row["method"] not in NOT_DRAWN]
    some = [{**each, "rows": [each["rows"][place] for place in places]} for each in (summary, speed)]
    return some[0], some[1]


def write_guides(arguments: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Writes the table of guides."""
    summaries, speeds = (
        {data: json.loads((folder / f"{name}.json").read_text("utf-8")) for data, folder in folders.items()}
        for name in ("summary", "speed")
    )
    tables = {"methods-guides": guides_table({DATA[data].title: each for data, each in summaries.items()})}
    found = {data: {"summary": summaries[data], "speed": speeds[data]} for data in folders}
    speed = next(iter(speeds.values()))
    write_record(arguments.output / "sgl_tiny_guides.json", speed, {"tables": tables, "evaluations": found})


def write_record(file: Path, speed: dict[str, Any], content: dict[str, Any]) -> None:
    record = {**{name: speed[name] for name in ("machine", "versions", "seed", "date")}, **content}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
