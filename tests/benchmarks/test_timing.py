from __future__ import annotations

import gc

import pytest

from benchmarks.timing import Timing, ratio, spread, take_turns


def test_contenders_take_turns_and_warm_up_does_not_count():
    calls = []
    timings = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert [len(timing.samples) for timing in timings.values()] == [3, 3]
    assert all(sample >= 0 for timing in timings.values() for sample in timing.samples)


def test_no_garbage_is_collected_meanwhile_and_everything_is_as_it_was():
    seen = []
    take_turns({"a": lambda: seen.append(gc.isenabled())}, rounds=1)
    assert seen == [False, False]
    assert gc.isenabled()

    with pytest.raises(ZeroDivisionError):
        take_turns({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()

    gc.disable()
    try:
        take_turns({"a": lambda: None}, rounds=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_ratio_is_that_of_each_round():
    slow, fast = Timing((10.0, 100.0, 30.0)), Timing((1.0, 50.0, 10.0))
    # 10, 2 and 3; the ratio of the medians would be 3, too, but not that of these:
    assert ratio(slow, fast) == {"median": 3.0, "min": 2.0, "max": 10.0}
    assert ratio(Timing((1.0, 2.0, 9.0)), Timing((1.0, 4.0, 3.0)))["median"] == 1.0  # and not 2 / 3
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratio(slow, Timing((1.0,)))


def test_a_timing_as_json():
    timing = Timing((3.0, 1.0, 2.0))
    assert timing.to_dict() == {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "samples_ms": [3.0, 1.0, 2.0]}
    assert spread((4.0, 1.0)) == {"median": 2.5, "min": 1.0, "max": 4.0}


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="`rounds` is 0: pass a whole number of 1 or more"):
        take_turns({}, rounds=0)
