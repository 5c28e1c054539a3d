"""The tables that compare methods, from evaluations that were put together."""

from __future__ import annotations

from typing import Any

from joined_evaluations import PROPORTIONS
from method_verdicts import OURS, by_run

from transformers_sgl.evaluation.methods import GUIDED
from transformers_sgl.evaluation.report import p_value, points

__all__ = [
    "LABEL",
    "NAMES",
    "additions_table",
    "by_small_answer_table",
    "guides_table",
    "losses_table",
    "methods_table",
    "metrics_table",
]

# What a row of the tables is called.
NAMES = {
    "large": "large model alone",
    "small": "small model alone",
    "sgp": "**guided** (`sgp`)",
    "sgl": "**guided, early exit** (`sgl`)",
    "sgp-first": "**guided, from the first layer** (`sgp-first`)",
    "sgp-facility": "**guided, facility location** (`sgp-facility`)",
    "sgl-facility": "**the same, early exit** (`sgl-facility`)",
    "sgp-facility-prompt": "**the same, one pass of the guide** (`sgp-facility-prompt`)",
    "sgp-facility-late": "**facility location in the middle** (`sgp-facility-late`)",
    "sgp-dpp": "**guided, conditional DPP** (`sgp-dpp`)",
    "unsure": "**guided, more where unsure** (`unsure`)",
    "sgp-vision": "**guided, vision tower, too** (`sgp-vision`)",
    "sgl-vision": "**the same, early exit** (`sgl-vision`)",
    "confirmed": "**confirmed** (`confirmed`)",
    "sgl-confirmed": "**the same, early exit** (`sgl-confirmed`)",
    "random": "random",
    "fastv": "FastV",
    "divprune": "DivPrune, from the first layer",
    "divprune-late": "DivPrune, from the same layer",
    "cdpruner": "CDPruner",
    "cdpruner-weighted": "CDPruner, relevance weighed less",
    "visionzip": "VisionZip, by the class token",
    "visionzip-mean": "VisionZip, by all patches",
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
# Split by whether the small model's answer is right: its map, the prompt's, and more tokens where it is unsure.
_SPLIT = ("sgp", "sgp-facility", "sgp-facility-prompt", "unsure", "divprune")
LABEL = "/".join(name.removeprefix("internvl-").upper() for name in PROPORTIONS.values())


def methods_table(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Scores by method and retention, with what each costs."""
    summary, speed, scaled = evaluation["summary"], evaluation["speed"], evaluation["scaled"]
    retentions = retentions_of(summary)
    rows = []
    whole = list(zip(summary["rows"], speed["rows"], scaled["rows"], strict=True))
    for name in dict.fromkeys(row["method"] for row in summary["rows"]):
        of_method = [found for found in whole if found[0]["method"] == name]
        scores = [score_cell(row) for row, _, _ in of_method]
        operations = [f"{row['gigaflops']:.2g}" for row, _, _ in of_method]
        times = [f"{clock['relative_to_large']:.2f}" for _, clock, _ in of_method]
        costs = [f"{cost['relative_to_large']:.2f}" for _, _, cost in of_method]
        # One that does not prune has one score, whatever the retention.
        scores += [""] * (len(retentions) - len(scores))
        rows.append([NAMES[name], *scores, *map(" / ".join, (operations, times, costs))])
    exits = "; ".join(
        f"`{name}` from {', '.join(f'{threshold:.3f}' for threshold in thresholds)} on, and calls the large model for "
        + ", ".join(f"{100 * row['large_call_rate']:.0f} %" for row in summary["rows"] if row["method"] == name)
        for name, thresholds in summary["thresholds"].items()
    )
    if exits:
        exits = (
            "Early exit from scores chosen on other questions so that with 99 % confidence 99 % of the large model's "
            f"right answers stay: {exits} of the questions. "
        )
    parts = scaled["operations"]
    caption = (
        f"{_metric(summary)} in percent on {summary['num_samples']:,} questions about {summary['num_images']:,} "
        "images, with 95 % intervals (bootstrap over images). Where a method cannot reach the average retention of "
        f"the column, its own stands behind the interval. {exits}GFLOPs for a question (counted on four batches) and "
        "end-to-end time relative to the large model alone (median over batches of "
        f"{summary['batch_size']}, methods taking turns with the large model in "
        "several runs, each on a core of a machine that was busy with other work) at these "
        "retentions; both models, vision encoders and scores are counted. "
        f"{LABEL}: operations relative to the large model alone if each part had the size it has in InternVL "
        f"{LABEL} at 1,792 visual tokens (vision encoder {parts['vision'] / 1e12:.0f}, decoder "
        f"{parts['decoder'] / 1e12:.0f}, small model {parts['small'] / 1e12:.0f} TFLOP): computed from what each part "
        "did here, the decoder's in proportion to its tokens, and not measured on such models."
    )
    columns = ["method", *(f"{retention:.0%}" for retention in retentions), "GFLOPs", "time / large", LABEL]
    return {"columns": columns, "rows": rows, "caption": caption}


def retentions_of(summary: dict[str, Any]) -> list[float]:
    """The average retentions of a summary's rows, as they come."""
    targets = (row["target_retention"] for row in summary["rows"])
    return list(dict.fromkeys(target for target in targets if target is not None))


def _metric(summary: dict[str, Any]) -> str:
    name = summary["metric"]
    return "ANLS" if name == "anls" else name.replace("_", " ").capitalize()


def metrics_table(evaluation: dict[str, Any], title: str) -> dict[str, Any]:
    """The same answers by several metrics, without intervals."""
    summary, metrics = evaluation["summary"], evaluation["metrics"]
    retentions = retentions_of(summary)
    rows = []
    for name in dict.fromkeys(row["method"] for row in summary["rows"]):
        for metric, scores in metrics.items():
            of_method = [100 * score["score"] for score in scores if score["method"] == name]
            cells = [f"{score:.1f}" for score in of_method] + [""] * (len(retentions) - len(of_method))
            rows.append([NAMES[name], metric.replace("_", " "), *cells])
    columns = ["method", "metric", *(f"{retention:.0%}" for retention in retentions)]
    caption = f"Percent on {summary['num_samples']:,} questions of {title}, the same answers by every metric."
    return {"columns": columns, "rows": rows, "caption": caption}


def score_cell(row: dict[str, Any]) -> str:
    """A score with its interval, and the retention where that is not what the column says."""
    low, high = (100 * end for end in row["interval"])
    cell = f"{100 * row['score']:.1f} [{low:.1f}, {high:.1f}]"
    target, reached = row["target_retention"], row["average_retention"]
    if reached not in (None, 1.0) and (target is None or abs(target - reached) > 0.02):
        cell += f" ({reached:.0%})"
    return cell


def additions_table(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What each guided method has over the one that it adds something to, at equal retention."""
    rows, retentions = [], retentions_of(next(iter(evaluations.values()))["summary"])
    for data, evaluation in evaluations.items():
        found = by_run(evaluation["summary"]["comparisons"])
        for name, basis in GUIDED.items():
            differences = [found.get((name, basis, retention)) for retention in retentions]
            if any(differences):
                rows.append([data, f"`{name}`", f"`{basis}`", *map(difference_cell, differences)])
    return {
        "columns": ["data", "method", "minus", *(f"{share:.0%}" for share in retentions)],
        "rows": rows,
        "caption": (
            "Difference at equal retention, in percentage points with the 95 % paired-bootstrap interval, bold where "
            "p < 0.05 in the paired randomisation test."
        ),
    }


def losses_table(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What pruning loses against the large model alone; without a retention to set it stands in the first column."""
    rows, retentions = [], retentions_of(next(iter(evaluations.values()))["summary"])
    for data, evaluation in evaluations.items():
        found = {
            (row["method"], row["target_retention"]): row
            for group in evaluation["versus_large"]
            for row in group["rows"]
        }
        for name in dict.fromkeys(row["method"] for row in evaluation["summary"]["rows"]):
            own = [found.get((name, retention)) for retention in retentions]
            if name in (*OURS, "divprune", "cdpruner") and (any(own) or (name, None) in found):
                cells = [*map(difference_cell, own)] if any(own) else [difference_cell(found[name, None])]
                rows.append([data, NAMES[name], *cells, *[""] * (len(retentions) - len(cells))])
    return {
        "columns": ["data", "method", *(f"{share:.0%}" for share in retentions)],
        "rows": rows,
        "caption": (
            "Score minus that of the large model alone, in percentage points with the 95 % paired-bootstrap "
            "interval, bold where p < 0.05."
        ),
    }


def by_small_answer_table(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What guided methods lose where the small model's answer is right, and where it is wrong."""
    rows, retentions = [], retentions_of(next(iter(evaluations.values()))["summary"])
    for data, evaluation in evaluations.items():
        for part, found in (evaluation["summary"].get("by_small_answer") or {}).items():
            differences = {(row["method"], row["target_retention"]): row.get("vs_large") for row in found["rows"]}
            for name in _SPLIT:
                if any(method == name for method, _ in differences):
                    cells = [difference_cell(differences.get((name, retention))) for retention in retentions]
                    rows.append([data, part, f"{found['num_samples']:,}", NAMES[name], *cells])
    return {
        "columns": ["data", "small answer", "questions", "method", *(f"{share:.0%}" for share in retentions)],
        "rows": rows,
        "caption": (
            "Score minus that of the large model alone, in percentage points with the 95 % paired-bootstrap interval, "
            "bold where p < 0.05, on the questions that the small model alone answers rightly, and on the others."
        ),
    }


def difference_cell(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "-"
    return f"**{points(difference)}**" if difference["p_value"] < 0.05 else points(difference)


def guides_table(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Which attention guides best."""
    retentions = retentions_of(next(iter(summaries.values())))
    guides = dict.fromkeys(row["method"] for each in summaries.values() for row in each["rows"])
    by_data = {
        data: {(row["method"], row["target_retention"]): row for row in summary["rows"]}
        for data, summary in summaries.items()
    }
    rows = []
    for name in guides:
        if name == "large":
            continue
        label = "all layers, prompt and generated tokens" if name == "sgp" else NAMES[name]
        cells = [score_cell(rows_of[name, retention]) for rows_of in by_data.values() for retention in retentions]
        rows.append([label, *cells])
    numbers = dict.fromkeys(each["num_samples"] for each in summaries.values())
    orders = [
        f"{data}: {p_value(each['p_value'])} ({NAMES[each['other']]}, {each['target_retention']:.0%})"
        for data, summary in summaries.items()
        for each in summary["comparisons"]
        if each["other"] in ("sgp-prompt", "oracle") and each["target_retention"] == min(retentions)
    ]
    return {
        "columns": ["guide", *(f"{data} {retention:.0%}" for data in summaries for retention in retentions)],
        "rows": rows,
        "caption": (
            f"Percent ({', '.join(f'{data}: {_metric(each)}' for data, each in summaries.items())}) on "
            f"{', '.join(f'{number:,}' for number in numbers)} questions of each kind, with 95 % intervals. The small "
            "model has four layers, so 10 and 30 % are both its first. p of the difference to all layers, prompt and "
            f"generated tokens: {'; '.join(orders)}."
        ),
    }
