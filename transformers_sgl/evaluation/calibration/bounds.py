"""The statistics: how many failures a calibration may show for a promise to hold elsewhere."""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction

__all__ = ["allowed_failures", "check_fraction", "exact", "least_sizes", "percent"]


def allowed_failures(
    num_calibration: int, num_held_out: int, limit: float | Fraction, confidence: float = 0.99
) -> int | None:
    """The most failures `c` that the calibration part may show for the promise to hold elsewhere.

    The samples that count are taken as exchangeable. Whoever fails first as the threshold moves is the worst. The
    threshold is set so that the calibration part's `(c + 1)`-th worst sample does not fail, nor does any sample that
    is no worse. Each of these events must then have a probability of at most `1 - confidence`:

    1. *More than the fraction `limit` of all questions fails.* More than that fraction is then worse than the
       `(c + 1)`-th worst calibration sample. So at most `c` of the `n` calibration samples belong to the worst `limit`
       of all questions, to which each belongs with the probability `limit`, or more where there are ties:
       `BinomCDF(c; n, limit)`. This is the bound of Clopper and Pearson (1934). Only one threshold is tried, so there
       is nothing to correct for (Bates et al. 2021).
    2. *Among `m` fresh samples, here the held-out part, `t` or more fail*, where `t = floor(limit * m) + 1` is the
       least number that breaks the promise. Order all `n + m` samples from the worst on, ties at random. Those that
       fail are strictly worse than the `(c + 1)`-th calibration sample, so they stand before it, and at most `c` of
       the first `c + t` samples belong to the calibration part. How many do is hypergeometric, because every order is
       as likely as any other: `P(Hypergeom(n + m, c + t, n) <= c)`. Ties only make the event rarer, and samples that
       fail at no threshold stand last.

    Args:
        num_calibration (`int`): `n`, the calibration samples that count.
        num_held_out (`int`): `m`, the held-out samples that count.
        limit (`float` or `Fraction`): The greatest fraction of failures that keeps the promise, in `(0, 1)`.
        confidence (`float`, *optional*, defaults to 0.99): The probability of each of the two statements, in `(0, 1)`.

    Returns:
        `int`, *optional*: `c`; `None` if even a calibration part without any failure would prove too little.

    Example:
        ```python
        >>> from transformers_sgl.evaluation.calibration import allowed_failures

        >>> allowed_failures(1000, 1000, limit=0.05)
        29
        >>> allowed_failures(50, 50, limit=0.05) is None
        True

        ```
    """
    from scipy.stats import binom, hypergeom

    check_fraction("limit", limit)
    check_fraction("confidence", confidence)
    limit, risk = exact(limit), float(1 - exact(confidence))
    breaking = math.floor(limit * num_held_out) + 1

    def is_too_many(failures: int) -> bool:
        in_population = binom.cdf(failures, num_calibration, float(limit))
        in_fresh = hypergeom.cdf(failures, num_calibration + num_held_out, failures + breaking, num_calibration)
        return bool(max(in_population, in_fresh) > risk)

    # Both probabilities grow with the failures, so a binary search finds the first number that is too many.
    too_many = bisect_left(range(num_calibration), True, key=is_too_many)
    return too_many - 1 if too_many else None


def least_sizes(num_calibration: int, num_held_out: int, limit: Fraction, confidence: float) -> tuple[int, int]:
    """The next larger parts, in the same proportion, for which a calibration part without failures would do."""
    log_risk = math.log(1 - exact(confidence))

    def log_choose(total: int, chosen: int) -> float:
        return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)

    calibration = max(num_calibration + 1, math.ceil(log_risk / math.log(1 - limit)))
    while True:
        held_out = max(1, round(calibration * num_held_out / num_calibration))
        breaking = math.floor(limit * held_out) + 1
        if log_choose(held_out, breaking) - log_choose(calibration + held_out, breaking) <= log_risk:
            return calibration, held_out
        # A larger fresh set only makes it harder, until the promise allows one failure more there.
        next_held_out = math.ceil(breaking / limit)
        calibration = max(calibration + 1, math.floor((next_held_out - 0.5) * num_calibration / num_held_out))


def check_fraction(name: str, value: float | Fraction) -> None:
    """Raises unless a value is in `(0, 1)`."""
    if not 0 < value < 1:
        raise ValueError(f"`{name}` is {value!r}: pass a fraction above 0 and below 1.")


def exact(value: float | Fraction) -> Fraction:
    """The number as it was written: 1 - 0.9 is exactly a tenth, so one failure in ten is within the limit."""
    return Fraction(str(value))


def percent(fraction: float) -> str:
    """A fraction as it was written, in percent."""
    return f"{float(100 * exact(fraction)):.10g}%"
