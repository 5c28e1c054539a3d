"""Whatever is asked, an answer is the stock model's, and that of the sample alone."""

from __future__ import annotations

import json
from pathlib import Path

import identity
import pytest

_LAST_LONG_RUN = Path(__file__).parents[1] / "benchmarks" / "results" / "identity.json"


@pytest.mark.mechanics
@pytest.mark.parametrize("promise", range(len(identity.PROMISES)), ids=identity.PROMISES)
def test_random_calls(promise: int) -> None:
    """One call of every architecture; `scripts/check_identity.py` makes ten thousand."""
    every = len(identity.PROMISES)
    for number in range(promise, every * len(identity.supported_names()), every):
        case = identity.draw(number)
        assert identity.failure_of(case) in (None, identity.TIE), f"case {number}: {case}"


def test_the_last_long_run_of_drafts_in_rounds_found_nothing_wrong() -> None:
    record = json.loads(_LAST_LONG_RUN.with_name("identity_rounds.json").read_text(encoding="utf-8"))
    ((promise, equal, ties, wrong),) = record["tables"]["identity-rounds"]["rows"]
    assert "rounds" in promise
    assert equal + ties == record["cases"] >= 1000
    assert wrong == 0
    assert record["wrong"] == []
    assert ties < 0.01 * record["cases"]


def test_the_last_long_run_found_nothing_wrong() -> None:
    record = json.loads(_LAST_LONG_RUN.read_text(encoding="utf-8"))
    assert record["cases"] >= 10_000
    assert record["wrong"] == []
    equal, ties, wrong = (sum(row[column] for row in record["tables"]["identity"]["rows"]) for column in (1, 2, 3))
    assert equal + ties == record["cases"]
    assert wrong == 0
    assert ties < 0.002 * record["cases"]
