"""What an evaluation tells: accuracies with intervals, tests, comparisons at equal cost, a table and a figure.

Read top to bottom: the statistics, which know nothing but scores; the summary, which is the same whenever the same
answers are given (`summary.json`); the speed, which is not (`speed.json`); the Markdown table and the figure.

Questions about one image are not independent, so images are what is drawn again. One set of draws serves all runs: a
question that is hard is hard for all, which is what makes the comparison paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from transformers_sgl.evaluation.cost import Cost
from transformers_sgl.evaluation.data import Sample
from transformers_sgl.evaluation.evaluation_run import Result, Run
from transformers_sgl.evaluation.records import measurement_record
from transformers_sgl.storage.files import write_atomically

__all__ = [
    "PairedScores",
    "as_markdown",
    "at_equal_cost",
    "draw_figure",
    "summarise",
    "summarise_speed",
    "write_report",
]

Array = npt.NDArray[np.float64]
_Key = tuple[str, float | None]

_RESAMPLES = 10_000
_CHUNK = 500
# Guided methods, each compared with every other method.
_OURS = ("sgp", "sgl")


# --------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Difference:
    """A difference of mean scores over the same questions.

    Attributes:
        mean: The difference.
        low: The lower end of its 95 % paired-bootstrap interval.
        high: The upper end.
        p_value: How probable a difference as large as this is if the two are exchangeable; two-sided paired
            randomisation test.
    """

    mean: float
    low: float
    high: float
    p_value: float


class PairedScores:
    """Scores of several runs on the same questions, drawn again and again together.

    Args:
        images (`Sequence[str]`): Each question's image; the questions about an image are drawn together.
        seed (`int`, defaults to 0): What the draws depend on.

    Example:
        ```python
        >>> import numpy as np
        >>> from transformers_sgl.evaluation.evaluation_report import PairedScores

        >>> paired = PairedScores([str(image) for image in range(100)])
        >>> scores = np.arange(100) % 2 == 0
        >>> low, high = paired.interval(scores.astype(float))
        >>> 0.3 < low < 0.5 < high < 0.7
        True

        ```
    """

    def __init__(self, images: Sequence[str], seed: int = 0) -> None:
        names, self._image = np.unique(np.asarray(images), return_inverse=True)
        self._sizes = np.bincount(self._image).astype(float)  # (images,)
        rng = np.random.default_rng(seed)
        number, chunks = len(names), range(_RESAMPLES // _CHUNK)
        equal = np.full(number, 1 / number)
        # Of shape (resamples, images), in chunks: how often each image is drawn, and whether its answers are swapped.
        # More than 255 times is beyond all chance once there are more than a few images.
        self._draws = [rng.multinomial(number, equal, _CHUNK).clip(max=255).astype(np.uint8) for _ in chunks]
        self._swaps = [rng.integers(0, 2, (_CHUNK, number), dtype=np.uint8) for _ in chunks]

    def interval(self, scores: Array) -> tuple[float, float]:
        """The 95 % bootstrap interval of a mean.

        Args:
            scores (array of shape `(questions,)`): A score for each question, or a difference of two.

        Returns:
            `tuple[float, float]`: Its ends.
        """
        both = np.stack([self._sums(scores), self._sizes], axis=1)
        drawn = np.concatenate([draws @ both for draws in self._draws])
        means = drawn[:, 0] / drawn[:, 1]
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)

    def difference(self, scores: Array, others: Array) -> Difference:
        """How much better one run is than another.

        Args:
            scores (array of shape `(questions,)`): The one's scores.
            others (array of shape `(questions,)`): The other's.

        Returns:
            `Difference`: The mean of `scores - others`, its interval and its test.
        """
        differences = scores - others
        sums = self._sums(differences)
        swapped = np.abs(np.concatenate([sums.sum() - 2 * (swaps @ sums) for swaps in self._swaps]))
        # A hair's breadth: the same sum in another order of its terms is not a smaller one.
        as_large = int((swapped >= abs(sums.sum()) - 1e-6 * max(1.0, np.abs(sums).sum())).sum())
        low, high = self.interval(differences)
        return Difference(float(differences.mean()), low, high, (1 + as_large) / (1 + _RESAMPLES))

    def _sums(self, scores: Array) -> Array:
        return np.asarray(np.bincount(self._image, weights=scores), dtype=np.float64)


def at_equal_cost(cost: float, points: Sequence[tuple[float, Array]]) -> Array | None:
    """What a method would score at a given cost, on the line between its two nearest settings.

    Args:
        cost (`float`): The cost.
        points (`Sequence`): The method's settings, unpruned included: cost, and scores of shape `(questions,)`.

    Returns:
        array of shape `(questions,)`, *optional*: The scores; those of the dearest setting where the cost is beyond
        it, `None` where no setting is as cheap.

    Example:
        ```python
        >>> import numpy as np
        >>> from transformers_sgl.evaluation.evaluation_report import at_equal_cost

        >>> at_equal_cost(3.0, [(2.0, np.array([0.0, 1.0])), (4.0, np.array([1.0, 1.0]))]).tolist()
        [0.5, 1.0]

        ```
    """
    points = sorted(points, key=lambda point: (point[0], point[1].mean()))  # of two as dear the better comes last
    costs = np.array([each for each, _ in points])
    if cost < costs[0]:
        return None
    if cost >= costs[-1]:
        return points[-1][1]
    above = int(np.searchsorted(costs, cost, side="right"))
    share = (cost - costs[above - 1]) / (costs[above] - costs[above - 1])
    return (1 - share) * points[above - 1][1] + share * points[above][1]


# ------------------------------------------------------------------------------------------------------------ summary


def summarise(
    results: Sequence[Result],
    samples: Sequence[Sample],
    runs: Sequence[Run],
    costs: dict[_Key, Cost],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Everything that depends on the answers alone.

    Args:
        results (`Sequence[Result]`): What the runs made of the samples.
        samples (`Sequence[Sample]`): The data.
        runs (`Sequence[Run]`): What was run.
        costs (`dict`): By run, its operations and memory.
        facts (`dict`): What the records depend on.

    Returns:
        `dict`: `rows`, one for each run; `comparisons` of the guided methods with the others at equal retention, and
        `at_equal_operations`; ready for JSON.
    """
    by_run = _by_run(results, runs)
    scores = {key: _array(result.score for result in found) for key, found in by_run.items()}
    paired = PairedScores([sample.image_id for sample in samples], facts["seed"])
    kinds = np.array([sample.kind for sample in samples])
    rows = []
    for run in runs:
        found = by_run[run.key]
        retained = [result.retention for result in found if result.retention is not None]
        accepted = [r.num_draft_tokens_accepted for r in found if r.num_draft_tokens_accepted is not None]
        row: dict[str, Any] = {
            "method": run.name,
            "target_retention": run.average_retention,
            "score": float(scores[run.key].mean()),
            "interval": list(paired.interval(scores[run.key])),
            "score_by_kind": {kind: float(scores[run.key][kinds == kind].mean()) for kind in _kinds(samples)},
            "average_retention": None if run.name == "small" else float(np.mean(retained)) if retained else 0.0,
            "large_call_rate": 0.0 if run.name == "small" else len(retained) / len(found),
            "num_tokens": float(np.mean([result.num_tokens for result in found])),
            "num_draft_tokens_accepted": float(np.mean(accepted)) if accepted else None,
            "gigaflops": costs[run.key].flops / 1e9,
        }
        if ("large", None) in scores and run.name != "large":
            row["vs_large"] = vars(paired.difference(scores[run.key], scores["large", None]))
        rows.append(row)
    operations = {key: float(cost.flops) for key, cost in costs.items()}
    return {
        "data": facts["data"],
        "metric": facts["metric_name"],
        "num_samples": len(samples),
        "num_images": len({sample.image_id for sample in samples}),
        "batch_size": facts["batch_size"],
        "seed": facts["seed"],
        "max_new_tokens": facts["max_new_tokens"],
        "dtype": facts["dtype"],
        "thresholds": facts["thresholds"],
        "rows": rows,
        "comparisons": _comparisons(scores, paired),
        "at_equal_operations": _at_equal_cost(scores, paired, operations),
    }


def _by_run(results: Sequence[Result], runs: Sequence[Run]) -> dict[_Key, list[Result]]:
    """Each run's results, in the order of the questions."""
    found: dict[_Key, list[Result]] = {run.key: [] for run in runs}
    for result in results:
        found[result.run].append(result)
    return found


def _array(values: Iterable[float]) -> Array:
    return np.fromiter(values, dtype=np.float64)


def _kinds(samples: Sequence[Sample]) -> list[str]:
    return sorted({sample.kind for sample in samples if sample.kind})


def _comparisons(scores: dict[_Key, Array], paired: PairedScores) -> list[dict[str, Any]]:
    """The guided methods against all others that prune, at the same retention."""
    return [
        {
            "method": ours,
            "other": other,
            "target_retention": retention,
            **vars(paired.difference(scores[ours, retention], scores[other, retention])),
        }
        for ours, retention in scores
        if ours in _OURS
        for other, same in scores
        if same == retention and other not in _OURS
    ]


def _at_equal_cost(scores: dict[_Key, Array], paired: PairedScores, costs: dict[_Key, float]) -> list[dict[str, Any]]:
    """The guided methods against what all others score at the same cost; unpruned is a setting of each of them."""
    unpruned = [(costs["large", None], scores["large", None])] if ("large", None) in scores else []
    others = {name for name, retention in scores if retention is not None and name not in _OURS}
    found = []
    for ours, retention in scores:
        if ours not in _OURS:
            continue
        for other in sorted(others):
            points = [(costs[key], values) for key, values in scores.items() if key[0] == other]
            expected = at_equal_cost(costs[ours, retention], points + unpruned)
            if expected is not None:
                difference = paired.difference(scores[ours, retention], expected)
                found.append(
                    {
                        "method": ours,
                        "other": other,
                        "target_retention": retention,
                        "other_score": float(expected.mean()),
                        **vars(difference),
                    }
                )
    return found


def summarise_speed(
    results: Sequence[Result],
    samples: Sequence[Sample],
    runs: Sequence[Run],
    costs: dict[_Key, Cost],
    facts: dict[str, Any],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """What clock and memory say, and what the scores are at equal time.

    Args:
        results (`Sequence[Result]`): What the runs made of the samples.
        samples (`Sequence[Sample]`): The data.
        runs (`Sequence[Run]`): What was run.
        costs (`dict`): By run, its operations and memory.
        facts (`dict`): What the records depend on.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the models ran.

    Returns:
        `dict`: Machine, versions and date; `rows`, one for each run, with the median over batches of the seconds for a
        question and of their ratio to the large model alone; `at_equal_time`.
    """
    by_run = _by_run(results, runs)
    seconds = {key: _array(result.seconds for result in found) for key, found in by_run.items()}
    batches = np.arange(0, len(samples), facts["batch_size"])  # all of a batch's questions share its time
    large = seconds.get(("large", None))
    rows, relative = [], {}
    for run in runs:
        of_run = seconds[run.key][batches]
        row: dict[str, Any] = {
            "method": run.name,
            "target_retention": run.average_retention,
            "seconds": float(np.median(of_run)),
            "peak_memory_bytes": costs[run.key].peak_memory_bytes,
        }
        if large is not None:
            ratios = of_run / large[batches]
            relative[run.key] = float(np.median(ratios))
            row["relative_to_large"] = relative[run.key]
            row["relative_quartiles"] = [float(value) for value in np.percentile(ratios, [25, 75])]
        rows.append(row)
    scores = {key: _array(result.score for result in found) for key, found in by_run.items()}
    paired = PairedScores([sample.image_id for sample in samples], facts["seed"])
    return {
        **measurement_record(facts["seed"], device),
        "num_threads": torch.get_num_threads(),
        "rows": rows,
        "at_equal_time": _at_equal_cost(scores, paired, relative) if relative else [],
    }


# -------------------------------------------------------------------------------------------------------------- table


def as_markdown(summary: dict[str, Any], speed: dict[str, Any]) -> str:
    """The table, one row for each run.

    Args:
        summary (`dict`): From [`summarise`].
        speed (`dict`): From [`summarise_speed`].

    Returns:
        `str`: Markdown.
    """
    cells = [table_row(row, clock) for row, clock in zip(summary["rows"], speed["rows"], strict=True)]
    lines = [" | ".join(TABLE_COLUMNS), " | ".join("---" for _ in TABLE_COLUMNS), *map(" | ".join, cells)]
    return "\n".join(f"| {line} |" for line in lines)


TABLE_COLUMNS = (
    "method",
    "retention",
    "score [95 % interval]",
    "difference to large [95 % interval]",
    "p",
    "large model called",
    "GFLOPs",
    "time / large",
    "peak memory (GiB)",
)


def table_row(row: dict[str, Any], clock: dict[str, Any]) -> list[str]:
    """A row of the table.

    Args:
        row (`dict`): One of a summary's rows.
        clock (`dict`): The speed's row for the same run.

    Returns:
        `list[str]`: A cell for each of [`TABLE_COLUMNS`].
    """
    versus = row.get("vs_large")
    retention = row["average_retention"]
    return [
        row["method"],
        "" if retention is None else f"{100 * retention:.0f} %",
        f"{100 * row['score']:.1f} [{100 * row['interval'][0]:.1f}, {100 * row['interval'][1]:.1f}]",
        "" if versus is None else points(versus),
        "" if versus is None else p_value(versus["p_value"]),
        f"{100 * row['large_call_rate']:.0f} %",
        f"{row['gigaflops']:.3g}",
        f"{clock['relative_to_large']:.2f}" if "relative_to_large" in clock else "",
        "" if clock["peak_memory_bytes"] is None else f"{clock['peak_memory_bytes'] / 2**30:.2f}",
    ]


def points(difference: dict[str, float]) -> str:
    """A difference in percentage points with its interval.

    Args:
        difference (`dict`): `mean`, `low` and `high`, as fractions.

    Returns:
        `str`: Such as `+1.5 [+0.4, +2.6]`.
    """
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def p_value(value: float) -> str:
    """A p value as it is printed.

    Args:
        value (`float`): The value.

    Returns:
        `str`: With two digits; "< 0.001" below that.
    """
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


# ------------------------------------------------------------------------------------------------------------- figure


# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers that tell without colour.
_STYLES = {
    "sgp": ("#0072B2", "o"),
    "sgl": ("#56B4E9", "D"),
    "oracle": ("#000000", "*"),
    "divprune": ("#009E73", "s"),
    "divprune-late": ("#009E73", "x"),
    "fastv": ("#D55E00", "^"),
    "random": ("#999999", "v"),
    "downsample": ("#CC79A7", "P"),
}
_SPARE_STYLES = [("#E69F00", marker) for marker in "<>dhpX18"]


def draw_figure(summary: dict[str, Any], speed: dict[str, Any], path: Path) -> Any:
    """Accuracy against end-to-end time, and against the average retention.

    Args:
        summary (`dict`): From [`summarise`].
        speed (`dict`): From [`summarise_speed`].
        path (`Path`): The picture; its ending names the format.

    Returns:
        `matplotlib.figure.Figure`: What was drawn.
    """
    # The objects rather than pyplot, which would keep the figure and choose a window system for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # One above the other and no wider than a phone shows legibly.
    figure = Figure(figsize=(5.2, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    in_time, in_retention = figure.subplots(2, 1, sharey=True)
    rows = list(zip(summary["rows"], speed["rows"], strict=True))
    relative = all("relative_to_large" in clock for _, clock in rows)
    time = "relative_to_large" if relative else "seconds"
    spare = iter(_SPARE_STYLES * len(rows))
    for name in dict.fromkeys(row["method"] for row in summary["rows"] if row["target_retention"] is not None):
        colour, marker = _STYLES.get(name) or next(spare)
        style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.4, "capsize": 2}
        if name == "divprune-late":
            style["linestyle"] = "--"
        of_method = [pair for pair in rows if pair[0]["method"] == name]
        scores = [100 * row["score"] for row, _ in of_method]
        errors = [
            [100 * (row["score"] - row["interval"][0]) for row, _ in of_method],
            [100 * (row["interval"][1] - row["score"]) for row, _ in of_method],
        ]
        times = [clock[time] for _, clock in of_method]
        retained = [100 * row["average_retention"] for row, _ in of_method]
        in_time.errorbar(times, scores, errors, label=name, **style)
        in_retention.errorbar(retained, scores, errors, **style)
    for row, clock in rows:
        if row["method"] in ("large", "small"):
            dashes = "-" if row["method"] == "large" else ":"
            style = {"color": "#555555", "linestyle": dashes, "linewidth": 1}
            in_retention.axhline(100 * row["score"], **style)
            in_time.axhline(100 * row["score"], **style)
            style |= {"marker": "o", "markersize": 7, "markerfacecolor": "white", "label": f"{row['method']} alone"}
            in_time.plot(clock[time], 100 * row["score"], **style)
    in_time.set_xlabel(
        f"end-to-end time{', relative to the large model alone' if relative else ' for a question (s)'}"
    )
    in_time.set_xlim(left=0)
    in_retention.set_xlabel("average retention of visual tokens (%)")
    in_retention.set_xlim(0, 100)
    for axes in (in_time, in_retention):
        axes.set_ylabel(f"{summary['metric'].replace('_', ' ')} (%)")
        axes.grid(alpha=0.25)
    in_time.set_title(f"{summary['data']}, {summary['num_samples']:,} questions; bars: 95 % intervals", fontsize=10)
    figure.legend(*in_time.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=160)
    return figure


def write_report(summary: dict[str, Any], speed: dict[str, Any], folder: Path) -> list[Path]:
    """Writes summary, speed, table and figure.

    Args:
        summary (`dict`): From [`summarise`].
        speed (`dict`): From [`summarise_speed`].
        folder (`Path`): Gets `summary.json`, `speed.json`, `table.md` and `figure.png`.

    Returns:
        `list[Path]`: The files written.

    Raises:
        OSError: If a file cannot be written.
    """
    texts = {
        "summary.json": json.dumps(summary, indent=2) + "\n",
        "speed.json": json.dumps(speed, indent=2) + "\n",
        "table.md": as_markdown(summary, speed) + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    draw_figure(summary, speed, folder / "figure.png")
    return [folder / name for name in (*texts, "figure.png")]
