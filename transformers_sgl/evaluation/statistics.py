"""Statistics of scores: intervals, tests and comparisons at equal cost.

Questions about one image are not independent, so images are resampled. One set of draws serves all runs: a question
that is hard is hard for all, which is what makes the comparison paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Difference", "PairedScores", "at_equal_cost"]

Array = npt.NDArray[np.float64]
_RESAMPLES = 10_000
_CHUNK = 500


@dataclass(frozen=True)
class Difference:
    """A difference of mean scores over the same questions."""

    mean: float  # the difference
    low: float  # the lower end of its 95 % paired-bootstrap interval
    high: float  # the upper end
    # The probability of a difference this large if the two are exchangeable; two-sided paired randomisation test.
    p_value: float


class PairedScores:
    """Scores of several runs on the same questions, resampled together; `images` names each question's image."""

    def __init__(self, images: Sequence[str] | npt.NDArray[np.str_], seed: int = 0) -> None:
        self._names, self._seed = np.asarray(images), seed
        names, self._image = np.unique(np.asarray(images), return_inverse=True)
        self._sizes = np.bincount(self._image).astype(float)  # (images,)
        rng = np.random.default_rng(seed)
        number, chunks = len(names), range(_RESAMPLES // _CHUNK)
        equal = np.full(number, 1 / number)
        # Of shape (resamples, images), in chunks: how often each image is drawn, and whether its answers are swapped.
        # More than 255 times is beyond all chance once there are more than a few images.
        self._draws = [rng.multinomial(number, equal, _CHUNK).clip(max=255).astype(np.uint8) for _ in chunks]
        self._swaps = [rng.integers(0, 2, (_CHUNK, number), dtype=np.uint8) for _ in chunks]

    def among(self, chosen: npt.NDArray[np.bool_]) -> PairedScores:
        """The same for the `chosen` questions alone, of shape `(questions,)`; their images are resampled."""
        return PairedScores(self._names[chosen], self._seed)

    def interval(self, scores: Array) -> tuple[float, float]:
        """The 95 % bootstrap interval of a mean."""
        both = np.stack([self._sums(scores), self._sizes], axis=1)
        drawn = np.concatenate([draws @ both for draws in self._draws])
        means = drawn[:, 0] / drawn[:, 1]
        low, high = np.percentile(means, [2.5, 97.5])
        return float(low), float(high)

    def difference(self, scores: Array, others: Array) -> Difference:
        """How much better one run is than another."""
        differences = scores - others
        sums = self._sums(differences)
        swapped = np.abs(np.concatenate([sums.sum() - 2 * (swaps @ sums) for swaps in self._swaps]))
        # A tolerance: the same sum in another order of its terms is not a smaller one.
        as_large = int((swapped >= abs(sums.sum()) - 1e-6 * max(1.0, np.abs(sums).sum())).sum())
        low, high = self.interval(differences)
        return Difference(float(differences.mean()), low, high, (1 + as_large) / (1 + _RESAMPLES))

    def _sums(self, scores: Array) -> Array:
        return np.asarray(np.bincount(self._image, weights=scores), dtype=np.float64)


def at_equal_cost(cost: float, points: Sequence[tuple[float, Array]]) -> Array | None:
    """What a method would score at a given cost, interpolated between its two nearest settings.

    `points` holds cost and scores of shape `(questions,)` of each setting. Beyond the most expensive setting its
    scores are taken; below the cheapest there are none.
    """
    # Of two at the same cost the better comes last.
    points = sorted(points, key=lambda point: (point[0], point[1].mean()))
    costs = np.array([each for each, _ in points])
    if cost < costs[0]:
        return None
    if cost >= costs[-1]:
        return points[-1][1]
    above = int(np.searchsorted(costs, cost, side="right"))
    share = (cost - costs[above - 1]) / (costs[above] - costs[above - 1])
    return (1 - share) * points[above - 1][1] + share * points[above][1]
