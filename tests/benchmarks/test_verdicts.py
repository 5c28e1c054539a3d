"""What may be said of measured intervals."""

from __future__ import annotations

import pytest

from benchmarks.verdicts import FEWEST_ROUNDS, verdict

FASTER = {"median": 0.8, "min": 0.7, "max": 0.9}
SLOWER = {"median": 1.2, "min": 1.1, "max": 1.3}
UNCLEAR = {"median": 0.9, "min": 0.8, "max": 1.1}
TOUCHING = {"median": 0.9, "min": 0.8, "max": 1.0}


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ([FASTER, FASTER, FASTER], "always"),
        ([SLOWER, SLOWER, SLOWER], "never"),
        ([UNCLEAR, UNCLEAR, UNCLEAR], "not clear"),
        ([FASTER, FASTER, TOUCHING], "up to 20"),  # 1.0 is no faster
        ([SLOWER, FASTER, FASTER], "above 15"),
        ([SLOWER, UNCLEAR, FASTER], "from 40 on"),
        ([UNCLEAR, FASTER, FASTER], "from 20 on"),
        ([FASTER, FASTER, SLOWER], "below 30"),
        ([FASTER, UNCLEAR, SLOWER], "up to 10"),
        ([SLOWER, SLOWER, UNCLEAR], "not clear"),  # and not never
        ([FASTER, SLOWER, FASTER], "not clear"),
        ([SLOWER, FASTER, SLOWER], "not clear"),
        ([FASTER, UNCLEAR, FASTER], "not clear"),
    ],
)
def test_by_hand(intervals, said):
    points = list(zip([10, 20, 40], intervals, strict=True))
    assert verdict(points, FEWEST_ROUNDS) == said
    assert verdict(points, FEWEST_ROUNDS - 1) == ""


def test_a_crossing_is_on_the_line_between_the_medians():
    near = {"median": 1.1, "min": 1.05, "max": 1.2}
    assert verdict([(256, near), (768, FASTER)], 5, "{:,.1f}".format) == "above 426.7"


def test_without_points_nothing_is_said():
    assert verdict([], 5) == ""
