"""The pair with a retention that follows the decision score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers_sgl.evaluation.methods.base import Answer, Batch, Pair, Setting
from transformers_sgl.evaluation.methods.guided import SGL
from transformers_sgl.tokens.early_exit import NEVER_EXIT

__all__ = ["Unsure"]


@dataclass(frozen=True)
class Unsure(SGL):
    """Guided pruning that keeps twice the ratio where the small model is unsure, and half of it elsewhere.

    Nothing exits early. The thresholds, chosen on other questions, make so many samples unsure that the average
    retention is that of the setting.
    """

    def answer(self, pair: Pair, batch: Batch, setting: Setting) -> list[Answer]:
        if setting.average_retention not in self.thresholds:
            raise ValueError(f"No threshold was chosen for {setting.average_retention}: pass `thresholds`.")
        return self._generate(pair, batch, setting, NEVER_EXIT)

    def pruning(self, setting: Setting) -> dict[str, Any]:
        usual, (half, twice) = super().pruning(setting), self._ratios(setting)
        threshold = self.thresholds.get(setting.average_retention)
        unsure = {"unsure_threshold": threshold, "unsure_retention_ratio": twice}
        return {**usual, "retention_ratio": half, **unsure}

    def unsure_share(self, setting: Setting) -> float:
        """The fraction of samples that has to be unsure for the setting's average retention."""
        half, twice = self._ratios(setting)
        return half / (twice - half)

    def _ratios(self, setting: Setting) -> tuple[float, float]:
        """What is kept of samples that the small model is sure of, and of the others."""
        ratio = super().pruning(setting)["retention_ratio"]
        return ratio / 2, min(1.0, 2 * ratio)
