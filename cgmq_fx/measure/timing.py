"""Times callables against each other: one core, warmed up, interleaved, outliers left out."""

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

#: Rounds farther from the median than this many median absolute deviations are left out.
OUTLIER_DEVIATIONS = 5.0
#: Where more rounds than this share are that far, they are no exceptions, and all of them count.
MAX_OUTLIERS = 0.25
#: What a median absolute deviation of normal noise is multiplied by to be its standard deviation.
_NORMAL = 1.4826

Clock = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class TimingPlan:
    """How long and how often is measured.

    Attributes:
        rounds: how often each callable has its turn.
        round_seconds: how long one turn lasts at least.
        warm_up: calls before the first round.
        clock: seconds since some moment. By default processor time of this process, which other
            processes do not lengthen; on an idle machine one thread's is the wall clock's.
    """

    rounds: int = 15
    round_seconds: float = 0.004
    warm_up: int = 3
    clock: Clock = time.process_time


@dataclass(frozen=True)
class Timing:
    """What was measured of one callable.

    Attributes:
        seconds: the median of one call over the rounds that count.
        spread: standard error of that median, as a share of it.
        outliers: rounds that were left out.
        rounds: seconds of one call, round by round; rounds of equal index are neighbours in time.
    """

    seconds: float
    spread: float
    outliers: int
    rounds: tuple[float, ...]


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on one core while the block runs, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def time_all(callables: Mapping[Key, Callable[[], object]], plan: TimingPlan) -> dict[Key, Timing]:
    """Return the timing of each callable; in each round all of them have a turn."""
    calls = {name: _calls_in_round(call, plan) for name, call in callables.items()}
    rounds: dict[Key, list[float]] = {name: [] for name in callables}
    for turn in range(plan.rounds):
        names = list(callables)
        for name in names if turn % 2 == 0 else reversed(names):
            rounds[name].append(_seconds(callables[name], calls[name], plan.clock))
    return {name: summarize(taken) for name, taken in rounds.items()}


def summarize(rounds: Sequence[float]) -> Timing:
    """Return the median of `rounds` without outliers, and how sure it is."""
    center = statistics.median(rounds)
    deviation = statistics.median(abs(taken - center) for taken in rounds)
    # Clocks tick: where most rounds agree to the tick, a round one percent off is no outlier.
    far = OUTLIER_DEVIATIONS * max(deviation, 0.01 * abs(center))
    kept = [taken for taken in rounds if abs(taken - center) <= far]
    if len(kept) < (1 - MAX_OUTLIERS) * len(rounds):
        kept = list(rounds)
    median = statistics.median(kept)
    noise = _NORMAL * statistics.median(abs(taken - median) for taken in kept)
    spread = noise / len(kept) ** 0.5 / median if median > 0 else 0.0
    return Timing(median, spread, len(rounds) - len(kept), tuple(rounds))


def _calls_in_round(call: Callable[[], object], plan: TimingPlan) -> int:
    """Warm up, and return how many calls fill a round."""
    for _ in range(plan.warm_up):
        call()
    once = _seconds(call, 1, plan.clock)
    return max(1, round(plan.round_seconds / once)) if once > 0 else 1


def _seconds(call: Callable[[], object], calls: int, clock: Clock) -> float:
    begin = clock()
    for _ in range(calls):
        call()
    return (clock() - begin) / calls
