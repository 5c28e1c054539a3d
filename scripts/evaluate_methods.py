"""Compares guided pruning of the embedded pair with everything else that prunes.

    python scripts/evaluate_methods.py --work methods

On the whole easy-VQA test split and on 2,000 held-out scenes, at 64, 35 and 9 % average retention: the pair against
random pruning, FastV, DivPrune, a smaller image, the oracle, and both models alone. On 1,000 questions of each: which
of the small model's layers and queries guide best. `--work` keeps the records of the four evaluations, so that a run
that was cut off goes on; summaries and tables go to `benchmarks/results/sgl_tiny_methods.json`, from which
`scripts/render_tables.py` fills the README and the card, and the figures into the card's folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers_sgl.evaluation import evaluate
from transformers_sgl.evaluation.report import p_value, points

ROOT = Path(__file__).parents[1]
DATA = {"easy-vqa": "easy-VQA", "scenes": "scenes"}
METHODS = ["large", "small", "sgp", "sgl", "random", "fastv", "oracle", "divprune", "divprune-late", "downsample"]
GUIDES = ["large", "sgp", "oracle"]
GUIDES += [f"sgp-{part}" for part in ("10%", "30%", "50%", "70%", "last", "prompt", "generated")]
RETENTIONS = (0.64, 0.35, 0.09)
GUIDES_LIMIT = 1000
# What a row of the tables is called.
NAMES = {
    "large": "large model alone",
    "small": "small model alone",
    "sgp": "**guided** (`sgp`)",
    "sgl": "**guided, early exit** (`sgl`)",
    "random": "random",
    "fastv": "FastV",
    "divprune": "DivPrune, from the first layer",
    "divprune-late": "DivPrune, from the same layer",
    "downsample": "smaller image",
    "oracle": "oracle: the large model's own map",
    "sgp-10%": "first 10 % of the small model's layers",
    "sgp-30%": "first 30 %",
    "sgp-50%": "first 50 %",
    "sgp-70%": "first 70 %",
    "sgp-last": "last prompt token only",
    "sgp-prompt": "prompt only",
    "sgp-generated": "generated tokens only",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "model_cards" / "sgl-tiny")
    parser.add_argument("--work", type=Path, required=True, help="folder for the records of the evaluations")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "sgl_tiny_methods.json")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    found: dict[str, dict[str, Any]] = {}
    for data in DATA:
        for name, methods, limit in ((data, METHODS, None), (f"{data}-guides", GUIDES, GUIDES_LIMIT)):
            folder = arguments.work / name
            evaluation = evaluate(
                arguments.model,
                data,
                out=folder,
                methods=methods,
                retentions=RETENTIONS,
                limit=limit,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
            )
            print(f"{name}\n{evaluation.to_markdown()}\n")
            found[name] = {"summary": evaluation.report, "speed": evaluation.speed}
        shutil.copy(arguments.work / data / "figure.png", ROOT / "model_cards" / "sgl-tiny" / f"methods-{data}.png")

    speed = found["easy-vqa"]["speed"]
    tables = {f"methods-{data}": methods_table(found[data]) for data in DATA}
    tables["methods-comparisons"] = comparisons_table({DATA[data]: found[data] for data in DATA})
    tables["methods-guides"] = guides_table({DATA[data]: found[f"{data}-guides"]["summary"] for data in DATA})
    record = {
        **{name: speed[name] for name in ("machine", "versions", "seed", "date")},
        "tables": tables,
        "evaluations": found,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


def methods_table(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Scores by method and retention, with what each costs."""
    summary, speed = evaluation["summary"], evaluation["speed"]
    rows = []
    for name in dict.fromkeys(row["method"] for row in summary["rows"]):
        of_method = [pair for pair in zip(summary["rows"], speed["rows"], strict=True) if pair[0]["method"] == name]
        scores = [score_cell(row) for row, _ in of_method]
        operations = [f"{row['gigaflops']:.2g}" for row, _ in of_method]
        times = [f"{clock['relative_to_large']:.2f}" for _, clock in of_method]
        # One that does not prune has one score, whatever the retention.
        scores += [""] * (len(RETENTIONS) - len(scores))
        rows.append([NAMES[name], *scores, " / ".join(operations), " / ".join(times)])
    thresholds = ", ".join(f"{threshold:.3f}" for threshold in summary["thresholds"])
    calls = [f"{100 * row['large_call_rate']:.0f} %" for row in summary["rows"] if row["method"] == "sgl"]
    caption = (
        f"Exact match in percent on {summary['num_samples']:,} questions about {summary['num_images']:,} images, with "
        "95 % intervals (bootstrap over images). Where a method cannot reach the average retention of the column, its "
        f"own stands behind the interval. Early exit from a score of {thresholds} on, chosen on 2,000 other questions "
        f"so that with 99 % confidence 99 % of the large model's right answers stay; it calls the large model for "
        f"{', '.join(calls)} of the questions. GFLOPs for a question (counted on four batches) and end-to-end time "
        f"relative to the large model alone (median over batches of {summary['batch_size']}, methods taking turns in "
        "one run, one core of a machine that was busy with other work) at the three retentions; both models, vision "
        "encoders and scores are counted."
    )
    columns = ["method", *(f"{retention:.0%}" for retention in RETENTIONS), "GFLOPs", "time / large"]
    return {"columns": columns, "rows": rows, "caption": caption}


def score_cell(row: dict[str, Any]) -> str:
    """A score with its interval, and the retention where that is not what the column says."""
    low, high = (100 * end for end in row["interval"])
    cell = f"{100 * row['score']:.1f} [{low:.1f}, {high:.1f}]"
    target, reached = row["target_retention"], row["average_retention"]
    if target is not None and reached is not None and abs(target - reached) > 0.02:
        cell += f" ({reached:.0%})"
    return cell


def comparisons_table(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Guided pruning against the others: at equal retention, equal operations and equal time."""
    rows = []
    for data, evaluation in evaluations.items():
        summary = evaluation["summary"]
        same_operations = by_run(summary["at_equal_operations"])
        same_time = by_run(evaluation["speed"]["at_equal_time"])
        for each in summary["comparisons"]:
            if each["method"] == "sgp":
                other, retention = each["other"], each["target_retention"]
                found = [
                    each,
                    same_operations.get(("sgp", other, retention)),
                    same_time.get(("sgp", other, retention)),
                    same_time.get(("sgl", other, retention)),
                ]
                rows.append([data, f"{retention:.0%}", NAMES[other], *map(difference_cell, found)])
    return {
        "columns": [
            "data",
            "retention",
            "compared with",
            "`sgp`, equal retention",
            "`sgp`, equal GFLOPs",
            "`sgp`, equal time",
            "`sgl`, equal time",
        ],
        "rows": rows,
        "caption": (
            "Guided minus other, in percentage points with 95 % paired-bootstrap intervals; bold where the paired "
            "randomisation test gives p < 0.05. At equal cost the other method is taken on the line between its two "
            "nearest settings, the unpruned large model being one of them, so guided answers that cost more than the "
            "large model alone are compared with that. A dash: even its cheapest setting costs more."
        ),
    }


def by_run(comparisons: Sequence[dict[str, Any]]) -> dict[tuple[str, str, float], dict[str, Any]]:
    return {(each["method"], each["other"], each["target_retention"]): each for each in comparisons}


def difference_cell(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "-"
    return f"**{points(difference)}**" if difference["p_value"] < 0.05 else points(difference)


def guides_table(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Which attention guides best."""
    by_data = {
        data: {(row["method"], row["target_retention"]): row for row in summary["rows"]}
        for data, summary in summaries.items()
    }
    rows = []
    for name in GUIDES[1:]:
        label = "all layers, prompt and generated tokens" if name == "sgp" else NAMES[name]
        cells = [score_cell(rows_of[name, retention]) for rows_of in by_data.values() for retention in RETENTIONS]
        rows.append([label, *cells])
    orders = [
        f"{data}: {p_value(each['p_value'])} ({NAMES[each['other']]}, {each['target_retention']:.0%})"
        for data, summary in summaries.items()
        for each in summary["comparisons"]
        if each["other"] in ("sgp-prompt", "oracle") and each["target_retention"] == min(RETENTIONS)
    ]
    return {
        "columns": ["guide", *(f"{data} {retention:.0%}" for data in summaries for retention in RETENTIONS)],
        "rows": rows,
        "caption": (
            f"Exact match in percent on {GUIDES_LIMIT:,} questions of each kind, with 95 % intervals. The small model "
            "has four layers, so 10 and 30 % are both its first. p of the difference to all layers, prompt and "
            f"generated tokens: {'; '.join(orders)}."
        ),
    }


if __name__ == "__main__":
    main()
