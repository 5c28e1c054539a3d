"""The figure: speed-up of the prefill against the ideal, and time by the share of early exits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.verdicts import FEWEST_ROUNDS

__all__ = ["draw_figure"]

# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers that tell without colour.
_STYLES = {"quality": ("#009E73", "s"), "balanced": ("#0072B2", "o"), "fast": ("#E69F00", "D")}


def draw_figure(record: dict[str, Any], path: Path) -> Any:
    """Draws a panel for each part that has one.

    Args:
        record (`dict`): A run's.
        path (`Path`): The picture; its ending names the format.

    Returns:
        `matplotlib.figure.Figure`: What was drawn; `None` where no part has a panel, and then nothing is written.
    """
    # The objects rather than pyplot, which would keep the figure and choose a window system for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(_panels(record))
    if not panels:
        return None
    # One above the other and no wider than a phone shows legibly.
    figure = Figure(figsize=(5.2, 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        draw(axes)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    arguments = record["arguments"]
    title = f"{arguments['large']} guided by {arguments['small']}, random weights"
    if arguments["shrink"] > 1:
        title += f", widths / {arguments['shrink']}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)
    return figure


def _panels(record: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
    """What to draw, one function for each panel."""
    parts, rounds = record["parts"], record["arguments"]["rounds"]
    if "prefill" in parts:
        yield lambda axes: _draw_prefill(axes, parts["prefill"], rounds)
    if "end-to-end" in parts:
        yield lambda axes: _draw_exits(axes, parts["end-to-end"], rounds)


def _draw_prefill(axes: Any, part: dict[str, Any], rounds: int) -> None:
    settings = sorted(part["settings"].values(), key=lambda setting: setting["average_retention"])
    retention = [100 * setting["average_retention"] for setting in settings]
    for of, colour, marker in (("decoder", "#0072B2", "o"), ("whole", "#D55E00", "^")):
        label = "decoder" if of == "decoder" else "whole pass"
        ideal = [setting[of]["ideal"] for setting in settings]
        axes.plot(retention, ideal, color=colour, linestyle=":", label=f"{label}, ideal")
        measured = [setting[of]["speed_up"] for setting in settings]
        _draw_line(axes, retention, measured, rounds, color=colour, marker=marker, label=f"{label}, measured")
    axes.set_xlabel("average retention of visual tokens (%)")
    axes.set_ylabel("speed-up of the first pass")


def _draw_exits(axes: Any, part: dict[str, Any], rounds: int) -> None:
    for name, setting in part["presets"].items():
        colour, marker = _STYLES[name]
        shares = [100 * float(share) for share in setting["by_exit_share"]]
        measured = list(setting["by_exit_share"].values())
        label = f"average retention {setting['average_retention']:.0%}"
        _draw_line(axes, shares, measured, rounds, color=colour, marker=marker, label=label)
    axes.axhline(1, color="#555555", linewidth=1, label="large model alone")
    axes.set_xlabel("questions that exit early (%)")
    axes.set_ylabel("end-to-end time / large alone")
    axes.set_ylim(bottom=0)


def _draw_line(
    axes: Any, places: Sequence[float], found: Sequence[dict[str, float]], rounds: int, **style: Any
) -> None:
    """Medians, with how far least and greatest are from them if the rounds carry an interval."""
    medians = [each["median"] for each in found]
    errors = None
    if rounds >= FEWEST_ROUNDS:
        below = [each["median"] - each["min"] for each in found]
        errors = [below, [each["max"] - each["median"] for each in found]]
    axes.errorbar(places, medians, errors, capsize=2, **style)
