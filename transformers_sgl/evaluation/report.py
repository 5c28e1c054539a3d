"""What an evaluation tells: scores and comparisons, speed, and a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transformers_sgl.evaluation.cost import Cost
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.figure import draw_figure
from transformers_sgl.evaluation.methods import GUIDED
from transformers_sgl.evaluation.run import Result, Run, RunKey
from transformers_sgl.evaluation.run_folder import measurement_record
from transformers_sgl.evaluation.statistics import Array, PairedScores, at_equal_cost
from transformers_sgl.storage.files import write_atomically

__all__ = ["as_markdown", "compare_at_equal_cost", "p_value", "points", "split_as_markdown", "summarise"]
__all__ += ["write_report"]


def summarise(
    results: Sequence[Result],
    samples: Sequence[Sample],
    runs: Sequence[Run],
    costs: dict[RunKey, Cost],
    facts: dict[str, Any],
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of `summary.json`, which the answers alone determine, and that of `speed.json`."""
    by_run = {run.key: [result for result in results if result.run == run.key] for run in runs}
    scores = {key: _array(result.score for result in found) for key, found in by_run.items()}
    paired = PairedScores([sample.image_id for sample in samples], facts["seed"])
    rows = [_row(run, by_run[run.key], scores, samples, paired, costs[run.key]) for run in runs]
    names = ("batch_size", "seed", "max_new_tokens", "dtype", "thresholds")
    summary = {
        "data": facts["data"],
        "metric": facts["metric_name"],
        "num_samples": len(samples),
        "num_images": len({sample.image_id for sample in samples}),
        **{name: facts[name] for name in names},
        "rows": rows,
        "comparisons": _comparisons(scores, paired),
        "by_small_answer": _by_small_answer(scores, _small_scores(by_run), paired),
        "at_equal_operations": compare_at_equal_cost(
            scores, paired, {key: float(cost.flops) for key, cost in costs.items()}
        ),
    }
    speed, relative = _summarise_speed(by_run, runs, costs, facts, device)
    return summary, {**speed, "at_equal_time": compare_at_equal_cost(scores, paired, relative) if relative else []}


def _row(
    run: Run,
    found: Sequence[Result],
    scores: dict[RunKey, Array],
    samples: Sequence[Sample],
    paired: PairedScores,
    cost: Cost,
) -> dict[str, Any]:
    own, kinds = scores[run.key], np.array([sample.kind for sample in samples])
    retained = [result.retention for result in found if result.retention is not None]
    accepted = [r.num_draft_tokens_accepted for r in found if r.num_draft_tokens_accepted is not None]
    row: dict[str, Any] = {
        "method": run.name,
        "target_retention": run.average_retention,
        "score": float(own.mean()),
        "interval": list(paired.interval(own)),
        "score_by_kind": {kind: float(own[kinds == kind].mean()) for kind in np.unique(kinds[kinds != ""]).tolist()},
        "average_retention": None if run.name == "small" else float(np.mean(retained)) if retained else 0.0,
        "large_call_rate": 0.0 if run.name == "small" else len(retained) / len(found),
        "num_tokens": float(np.mean([result.num_tokens for result in found])),
        "num_draft_tokens_accepted": float(np.mean(accepted)) if accepted else None,
        "gigaflops": cost.flops / 1e9,
        "vision_gigaflops": cost.vision_flops / 1e9,
        "decoder_gigaflops": cost.decoder_flops / 1e9,
    }
    if ("large", None) in scores and run.name != "large":
        row["vs_large"] = vars(paired.difference(own, scores["large", None]))
    return row


def _small_scores(by_run: dict[RunKey, list[Result]]) -> Array | None:
    """What the small model's answers score: alone, or else as the drafts of a run; `None` if it has not answered."""
    if ("small", None) in by_run:
        return _array(result.score for result in by_run["small", None])
    for found in by_run.values():
        drafts = [result.draft_score for result in found if result.draft_score is not None]
        if len(drafts) == len(found):
            return _array(drafts)
    return None


def _by_small_answer(
    scores: dict[RunKey, Array], small: Array | None, paired: PairedScores
) -> dict[str, dict[str, Any]] | None:
    """The scores on the questions that the small model answers rightly, and on the others, where there are any.

    An answer counts as right from a score of 0.5 on.
    """
    if small is None:
        return None
    parts = {}
    for name, chosen in (("right", small >= 0.5), ("wrong", small < 0.5)):
        if not chosen.any():
            continue
        among = paired.among(chosen)
        own = {key: values[chosen] for key, values in scores.items() if key[0] != "small"}
        rows: list[dict[str, Any]] = [
            {
                "method": method,
                "target_retention": retention,
                "score": float(values.mean()),
                "interval": list(among.interval(values)),
            }
            for (method, retention), values in own.items()
        ]
        if ("large", None) in own:
            for row, (key, values) in zip(rows, own.items(), strict=True):
                if key[0] != "large":
                    row["vs_large"] = vars(among.difference(values, own["large", None]))
        parts[name] = {"num_samples": int(chosen.sum()), "rows": rows, "comparisons": _comparisons(own, among)}
    return parts


def _array(values: Iterable[float]) -> Array:
    return np.fromiter(values, dtype=np.float64)


def _comparisons(scores: dict[RunKey, Array], paired: PairedScores) -> list[dict[str, Any]]:
    """The guided methods against all others that prune, at the same retention."""
    return [
        {
            "method": ours,
            "other": other,
            "target_retention": retention,
            **vars(paired.difference(scores[ours, retention], scores[other, retention])),
        }
        for ours, retention in scores
        if ours in GUIDED and retention is not None
        for other, same in scores
        if same == retention and _is_compared(ours, other)
    ]


def _is_compared(ours: str, other: str) -> bool:
    return ours in GUIDED and (other not in GUIDED or other == GUIDED[ours])


def compare_at_equal_cost(
    scores: dict[RunKey, Array], paired: PairedScores, costs: dict[RunKey, float]
) -> list[dict[str, Any]]:
    """The guided methods against what all others score at the same cost; unpruned is a setting of each of them."""
    unpruned = [(costs["large", None], scores["large", None])] if ("large", None) in scores else []
    others = {name for name, retention in scores if retention is not None}
    found = []
    for (ours, retention), other in product(scores, sorted(others)):
        points = [(costs[key], values) for key, values in scores.items() if key[0] == other]
        compared = _is_compared(ours, other)
        expected = at_equal_cost(costs[ours, retention], points + unpruned) if compared else None
        if expected is not None:
            versus = {"method": ours, "other": other, "target_retention": retention}
            difference = paired.difference(scores[ours, retention], expected)
            found.append({**versus, "other_score": float(expected.mean()), **vars(difference)})
    return found


def _summarise_speed(
    by_run: dict[RunKey, list[Result]],
    runs: Sequence[Run],
    costs: dict[RunKey, Cost],
    facts: dict[str, Any],
    device: torch.device | str,
) -> tuple[dict[str, Any], dict[RunKey, float]]:
    """What clock and memory say, and by run the time relative to the large model's."""
    seconds = {
        key: _array(result.seconds for result in found[:: facts["batch_size"]]) for key, found in by_run.items()
    }
    large = seconds.get(("large", None))
    rows, relative = [], {}
    for run in runs:
        of_run = seconds[run.key]  # one of a batch, whose questions share its time
        row: dict[str, Any] = {
            "method": run.name,
            "target_retention": run.average_retention,
            "seconds": float(np.median(of_run)),
            "peak_memory_bytes": costs[run.key].peak_memory_bytes,
        }
        if large is not None:
            ratios = of_run / large
            relative[run.key] = row["relative_to_large"] = float(np.median(ratios))
            row["relative_quartiles"] = [float(value) for value in np.percentile(ratios, [25, 75])]
        rows.append(row)
    speed = {**measurement_record(facts["seed"], device), "num_threads": torch.get_num_threads(), "rows": rows}
    return speed, relative


def as_markdown(summary: dict[str, Any], speed: dict[str, Any]) -> str:
    """The table, one row for each run."""
    cells = [_table_row(row, clock) for row, clock in zip(summary["rows"], speed["rows"], strict=True)]
    lines = [cells[0], ["---"] * len(cells[0]), *(row.values() for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table_row(row: dict[str, Any], clock: dict[str, Any]) -> dict[str, str]:
    versus, retention, peak = row.get("vs_large"), row["average_retention"], clock["peak_memory_bytes"]
    return {
        "method": row["method"],
        "retention": "" if retention is None else f"{100 * retention:.0f} %",
        "score [95 % interval]": _interval(row),
        "difference to large [95 % interval]": "" if versus is None else points(versus),
        "p": "" if versus is None else p_value(versus["p_value"]),
        "large model called": f"{100 * row['large_call_rate']:.0f} %",
        "GFLOPs": f"{row['gigaflops']:.3g}",
        "time / large": f"{clock['relative_to_large']:.2f}" if "relative_to_large" in clock else "",
        "peak memory (GiB)": "" if peak is None else f"{peak / 2**30:.2f}",
    }


def split_as_markdown(summary: dict[str, Any]) -> str:
    """The table of scores by whether the small model's answer is right; empty where it has not answered."""
    parts = summary.get("by_small_answer") or {}
    columns = [column for name in parts for column in (f"score where it is {name}", "difference to large")]
    if not columns:
        return ""
    lines = [["method", "target retention", *columns], ["---"] * (2 + len(columns))]
    for rows in zip(*(part["rows"] for part in parts.values()), strict=True):
        retention = rows[0]["target_retention"]
        line = [rows[0]["method"], "" if retention is None else f"{100 * retention:.0f} %"]
        for row in rows:
            line += [_interval(row), points(row["vs_large"]) if "vs_large" in row else ""]
        lines.append(line)
    counts = " and ".join(f"{name} on {part['num_samples']:,}" for name, part in parts.items())
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nThe small model's answer is {counts} questions; 95 % intervals in brackets."


def _interval(row: dict[str, Any]) -> str:
    """A score in percent with its interval."""
    return f"{100 * row['score']:.1f} [{100 * row['interval'][0]:.1f}, {100 * row['interval'][1]:.1f}]"


def points(difference: dict[str, float]) -> str:
    """A difference in percentage points with its interval."""
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def p_value(value: float) -> str:
    """A p value as it is printed."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def write_report(summary: dict[str, Any], speed: dict[str, Any], folder: Path) -> list[Path]:
    """Writes summary, speed, tables and figure."""
    texts = {
        "summary.json": json.dumps(summary, indent=2) + "\n",
        "speed.json": json.dumps(speed, indent=2) + "\n",
        "table.md": as_markdown(summary, speed) + "\n",
    }
    split = split_as_markdown(summary)
    if split:
        texts["by_small_answer.md"] = split + "\n"
    for name, text in texts.items():
        write_atomically(folder / name, text)
    draw_figure(summary, speed, folder / "figure.png")
    return [folder / name for name in (*texts, "figure.png")]
