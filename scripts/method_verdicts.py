"""Is the pair ahead of the others at equal cost? Said by the measured differences alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["verdict", "verdicts_table"]

OURS = ("sgp", "sgl", "sgp-vision", "sgl-vision", "confirmed", "sgl-confirmed")
_SIGNIFICANT = 0.05


def verdict(differences: Mapping[str, Mapping[str, float] | None]) -> str:
    """Whom a method is ahead of, level with and behind.

    Args:
        differences (mapping): By the other's name the difference to it, `mean` and `p_value`; `None` where even the
            other's cheapest setting costs more.

    Example:
        ```python
        >>> from method_verdicts import verdict

        >>> ahead, level = {"mean": 0.03, "p_value": 0.001}, {"mean": 0.01, "p_value": 0.2}
        >>> verdict({"random": ahead, "FastV": ahead})
        'ahead of all'
        >>> verdict({"random": ahead, "DivPrune": level, "FastV": None})
        'ahead of random; level with DivPrune; cheaper than any FastV'

        ```
    """
    said: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": [], "cheaper than any": []}
    for name, difference in differences.items():
        if difference is None:
            said["cheaper than any"].append(name)
        elif difference["p_value"] >= _SIGNIFICANT:
            said["level with"].append(name)
        else:
            said["ahead of" if difference["mean"] > 0 else "behind"].append(name)
    if len(said["ahead of"]) == len(differences) > 0:
        return "ahead of all"
    return "; ".join(f"{what} {', '.join(names)}" for what, names in said.items() if names)


def verdicts_table(
    evaluations: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], proportions: str
) -> dict[str, Any]:
    """What [`verdict`] says of each guided method at each retention, by what is equal."""
    rows = []
    for data, evaluation in evaluations.items():
        found = evaluation["summary"]["rows"]
        others = [
            name
            for name in dict.fromkeys(row["method"] for row in found if row["target_retention"] is not None)
            if name not in OURS
        ]
        versus_small = _by_run(evaluation["versus_small"])
        equals = [evaluation["speed"]["at_equal_time"], evaluation["scaled"]["at_equal_operations"]]
        for row in found:
            ours, retention = row["method"], row["target_retention"]
            if ours in OURS:
                small = versus_small.get((ours, "", retention))
                cells = [
                    verdict(
                        {names[other]: equal.get((ours, other, retention)) for other in others}
                        | ({names["small"]: small} if small else {})
                    )
                    for equal in map(_by_run, equals)
                ]
                rows.append([data, "" if retention is None else f"{retention:.0%}", f"`{ours}`", *cells])
    caption = (
        "Ahead and behind: the difference at equal cost, as in the tables of comparisons, has p < 0.05 in the paired "
        "randomisation test; level: it has not. With the small model alone, which always costs less, scores are "
        "compared as they are."
    )
    columns = ["data", "retention", "method", "at equal time", f"at equal {proportions} operations"]
    return {"columns": columns, "rows": rows, "caption": caption}


def _by_run(comparisons: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, float], Mapping[str, Any]]:
    return {(each["method"], each.get("other", ""), each["target_retention"]): each for each in comparisons}
