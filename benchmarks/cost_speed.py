"""How long the cost of a network of 10,000 operations takes, priced once and after every change.

The network is a chain: each operation reads what the one before it made, so that neighbours share
a site, and every fourth weight is tied to the one before. Run it with

    python benchmarks/cost_speed.py --output benchmarks/results/cost_speed.md

It ends with 1 where a re-evaluation of the total takes `LIMIT_MS` or more, differs from the sum
over the operations, or touches an accelerator.
"""

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cgmq_fx.cost.load import get_table
from cgmq_fx.cost.operation import BitSource, BoundOperation, Operation
from cgmq_fx.cost.peak_memory import PEAK_ACTIVATION_MEMORY, Buffer, PeakMemory
from cgmq_fx.cost.totals import SumResource, price

WIDTHS = (2, 4, 8, 16, 32)
LIMIT_MS = 1.0


@dataclass(frozen=True)
class Speed:
    """Medians of what was measured, in milliseconds.

    Attributes:
        name: of the cost table.
        price: pricing all operations, once.
        change: writing one width and computing the total.
        tensor: computing the total from a tensor of widths that is there already.
        delta: what one site's change would add, without doing it.
    """

    name: str
    price: float
    change: float
    tensor: float
    delta: float


def chain(num_operations: int) -> tuple[list[BoundOperation], int]:
    """Return the operations and the number of sites: activations first, then weights."""
    found, weight = [], num_operations
    for place in range(num_operations):
        if place % 4 or not place:
            weight += 1
        macs = 1000 + 37 * (place % 101)
        operation = Operation(
            f"layer{place}",
            "linear",
            "torch.nn.functional.linear",
            "weight",
            macs,
            output_elements=100,
            input_elements=100,
            weights=macs,
            attributes={"in_features": 10, "out_features": 10, "bias": False},
        )
        found.append(BoundOperation(operation, (BitSource(site=weight - 1), BitSource(site=place))))
    return found, weight


def resource_of(name: str, num_operations: int) -> SumResource | PeakMemory:
    """Return the chain's cost by a table, or the peak of its activations."""
    operations, num_sites = chain(num_operations)
    if name != PEAK_ACTIVATION_MEMORY:
        return price(operations, get_table(name), num_sites, WIDTHS)
    buffers = [
        Buffer(f"layer{place}", 100 + 37 * (place % 101), place, place + 1 + place % 3, place)
        for place in range(num_operations)
    ]
    return PeakMemory(buffers, num_sites, WIDTHS)


def measure(name: str, num_operations: int, repeats: int) -> tuple[Speed, SumResource | PeakMemory]:
    """Return the medians for one table, and the priced network."""
    start = time.perf_counter()
    resource = resource_of(name, num_operations)
    num_sites = resource.num_sites
    pricing = 1000 * (time.perf_counter() - start)
    rng = random.Random(0)
    choices = [[WIDTHS.index(bits) for bits in resource.supported[s]] for s in range(num_sites)]
    index = torch.tensor([max(choice) for choice in choices])
    listed = index.tolist()

    def change() -> None:
        site = rng.randrange(num_sites)
        index[site] = rng.choice(choices[site])
        resource.total(index)

    def delta() -> None:
        site = rng.randrange(num_sites)
        resource.delta(site, rng.choice(choices[site]), listed)

    medians = [_median(call, repeats) for call in (change, lambda: resource.total(index), delta)]
    if resource.total(index) != sum(resource.costs(index.tolist())):
        raise SystemExit(f"{name}: the total is not the sum of the operations")
    return Speed(name, pricing, *medians), resource


def _median(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


class _DeviceWatch(TorchDispatchMode):
    """Notes every tensor that is not in main memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, result):
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                self.found.append(f"{func} on {value.device}")
        return result


@contextmanager
def no_device() -> Iterator[list[str]]:
    """Note every use of an accelerator, its initialisation and its synchronisation included."""
    found: list[str] = []

    def forbidden(*args: object, **kwargs: object) -> None:
        found.append("an accelerator was initialised or waited for")

    names = ("torch.cuda._lazy_init", "torch.cuda.synchronize")
    with _DeviceWatch() as watch, mock.patch(names[0], forbidden), mock.patch(names[1], forbidden):
        yield found
    found += watch.found


def device_uses(resource: SumResource | PeakMemory) -> list[str]:
    """Return what a change and a re-evaluation do on an accelerator: nothing, if all is well."""
    index = torch.tensor([WIDTHS.index(max(bits)) for bits in resource.supported])
    with no_device() as found:
        index[0] = WIDTHS.index(min(resource.supported[0]))
        resource.total(index)
        resource.delta(1, WIDTHS.index(min(resource.supported[1])), index.tolist())
    return found


def table_of(speeds: list[Speed], num_operations: int, repeats: int) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Cost of a network after a change of bit-widths",
        "",
        f"A chain of {num_operations:,} operations with shared sites; medians of {repeats} calls "
        f"on one core, in milliseconds. Python {platform.python_version()}, torch "
        f"{torch.__version__}, {platform.machine()}. The bit-widths are a tensor in main memory; "
        "no accelerator is used or waited for.",
        "",
        "| table | pricing, once | change a width, then `total()` | `total()` alone | `delta()` |",
        "| --- | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {s.name} | {s.price:.0f} | {s.change:.3f} | {s.tensor:.3f} | {s.delta:.4f} |"
        for s in speeds
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, write; return 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--tables", nargs="+", default=["bops", "mpic", PEAK_ACTIVATION_MEMORY])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    speeds, faults = [], []
    for name in arguments.tables:
        speed, resource = measure(name, arguments.operations, arguments.repeats)
        speeds.append(speed)
        faults += [f"{name}: {use}" for use in device_uses(resource)]
        if speed.change >= LIMIT_MS:
            faults.append(f"{name}: {speed.change:.3f} ms, not below {LIMIT_MS} ms")
    text = table_of(speeds, arguments.operations, arguments.repeats)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
