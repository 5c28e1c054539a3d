"""The figure of an evaluation: accuracy against time, and against the average retention."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from transformers_sgl.storage.files import write_atomically

__all__ = ["draw_figure", "new_figure", "save_figure"]

# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers that tell without colour.
_STYLES = {
    "sgp": ("#0072B2", "o"),
    "sgl": ("#56B4E9", "D"),
    "sgp-first": ("#0072B2", "s"),
    "sgp-facility": ("#003C5C", "o"),
    "sgp-vision": ("#004B75", "p"),
    "sgl-vision": ("#E69F00", "d"),
    "confirmed": ("#004B75", "*"),
    "sgl-confirmed": ("#E69F00", "*"),
    "oracle": ("#000000", "*"),
    "divprune": ("#009E73", "s"),
    "divprune-late": ("#009E73", "x"),
    "cdpruner": ("#882255", "h"),
    "cdpruner-weighted": ("#882255", "x"),
    "visionzip": ("#8C6D00", "<"),
    "visionzip-mean": ("#8C6D00", ">"),
    "fastv": ("#D55E00", "^"),
    "random": ("#999999", "v"),
    "downsample": ("#CC79A7", "P"),
}
_SPARE_STYLES = [(colour, marker) for colour in ("#E69F00", "#56B4E9") for marker in "<>hpX18H"]


def new_figure(width: float, height: float) -> Any:
    """An empty figure; pyplot would keep it, and choose a window system for the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a figure as PNG, whole or not at all."""
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    write_atomically(path, picture.getvalue())


def draw_figure(summary: dict[str, Any], speed: dict[str, Any], path: Path) -> Any:
    """Accuracy against end-to-end time, and against the average retention."""
    figure = new_figure(5.2, 8.2)  # no wider than a phone shows legibly
    in_time, in_retention = figure.subplots(2, 1, sharey=True)
    rows = list(zip(summary["rows"], speed["rows"], strict=True))
    relative = all("relative_to_large" in clock for _, clock in rows)
    time = "relative_to_large" if relative else "seconds"
    spare = iter(_SPARE_STYLES * len(rows))
    for name in dict.fromkeys(row["method"] for row in summary["rows"] if row["method"] not in ("large", "small")):
        colour, marker = _STYLES.get(name) or next(spare)
        style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.4, "capsize": 2}
        if name == "divprune-late":
            style["linestyle"] = "--"
        of_method = [pair for pair in rows if pair[0]["method"] == name]
        scores, low, high = 100 * np.array([(row["score"], *row["interval"]) for row, _ in of_method]).T
        errors = scores - low, high - scores
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
    save_figure(figure, path, dpi=160)
    return figure
