"""Tables of drafts: in rounds against one and none, what passes take, and when both models are faster with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cells import FEWEST_FOR_MEDIAN, Shown, Table, as_table
from benchmarks.verdicts import FEWEST_ROUNDS, verdict

__all__ = ["answers_table", "passes_table", "rounds_table"]

_ONE_TILE = "On a CPU the vision towers encode one tile, whose time counts for each. "


def rounds_table(shown: Shown, parts: Sequence[dict[str, Any]]) -> Table:
    """How many times faster an answer is with drafts, by how often they are right."""
    rows = []
    for part in parts:
        of_part = Shown(shown.arguments, min(part["rounds"], shown.rounds))
        for row in part["rows"]:
            cells = [f"{part['num_visual_tokens']:,}", row["answer_tokens"], _kind(row["drafts"], None)]
            cells.append("" if row["acceptance"] is None else f"{row['acceptance']:.0%}")
            cells += [f"{row['large_passes']:g}", f"{row['small_passes']:g}"]
            cells += [of_part.spread(row[name]["speed_up"]) for name in ("decoding", "answer", "whole")]
            rows.append([*cells, *(of_part.ms(row[name]["time"]) for name in ("decoding", "whole"))])
    columns = ["visual tokens", "answer tokens", "drafts", "right", "passes, large model", "passes, small model"]
    columns += ["speed-up of decoding", "of the answer", "with guidance"]
    clocks = [shown.clock("decoding, ms"), shown.clock("with guidance, ms")]
    retention = parts[0]["average_retention"]
    caption = (
        f"The large model, pruned to {retention:.0%}, with drafts, against the same without. The first draft is the "
        "small model's answer, whose tokens are right with the probability given, up to the first that is wrong; in "
        "rounds it goes on after each correction, with the same probability, and all its passes are in the times. "
        "Decoding is from the first token to the last; the answer has the first pass as well, which reads the first "
        "draft along, in rounds no more than its beginning; with guidance, the small model's answer counts, too, as "
        "long as the large one's. "
    )
    # Records of before the default was another do not name it.
    caption += (
        f"The small model keeps {parts[0].get('draft_retention_ratio', 1.0):.0%} of its visual tokens for rounds. "
    )
    if FEWEST_FOR_MEDIAN <= min(part["rounds"] for part in parts) < FEWEST_ROUNDS <= shown.rounds:
        caption += f"Without an interval, medians of {min(part['rounds'] for part in parts)} rounds. "
    return as_table([*columns, *clocks], rows, caption + _ONE_TILE + shown.conditions())


def passes_table(shown: Shown, part: dict[str, Any]) -> Table:
    """What single passes take, and what becomes cheaper where the small model keeps fewer visual tokens."""
    shown = Shown(shown.arguments, part["rounds"])
    rows = []
    for row in part["rows"]:
        if row["model"] == "large":
            what = "large model, " + ("one token" if row["tokens"] == 1 else f"{row['tokens']} tokens")
        else:
            what = f"small model, {row['retention_ratio']:.0%} of visual tokens kept"
        cells = [shown.spread(row["time_over_step"]), shown.ms(row["time"])]
        rows.append([f"{row['num_visual_tokens']:,}", what, *cells])
    caption = (
        "What a pass takes of the large model's pass of one token. The large model's prompt is pruned to "
        f"{part.get('average_retention', 1.0):.0%}. The small model's passes are those of a round of "
        f"{part['drafted']} tokens, with everything that drafting takes. "
    )
    if shown.rounds < FEWEST_FOR_MEDIAN:
        rows = []
    columns = ["visual tokens", "pass", "time / one token of the large model", shown.clock("ms")]
    return as_table(columns, rows, caption + shown.conditions())


def answers_table(shown: Shown, part: dict[str, Any]) -> Table:
    """Both models against the large one alone while the answer grows, by how drafts are made."""
    rows = []
    for series in part["series"]:
        if series["points"] and shown.rounds >= FEWEST_FOR_MEDIAN:
            points = [(point["value"], point["time_over_large"]) for point in series["points"]]
            measured = "; ".join(f"{value}: {shown.spread(ratio)}" for value, ratio in points)
            kind = _kind(series["drafts"], series["acceptance"])
            rows.append([kind, measured, verdict(points, shown.rounds)])
    caption = (
        "Time of small model, guidance, large model and all drafts, pruned to 35 %, over that of the large model "
        "alone, by the number of answer tokens. Drafts are right as in the table of rounds. "
    )
    if shown.rounds >= FEWEST_ROUNDS:
        caption += "Always and never hold for what was measured; where an interval contains 1, it is not clear. "
    return as_table(["drafts", "time / large alone", "faster"], rows, caption + _ONE_TILE + shown.conditions())


def _kind(drafts: str, acceptance: float | None) -> str:
    kind = {"none": "none", "once": "one", "rounds": "in rounds"}[drafts]
    return kind if acceptance is None else f"{kind}, {acceptance:.0%} right"
