"""Timing: median without outliers, interleaved, warmed up, in turns."""

import os

import pytest

from cgmq_fx.measure.timing import TimingPlan, one_core, summarize, time_all
from fake_runtime import FakeClock


def takes(clock, log, name, seconds):
    durations = iter(seconds)
    last = 0.0

    def call():
        nonlocal last
        last = next(durations, last)
        log.append(name)
        clock.now += last

    return call


def test_the_median_leaves_out_a_round_that_was_disturbed():
    timing = summarize([1.0, 1.01, 0.99, 1.0, 9.0])
    assert timing.seconds == 1.0
    assert timing.outliers == 1
    assert 0 < timing.spread < 0.02


def test_equal_rounds_have_no_spread():
    timing = summarize([2.0] * 4)
    assert (timing.seconds, timing.spread, timing.outliers) == (2.0, 0.0, 0)


def test_where_rounds_agree_on_nothing_all_of_them_count():
    timing = summarize([1.0, 1.0, 1.0, 1.0, 5.0, 7.0, 9.0])
    assert timing.outliers == 0
    assert timing.seconds == 1.0
    noisy = summarize([1.0, 2.0, 3.0, 4.0, 5.0])
    assert noisy.spread > 0.1


def test_callables_take_turns_in_both_directions():
    clock, log = FakeClock(), []
    callables = {name: takes(clock, log, name, [1.0]) for name in "ab"}
    found = time_all(callables, clock.plan(rounds=2))
    # One call to warm up and one to learn how many fill a round, for each; then the rounds.
    assert log == ["a", "a", "b", "b", "a", "b", "b", "a"]
    assert {name: timing.seconds for name, timing in found.items()} == {"a": 1.0, "b": 1.0}


def test_short_calls_are_repeated_until_they_fill_a_round():
    clock, log = FakeClock(), []
    plan = TimingPlan(rounds=3, round_seconds=1.0, warm_up=0, clock=clock)
    found = time_all({"a": takes(clock, log, "a", [0.1])}, plan)
    assert len(log) == 1 + 3 * 10
    assert found["a"].seconds == pytest.approx(0.1)


def test_the_process_stays_on_one_core_and_is_let_go():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no affinity of processes")
    before = os.sched_getaffinity(0)
    with one_core():
        assert os.sched_getaffinity(0) == {max(before)}
    assert os.sched_getaffinity(0) == before
