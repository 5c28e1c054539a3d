"""How many tokens the small model drafts next: as many as pay, by what its drafts were worth and what they cost."""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["DraftLength"]

MOST = 16  # tokens of a round: behind so many, one more is hardly ever worth its step
_LEAST_GAIN = 1.05  # below this, what is not measured eats up what is gained
_CLEAR_GAIN = 2.0  # from here on, rounds pay however much longer than a step their passes take
_FORGETTING = 0.9  # of what earlier rounds have shown, for each later one
_FIRST_PAUSE = 16  # tokens
_PROBE = 1  # token, to find out whether drafting pays again
_UNMEASURED = 3  # tokens of a round at most, until both models were timed


class DraftLength:
    """Chooses the length of each round of drafting, for the most tokens in a time.

    With a probability `a` that a drafted token is right, a round of `n` gives `(1 - a ** (n + 1)) / (1 - a)` tokens
    and takes one pass of the large model and `n` of the small one. Where even the best `n` gains nothing over steps
    without drafts, drafting pauses; after each pause, twice as long as the one before, one short round finds out
    whether it pays again. Reading drafts along may take the large model longer than a step without: where that could
    matter, one such step is timed.

    Args:
        fixed (`int`, *optional*): As many tokens in every round, whatever they are worth.
        cost (`float`, defaults to 0.1): What a pass of the small model takes of one of the large one, until both are
            measured.
    """

    def __init__(self, fixed: int | None = None, cost: float = 0.1) -> None:
        self._fixed = fixed
        self._cost = cost
        self._right = self._wrong = 0.0
        self._small_s: deque[float] = deque(maxlen=5)
        self._large_s: deque[float] = deque(maxlen=5)
        self._step_s: deque[float] = deque(maxlen=5)
        self._wants_step = fixed is None
        self._pause, self._resumes_at, self._is_paused = _FIRST_PAUSE, 0, False

    @property
    def acceptance(self) -> float:
        """The probability that a drafted token is right, as far as it is known."""
        return (self._right + 1) / (self._right + self._wrong + 1.5)

    @property
    def cost(self) -> float:
        """What a pass of the small model takes of one of the large model."""
        if not self._small_s or not self._large_s:
            return self._cost
        return median(self._small_s) / max(median(self._large_s), 1e-9)

    @property
    def width(self) -> float:
        """What a pass of the large model that reads drafts takes of one that reads a single token."""
        if not self._step_s or not self._large_s:
            return 1.0
        return max(1.0, median(self._large_s) / max(median(self._step_s), 1e-9))

    def note(self, right: int, wrong: int) -> None:
        """Notes drafted tokens that were right, and those at which answers left their drafts."""
        self._right += right
        self._wrong += wrong

    def time_small(self, seconds: float, num_passes: int) -> None:
        """Notes how long the small model has drafted."""
        self._small_s.append(seconds / max(num_passes, 1))

    def time_large(self, seconds: float) -> None:
        """Notes how long a pass of the large model took that has read a draft."""
        self._large_s.append(seconds)

    def time_step(self, seconds: float) -> None:
        """Notes how long a step of the large model took without a draft."""
        self._step_s.append(seconds)

    def next_length(self, num_written: int) -> int:
        """How many tokens to draft behind so many; 0 while drafting does not pay."""
        if self._fixed is not None:
            return self._fixed
        if num_written < self._resumes_at:
            return 0
        best = max(range(MOST + 1), key=self._gain)
        if self._wants_step and self._large_s and best and self._gain(best) < _CLEAR_GAIN:
            self._wants_step = False
            return 0
        self._right, self._wrong = self._right * _FORGETTING, self._wrong * _FORGETTING
        if best and self._gain(best) >= _LEAST_GAIN:
            self._pause, self._is_paused = _FIRST_PAUSE, False
            return best if self._large_s else min(best, _UNMEASURED)
        if self._is_paused:
            self._is_paused = False
            return _PROBE
        self._is_paused, self._resumes_at = True, num_written + self._pause
        self._pause *= 2
        return 0

    def _gain(self, length: int) -> float:
        """How many times faster rounds of this length are than none."""
        if length == 0:
            return 1.0
        right = min(self.acceptance, 0.999)
        return (1 - right ** (length + 1)) / (1 - right) / (1 + length * self.cost) / self.width
