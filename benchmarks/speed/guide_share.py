"""Which share of a training step the guide takes, at few and at many quantizers.

    python benchmarks/speed/guide_share.py --output benchmarks/results/guide_share.md

A chain of small residual blocks is trained for a few steps, with the guide's hooks timed apart. It
ends with 1 where their share is 2 % or more. A check, at which bit-widths are chosen anew, is timed
on its own: there are eleven of them in a run, however long it is.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from prepare_time import chain

import cgmq_fx
from cgmq_fx.directions import FisherDirection
from cgmq_fx.guide import Guide

LIMIT = 0.02
# Checks of larger models take minutes: each site's rounding error is computed at each bit-width.
_MOST_CHECKED = 1_000
_BATCH, _FEATURES, _NODES_PER_QUANTIZER = 32, 8, 3


@dataclass(frozen=True)
class Share:
    """What was measured at one size, in seconds of processor time.

    Attributes:
        quantizers: how many there are.
        step: a whole step.
        guide: what of it the guide's hooks take.
        check: one choice of all bit-widths; None where that was not measured.
    """

    quantizers: int
    step: float
    guide: float
    check: float | None


class _Clock:
    """Wraps functions and adds up the processor time that they take."""

    def __init__(self) -> None:
        self.taken = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.taken += time.process_time() - start

        return run


def measure(num_quantizers: int, steps: int) -> Share:
    """Return the medians over `steps` steps."""
    x = torch.randn(_BATCH, _FEATURES)
    model = chain(num_quantizers * _NODES_PER_QUANTIZER)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1e-3)  # so that thousands of blocks do not add up to infinity
    prepared = cgmq_fx.prepare(model, "4%", example_inputs=(x,))
    prepared(x)
    for quantizer in prepared.quantizers.values():
        if quantizer.spec.learned:
            quantizer.set_bit_width(4)
    optimizer, clock = torch.optim.SGD(prepared.parameters(), lr=1e-3), _Clock()
    with (
        mock.patch.object(Guide, "_before_step", clock.timed(Guide._before_step)),
        mock.patch.object(Guide, "_after_step", clock.timed(Guide._after_step)),
    ):
        cgmq_fx.attach(prepared, optimizer, total_steps=1_000_000)
        times, shares = [], []
        for _ in range(steps + 2):
            start, clock.taken = time.process_time(), 0.0
            optimizer.zero_grad()
            prepared(x).square().mean().backward()
            optimizer.step()
            times.append(time.process_time() - start)
            shares.append(clock.taken)
    check = None
    if num_quantizers <= _MOST_CHECKED:
        start = time.process_time()
        FisherDirection().update(prepared, 0.5)
        check = time.process_time() - start
    medians = (statistics.median(values[2:]) for values in (times, shares))
    return Share(len(prepared.quantizers), *medians, check)


def _told(check: float | None) -> str:
    return "not measured" if check is None else f"{1000 * check:.0f} ms"


def main() -> int:
    """Measure, print, write; return 1 where the share is too large."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quantizers", type=int, nargs="+", default=[10, 1_000, 10_000])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(number, arguments.steps) for number in arguments.quantizers]
    lines = [
        "# The guide's share of a training step",
        "",
        f"Processor time, one thread, medians of {arguments.steps} steps; a chain of residual "
        f"blocks of {_FEATURES} features, batch {_BATCH}. torch {torch.__version__}.",
        "",
        "| quantizers | step | the guide in it | share | a check |",
        "| --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {s.quantizers:,} | {1000 * s.step:.1f} ms | {1000 * s.guide:.3f} ms | "
        f"{100 * s.guide / s.step:.2f} % | {_told(s.check)} |"
        for s in found
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    return 1 if any(s.guide >= LIMIT * s.step for s in found) else 0


if __name__ == "__main__":
    sys.exit(main())
