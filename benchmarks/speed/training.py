"""A training step, the same for every model, and how long steps take beside each other."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], None]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of every contender."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def step_of(
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> Step:
    """Return one step of an ordinary training loop."""

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(images), labels).backward()
        optimizer.step()

    return step


@dataclass(frozen=True)
class Timing:
    """How a contender's steps went.

    Attributes:
        wall: seconds of a step in each round.
        cpu: seconds of processor time of a step in each round.
    """

    wall: list[float]
    cpu: list[float]


@dataclass(frozen=True)
class Ratio:
    """The ratios of one contender's steps to another's: quartiles over rounds."""

    low: float
    median: float
    high: float


def ratio(times: list[float], base: list[float]) -> Ratio:
    """Return the ratios, round by round."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(times, base, strict=True)], n=4, method="inclusive"
    )
    return Ratio(low, median, high)


def interleave(steps: Mapping[str, Step], rounds: int, seconds: float = 0.3) -> dict[str, Timing]:
    """Return the times of each contender's steps, which take turns in every round.

    Args:
        steps: the contenders.
        rounds: how many turns each one has.
        seconds: what a turn takes at least; short steps are repeated.
    """
    repeats = {name: _repeats(step, seconds) for name, step in steps.items()}
    timings = {name: Timing([], []) for name in steps}
    order = list(steps)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                _turn(steps[name], repeats[name], timings[name])
            order.reverse()  # whoever goes last finds the cache of another neighbour
            gc.collect()
    finally:
        gc.enable()
    return timings


def _turn(step: Step, repeats: int, timing: Timing) -> None:
    step()  # untimed: finds memory and caches as its neighbour left them, which no training does
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    timing.wall.append((time.perf_counter() - wall) / repeats)
    timing.cpu.append((time.process_time() - cpu) / repeats)


def _repeats(step: Step, seconds: float) -> int:
    for _ in range(2):  # compiles, calibrates, fills caches
        step()
    start = time.perf_counter()
    step()
    return max(1, round(seconds / (time.perf_counter() - start)))
