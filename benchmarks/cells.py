"""How figures become cells: with an interval, without one, or not at all, as the rounds behind them allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.verdicts import FEWEST_ROUNDS

__all__ = ["FEWEST_FOR_MEDIAN", "Shown", "Table", "as_table"]

# A median of fewer rounds is no median.
FEWEST_FOR_MEDIAN = 3
Table = dict[str, Any]


def as_table(columns: Sequence[str | None], rows: Sequence[Sequence[Any]], caption: str) -> Table:
    """A table without the columns that have no name, or nothing in any row."""
    shown = [
        index for index, column in enumerate(columns) if column is not None and any(row[index] != "" for row in rows)
    ]
    return {
        "columns": [columns[index] for index in shown],
        "rows": [[row[index] for index in shown] for row in rows],
        "caption": caption,
    }


@dataclass(frozen=True)
class Shown:
    """How figures are shown that rest on so many rounds.

    Attributes:
        arguments: The run's.
        rounds: How many rounds the figures rest on.
    """

    arguments: dict[str, Any]
    rounds: int

    def spread(self, found: dict[str, float], form: str = ".2f") -> str:
        """A median with its interval, as far as the rounds carry them."""
        return self._cell([format(found[name], form) for name in ("median", "min", "max")])

    def ms(self, timing: dict[str, float]) -> str:
        """Milliseconds of a timing."""
        return self._cell([f"{timing[name]:.1f}" for name in ("median_ms", "min_ms", "max_ms")])

    def _cell(self, words: Sequence[str]) -> str:
        if self.rounds < FEWEST_FOR_MEDIAN:
            return ""
        median, least, greatest = words
        return f"{median} [{least}, {greatest}]" if self.rounds >= FEWEST_ROUNDS else median

    @property
    def of_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return str(self.arguments["device"]).startswith("cuda")

    def clock(self, name: str) -> str | None:
        """The name of a column of times, which only a GPU has."""
        return name if self.of_gpu else None

    def conditions(self) -> str:
        """What was measured and how often, as a sentence."""
        arguments = self.arguments
        shrunk = f", widths divided by {arguments['shrink']}" if arguments["shrink"] > 1 else ""
        shrunk += f", layers by {arguments['shrink_depth']}" if arguments["shrink_depth"] > 1 else ""
        models = f"Shapes of {arguments['large']} and {arguments['small']}{shrunk}, random weights in"
        turns = ", in which all ways take turns" if self.rounds >= FEWEST_FOR_MEDIAN else ""
        return f"{models} {arguments['dtype']}; {self.how_often()}{turns}."

    def how_often(self) -> str:
        """What a figure is."""
        if self.rounds < FEWEST_FOR_MEDIAN:
            return f"no times, which would rest on {self.rounds} round{'s' if self.rounds > 1 else ''}"
        if self.rounds < FEWEST_ROUNDS:
            return f"median of {self.rounds} rounds, too few for an interval"
        return f"median [least, greatest] of {self.rounds} rounds"
