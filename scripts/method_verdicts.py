"""Is the pair ahead of the others at equal retention and at equal cost? Said by the measured differences alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers_sgl.evaluation.methods import GUIDED

__all__ = ["OURS", "by_run", "claims_table", "every_verdict", "summary_table"]

OURS = tuple(GUIDED)
_SIGNIFICANT = 0.05
# Short names of the others.
_SHORT = {
    "random": "random",
    "fastv": "FastV",
    "divprune": "DivPrune",
    "divprune-late": "late DivPrune",
    "cdpruner": "CDPruner",
    "cdpruner-weighted": "weighted CDPruner",
    "visionzip": "VisionZip",
    "visionzip-mean": "mean VisionZip",
    "downsample": "smaller image",
}
_EQUALS = ("equal_retention", "equal_operations", "equal_time", "equal_scaled")
# The others that a guided method has to be ahead of where few tokens are kept.
_RIVALS, _FEW = ("divprune", "cdpruner"), (0.09, 0.05)


def _place(difference: Mapping[str, float] | None) -> str | None:
    """Ahead, level or behind; `None` where the other costs more."""
    if difference is None:
        return None
    if difference["p_value"] >= _SIGNIFICANT:
        return "level"
    return "ahead" if difference["mean"] > 0 else "behind"


def every_verdict(evaluations: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each guided method against each other one, at each retention and on each data set.

    An entry has the `data`, the `method`, its `target_retention` (`None` without one), the `other`, and the paired
    difference with its 95 % interval: at `equal_retention`, `equal_operations`, `equal_time`, and `equal_scaled`, the
    operations on other proportions. `None` stands for what cannot be compared.
    """
    found = []
    for data, evaluation in evaluations.items():
        rows = evaluation["summary"]["rows"]
        equals = {name: by_run(each) for name, each in zip(_EQUALS, _comparisons(evaluation), strict=True)}
        for row in rows:
            ours, retention = row["method"], row["target_retention"]
            if ours in OURS:
                found += [
                    {
                        "data": data,
                        "method": ours,
                        "target_retention": retention,
                        "other": other,
                        **{name: each.get((ours, other, retention)) for name, each in equals.items()},
                    }
                    for other in _others(rows)
                ]
    return found


def _comparisons(evaluation: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], ...]:
    summary, speed, scaled = (evaluation[part] for part in ("summary", "speed", "scaled"))
    return (
        summary["comparisons"],
        summary["at_equal_operations"],
        speed["at_equal_time"],
        scaled["at_equal_operations"],
    )


def _others(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(row["method"] for row in rows if row["target_retention"] is not None)
    return [name for name in names if name not in OURS]


def summary_table(
    evaluations: Mapping[str, Mapping[str, Any]], proportions: str, methods: Sequence[str] = OURS
) -> dict[str, Any]:
    """How often guided `methods` are ahead of, level with and behind each other one; where one is behind, by name."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in every_verdict(evaluations):
        if each["method"] not in methods:
            continue
        groups.setdefault((each["method"], each["other"]), []).append(each)
    rows = [
        [f"`{ours}`", _SHORT.get(other, other), *(_tally(found, equal) for equal in _EQUALS)]
        for (ours, other), found in groups.items()
    ]
    caption = (
        "On how many of the data sets and retentions the guided method is ahead, level and behind (p < 0.05 in the "
        "paired randomisation test), and where it is behind. At equal cost the other method is taken on the line "
        "between its two nearest settings, the unpruned large model being one of them; where even its cheapest "
        "setting costs more than the guided method, it is not counted."
    )
    columns = ["method", "compared with", "at equal retention", "at equal GFLOPs", "at equal time"]
    columns += [f"at equal {proportions} operations"]
    return {"columns": columns, "rows": rows, "caption": caption}


def _tally(found: Sequence[Mapping[str, Any]], equal: str) -> str:
    """The words for some verdicts of one method against another."""
    places: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
    for each in found:
        place = _place(each[equal])
        if place is not None:
            places[place].append(_where(each))
    words = [f"{place} {len(where)}" for place, where in places.items() if where]
    if places["behind"]:
        words[-1] += f" ({', '.join(places['behind'])})"
    return "; ".join(words) or "-"


def _where(each: Mapping[str, Any]) -> str:
    retention = each["target_retention"]
    return str(each["data"]) if retention is None else f"{each['data']} {retention:.0%}"


def claims_table(evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of each guided method: whether it loses to anything at equal retention, and where few tokens put it ahead."""
    whole = [each for each in every_verdict(evaluations) if each["target_retention"] is not None]
    rows = []
    for ours in dict.fromkeys(each["method"] for each in whole):
        own = [each for each in whole if each["method"] == ours]
        losses: dict[str, list[str]] = {}
        for each in own:
            if _place(each["equal_retention"]) == "behind":
                losses.setdefault(_SHORT.get(each["other"], each["other"]), []).append(_where(each))
        behind = "; ".join(f"{name} ({', '.join(where)})" for name, where in losses.items())
        leads = [_leads(own, rival, retention) for rival in _RIVALS for retention in _FEW]
        rows.append([f"`{ours}`", behind or "nobody", *leads])
    ahead = [f"ahead of {_SHORT[rival]} at {retention:.0%}" for rival in _RIVALS for retention in _FEW]
    caption = "At equal retention, p < 0.05 in the paired randomisation test."
    return {"columns": ["method", "behind", *ahead], "rows": rows, "caption": caption}


def _leads(own: Sequence[Mapping[str, Any]], rival: str, retention: float) -> str:
    """The data sets on which a method is ahead of a rival at a retention, of how many."""
    found = [each for each in own if (each["other"], each["target_retention"]) == (rival, retention)]
    names = [each["data"] for each in found if _place(each["equal_retention"]) == "ahead"]
    return f"{', '.join(names) or 'none'} of {len(found)}" if found else "-"


def by_run(comparisons: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, float], Mapping[str, Any]]:
    """Comparisons by method, other and retention."""
    return {(each["method"], each.get("other", ""), each["target_retention"]): each for each in comparisons}
