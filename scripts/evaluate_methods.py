"""Compares guided pruning of the embedded pair with everything else that prunes.

    python scripts/evaluate_methods.py --work methods

On the easy-VQA test split and on 2,000 held-out scenes, at 64, 35 and 9 % average retention: the pair, without and
with pruning of its vision tower, random pruning, FastV, DivPrune, a smaller image, and both models alone. On 1,000
questions of each (`--only guides`): which of the small model's layers and queries guide best, and the oracle.

`--work` keeps the records, so that a run that was cut off goes on. The methods are evaluated in groups, each with the
large model in it; `--only` takes some of them, so that they can run side by side. Once all groups have answered
something, what all have answered so far is put together: summaries and tables go to
`benchmarks/results/sgl_tiny_methods.json` and `sgl_tiny_guides.json`, from which `scripts/render_tables.py` fills the
README, the documentation and the card, and the figures into the card's folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joined_evaluations import PROPORTIONS, Records, joined, operations_of_parts, report, versus_large
from method_verdicts import OURS, verdicts_table

from transformers_sgl.evaluation import evaluate, load_samples
from transformers_sgl.evaluation.figure import draw_figure
from transformers_sgl.evaluation.report import p_value, points

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = {"easy-vqa": "easy-VQA", "scenes": "scenes"}
GROUPS = {
    "baselines": ["large", "small", "sgp", "sgl", "random", "fastv", "divprune", "divprune-late", "downsample"],
    "vision": ["large", "sgp-vision", "sgl-vision"],
    "confirmed": ["large", "confirmed", "sgl-confirmed"],
}
METHODS = ["large", "small", "sgp", "sgl", "sgp-vision", "sgl-vision", "confirmed", "sgl-confirmed"]
METHODS += ["random", "fastv", "divprune", "divprune-late", "downsample"]
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
    "sgp-vision": "**guided, vision tower, too** (`sgp-vision`)",
    "sgl-vision": "**the same, early exit** (`sgl-vision`)",
    "confirmed": "**confirmed** (`confirmed`)",
    "sgl-confirmed": "**the same, early exit** (`sgl-confirmed`)",
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
_PROPORTIONS = "/".join(name.removeprefix("internvl-").upper() for name in PROPORTIONS.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "model_cards" / "sgl-tiny")
    parser.add_argument("--work", type=Path, required=True, help="folder for the records of the evaluations")
    parser.add_argument("--data", choices=DATA, nargs="*", default=list(DATA), help="what to evaluate now")
    parser.add_argument("--only", choices=[*GROUPS, "guides", "tables"], nargs="*", help="what to evaluate now")
    parser.add_argument("--limit", type=int, help="the most questions, drawn at random")
    parser.add_argument("--calibration-limit", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "model_cards" / "sgl-tiny", help="folder for the figures"
    )
    arguments = parser.parse_args()

    for data in arguments.data:
        for name in arguments.only or [*GROUPS, "guides"]:
            if name != "tables":
                run_group(arguments, data, name)
    folders = {data: [arguments.work / data / group for group in GROUPS] for data in DATA}
    if all((folder / "run.json").exists() for of_data in folders.values() for folder in of_data):
        write_methods(arguments, folders)
    guides = {data: arguments.work / data / "guides" for data in DATA}
    if all((folder / "summary.json").exists() for folder in guides.values()):
        write_guides(arguments, guides)


def run_group(arguments: argparse.Namespace, data: str, name: str) -> None:
    """Lets a group of methods answer; one that has is left as it is."""
    folder = arguments.work / data / name
    if (folder / "summary.json").exists():
        return
    evaluation = evaluate(
        arguments.model,
        data,
        out=folder,
        methods=GUIDES if name == "guides" else GROUPS[name],
        retentions=RETENTIONS,
        limit=GUIDES_LIMIT if name == "guides" else arguments.limit,
        calibration_limit=arguments.calibration_limit,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    print(f"{data}, {name}\n{evaluation.to_markdown()}\n")


def write_methods(arguments: argparse.Namespace, folders: dict[str, list[Path]]) -> None:
    """Puts the groups together, and writes tables and figures."""
    operations, found = operations_of_parts(), {}
    for data in DATA:
        samples = load_samples(data, limit=arguments.limit, seed=arguments.seed)
        groups = [Records.of(folder, arguments.model, samples) for folder in folders[data]]
        records = joined(groups)
        answered = [samples[index] for index in records.answered]
        found[data] = report(records, answered, METHODS, operations)
        found[data]["versus_large"] = [versus_large(group, samples) for group in groups]
        figure = arguments.figures / f"methods-{data}.png"
        draw_figure(found[data]["summary"], found[data]["speed"], figure)
        print(f"written: {figure}")
    by_name = {DATA[data]: found[data] for data in DATA}
    tables = {f"methods-{data}": methods_table(found[data]) for data in DATA}
    tables["methods-comparisons"] = comparisons_table(by_name, "sgp", "sgl")
    tables["methods-comparisons-vision"] = comparisons_table(by_name, "sgp-vision", "sgl-vision")
    tables["methods-comparisons-confirmed"] = presets_comparisons_table(by_name)
    tables["methods-losses"] = losses_table(by_name)
    tables["methods-verdicts"] = verdicts_table(by_name, _PROPORTIONS)
    speed = found["easy-vqa"]["speed"]
    write_record(arguments.output / "sgl_tiny_methods.json", speed, {"tables": tables, "evaluations": found})


def write_guides(arguments: argparse.Namespace, folders: dict[str, Path]) -> None:
    """Writes the table of guides."""
    summaries, speeds = (
        {data: json.loads((folder / f"{name}.json").read_text("utf-8")) for data, folder in folders.items()}
        for name in ("summary", "speed")
    )
    tables = {"methods-guides": guides_table({DATA[data]: summaries[data] for data in DATA})}
    found = {data: {"summary": summaries[data], "speed": speeds[data]} for data in DATA}
    write_record(
        arguments.output / "sgl_tiny_guides.json", speeds["easy-vqa"], {"tables": tables, "evaluations": found}
    )


def write_record(file: Path, speed: dict[str, Any], content: dict[str, Any]) -> None:
    record = {**{name: speed[name] for name in ("machine", "versions", "seed", "date")}, **content}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}")


def methods_table(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Scores by method and retention, with what each costs."""
    summary, speed, scaled = evaluation["summary"], evaluation["speed"], evaluation["scaled"]
    rows = []
    whole = list(zip(summary["rows"], speed["rows"], scaled["rows"], strict=True))
    for name in dict.fromkeys(row["method"] for row in summary["rows"]):
        of_method = [found for found in whole if found[0]["method"] == name]
        scores = [score_cell(row) for row, _, _ in of_method]
        operations = [f"{row['gigaflops']:.2g}" for row, _, _ in of_method]
        times = [f"{clock['relative_to_large']:.2f}" for _, clock, _ in of_method]
        costs = [f"{cost['relative_to_large']:.2f}" for _, _, cost in of_method]
        # One that does not prune has one score, whatever the retention.
        scores += [""] * (len(RETENTIONS) - len(scores))
        rows.append([NAMES[name], *scores, *map(" / ".join, (operations, times, costs))])
    exits = "; ".join(
        f"`{name}` from {', '.join(f'{threshold:.3f}' for threshold in thresholds)} on, and calls the large model for "
        + ", ".join(f"{100 * row['large_call_rate']:.0f} %" for row in summary["rows"] if row["method"] == name)
        for name, thresholds in summary["thresholds"].items()
    )
    parts = scaled["operations"]
    caption = (
        f"Exact match in percent on {summary['num_samples']:,} questions about {summary['num_images']:,} images, with "
        "95 % intervals (bootstrap over images). Where a method cannot reach the average retention of the column, "
        "its own stands behind the interval. Early exit from scores chosen on other questions so that with 99 % "
        f"confidence 99 % of the large model's right answers stay: {exits} of the questions. GFLOPs for a question "
        "(counted on four batches) and end-to-end time relative to the large model alone (median over batches of "
        f"{summary['batch_size']}, methods taking turns with the large model in "
        "several runs, each on a core of a machine that was busy with other work) at the "
        "three retentions; both models, vision encoders and scores are counted. "
        f"{_PROPORTIONS}: operations relative to the large model alone if each part had the size it has in InternVL "
        f"{_PROPORTIONS} at 1,792 visual tokens (vision encoder {parts['vision'] / 1e12:.0f}, decoder "
        f"{parts['decoder'] / 1e12:.0f}, small model {parts['small'] / 1e12:.0f} TFLOP): computed from what each part "
        "did here, the decoder's in proportion to its tokens, and not measured on such models."
    )
    columns = ["method", *(f"{retention:.0%}" for retention in RETENTIONS), "GFLOPs", "time / large", _PROPORTIONS]
    return {"columns": columns, "rows": rows, "caption": caption}


def score_cell(row: dict[str, Any]) -> str:
    """A score with its interval, and the retention where that is not what the column says."""
    low, high = (100 * end for end in row["interval"])
    cell = f"{100 * row['score']:.1f} [{low:.1f}, {high:.1f}]"
    target, reached = row["target_retention"], row["average_retention"]
    if reached not in (None, 1.0) and (target is None or abs(target - reached) > 0.02):
        cell += f" ({reached:.0%})"
    return cell


def comparisons_table(evaluations: dict[str, dict[str, Any]], pruned: str, exits: str) -> dict[str, Any]:
    """A guided method, alone and with early exit, against the others: at equal retention and at equal cost."""
    rows = []
    for data, evaluation in evaluations.items():
        same_operations = by_run(evaluation["summary"]["at_equal_operations"])
        same_time = by_run(evaluation["speed"]["at_equal_time"])
        same_scaled = by_run(evaluation["scaled"]["at_equal_operations"])
        for each in evaluation["summary"]["comparisons"]:
            if each["method"] == pruned:
                other, retention = each["other"], each["target_retention"]
                found = [each, same_operations.get((pruned, other, retention))]
                found += [same.get((pruned, other, retention)) for same in (same_time, same_scaled)]
                found += [same.get((exits, other, retention)) for same in (same_time, same_scaled)]
                rows.append([data, f"{retention:.0%}", NAMES[other], *map(difference_cell, found)])
    return {
        "columns": [
            "data",
            "retention",
            "compared with",
            f"`{pruned}`, equal retention",
            "equal GFLOPs",
            "equal time",
            f"equal {_PROPORTIONS} operations",
            f"`{exits}`, equal time",
            f"equal {_PROPORTIONS} operations",
        ],
        "rows": rows,
        "caption": (
            "Guided minus other, in percentage points with 95 % paired-bootstrap intervals; bold where the paired "
            "randomisation test gives p < 0.05. At equal cost the other method is taken on the line between its two "
            "nearest settings, the unpruned large model being one of them, so guided answers that cost more than the "
            "large model alone are compared with that. A dash: even its cheapest setting costs more."
        ),
    }


def presets_comparisons_table(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The preset that confirms drafts, alone and with early exit, against the others at equal cost."""
    rows = []
    for data, evaluation in evaluations.items():
        equals = [
            by_run(evaluation["summary"]["at_equal_operations"]),
            by_run(evaluation["speed"]["at_equal_time"]),
            by_run(evaluation["scaled"]["at_equal_operations"]),
        ]
        others = [row["method"] for row in evaluation["summary"]["rows"] if row["target_retention"] is not None]
        for other in dict.fromkeys(others):
            found = [same.get((ours, other, None)) for ours in ("confirmed", "sgl-confirmed") for same in equals]
            if any(found):
                rows.append([data, NAMES[other], *map(difference_cell, found)])
    what = ("GFLOPs", "time", f"{_PROPORTIONS} operations")
    columns = [f"`{ours}`, equal {cost}" for ours in ("confirmed", "sgl-confirmed") for cost in what]
    caption = "As the tables of the other guided methods; the preset has no retention to set."
    return {"columns": ["data", "compared with", *columns], "rows": rows, "caption": caption}


def losses_table(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What pruning loses against the large model alone, and what it costs then."""
    rows = []
    for data, evaluation in evaluations.items():
        costs = {
            (row["method"], row["target_retention"]): [f"{each['relative_to_large']:.2f}" for each in (clock, scaled)]
            for row, clock, scaled in zip(
                evaluation["summary"]["rows"], evaluation["speed"]["rows"], evaluation["scaled"]["rows"], strict=True
            )
        }
        for group in evaluation["versus_large"]:
            for row in group["rows"]:
                name, retention = row["method"], row["target_retention"]
                if name in OURS or name == "divprune":
                    share = "" if retention is None else f"{retention:.0%}"
                    cells = [f"{group['num_samples']:,}", f"{100 * row['large_score']:.1f}", difference_cell(row)]
                    rows.append([data, NAMES[name], share, *cells, *costs[name, retention]])
    return {
        "columns": [
            "data",
            "method",
            "retention",
            "questions",
            "large alone",
            "minus large",
            "time / large",
            _PROPORTIONS,
        ],
        "rows": rows,
        "caption": (
            "Exact match minus that of the large model alone, in percentage points with the 95 % paired-bootstrap "
            "interval, bold where p < 0.05, on all questions that the method has answered; time and operations "
            "relative to the large model alone, as above."
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
