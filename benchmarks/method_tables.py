"""Tables of all methods side by side, of where an answer's time goes, and of a vision tower's cost by tiles."""

from __future__ import annotations

from typing import Any

from benchmarks.cells import Shown, Table, as_table

__all__ = ["growth_tiles_table", "methods_table", "profile_table"]

_MIB = 2**20
_NAMES = {"large": "large model alone", "exit": "early exit: small model and its scores"}


def methods_table(shown: Shown, timed: dict[str, Any] | None, counted: dict[str, Any] | None) -> Table:
    """Average retention, the tower's share, operations and time of all methods, as far as they were measured."""
    part = counted or timed or {}
    rows = []
    for name, method in part["methods"].items():
        flops = {} if counted is None else counted["methods"][name]
        times = {} if timed is None else timed["methods"][name]
        rows.append(
            [
                _name(name, method["kind"]),
                f"{method['average_retention']:.0%}",
                f"{method['tower_share']:.0%}",
                _ratio(flops.get("flops_over_large")),
                shown.spread(times["time_over_large"]) if times else "",
                shown.ms(times["time"]) if times else "",
                _ratio(flops.get("flops_over_large_with_exits")),
                shown.spread(times["time_over_large_with_exits"]) if "time_over_large_with_exits" in times else "",
            ]
        )
    columns = ["method", "average retention", "tower share", "FLOPs", "time", shown.clock("ms")]
    columns += ["FLOPs, half exit", "time, half exit"]
    caption = (
        f"Whole answers of {part['answer_tokens']} tokens to a prompt of {part['prompt_length']:,}, "
        f"{part['num_visual_tokens']:,} of them visual; all ratios to the large model alone ({part['attention']}). "
        "FLOPs and time hold everything a method does: both models, guidance, selection. Tower share is how much of "
        "its work on patches the large model's vision tower does. With half of the questions exiting early, an answer "
        "takes the mean of an exit and of a guided answer whose draft is scored. Where the large model does not "
        "confirm the draft, it reads everything again; of these questions none exits. "
    )
    if counted is not None:
        caption += "FLOPs, average retention and tower share are those of the unshrunk models. "
    return as_table(columns, rows, caption + (shown.conditions() if timed else "Nothing has been timed yet."))


def profile_table(shown: Shown, part: dict[str, Any]) -> Table:
    """Where the time of an answer goes."""
    ways = part["profile"]
    phases = list(next(iter(ways.values())))
    rows = [[phase, *(_profiled(shown, way[phase]) for way in ways.values())] for phase in phases]
    columns = ["phase", *(_name(name, part["methods"][name]["kind"]) for name in ways)]
    caption = (
        "Where the time of an answer goes, as parts of the whole time of the large model alone. Between the models "
        "lie the transfer of the importance, the choice of tokens and the start of the large model's `generate`; the "
        "rest are projectors, heads and `generate` itself. "
    )
    rows = [row for row in rows if any(row[1:])]
    return as_table(columns, rows, caption + shown.conditions())


def growth_tiles_table(shown: Shown, part: dict[str, Any]) -> Table:
    """The tower's share of the time, the whole time, and peaks of memory, by the number of tiles."""
    rows = []
    for point in part["points"]:
        for name, way in point["ways"].items():
            memory = way["memory"]
            rows.append(
                [
                    point["value"],
                    f"{point['num_visual_tokens']:,}",
                    _name(name, "large" if name == "large" else "pair"),
                    shown.spread(way["tower_share_of_time"]),
                    shown.spread(way["time_over_large"]),
                    shown.ms(way["time"]),
                    "" if memory is None else f"{memory['peak_bytes'] / _MIB:,.0f}",
                    "" if memory is None else f"{memory['working_bytes'] / _MIB:,.0f}",
                    "" if way["tower_memory"] is None else f"{way['tower_memory'] / _MIB:,.0f}",
                ]
            )
    columns: list[str | None] = ["tiles", "visual tokens", "method", "tower's share of its time", "time / large alone"]
    columns += [shown.clock("ms"), "peak memory, MiB", "without weights, MiB", "in the tower, MiB"]
    caption = (
        f"Answers of {part['answer_tokens']} tokens. The tower is the large model's. Peak memory is weights and "
        "tensors of the models that take part; in the tower, what its tensors take on top of those before it. "
    )
    return as_table(columns, rows, caption + shown.conditions())


def _name(name: str, kind: str) -> str:
    return _NAMES.get(name, f"pair, {name}" if kind == "pair" else name)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _profiled(shown: Shown, found: dict[str, float]) -> str:
    return shown.spread(found) if found["max"] else ""
