"""Makes a cost table of a runtime on this machine: times the operations of models in context."""

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.cost.operation import Operation
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import UsageError
from cgmq_fx.measure.context import (
    Factors,
    NetworkCheck,
    fit_factors,
    scaled,
    sums_by_class,
    trust,
)
from cgmq_fx.measure.fixing import fixed_at
from cgmq_fx.measure.operations import DistinctOperation, distinct_operations
from cgmq_fx.measure.probes import Probes, operation_probes, reader_probes
from cgmq_fx.measure.rows import Measured, Pair, rows_of
from cgmq_fx.measure.runtimes import Exported, Runtime
from cgmq_fx.measure.timing import Timing, TimingPlan, one_core, time_all

#: Copies of an operation in the smaller of two probes; the larger has twice as many.
COPIES = 2
#: Of operations with fewer MACs and weights there are more copies, so that they weigh in the whole.
_SMALL_MACS, _SMALL_WEIGHTS, _MORE = 2_000_000, 20_000, 2
_MS = 1000.0
#: Operations whose probes are exported together.
_TOGETHER = 12
#: Factors nearer to 1 than this are not named in the table's source.
_TOLD = 0.05

Model = tuple[nn.Module, tuple[torch.Tensor, ...]]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        table: the cost table, in ms.
        operations: how many different ones were timed.
        networks: whole networks beside the sums of their operations.
        factors: what operations were multiplied with so that the sums meet the networks.
        outliers: rounds that were left out, of all.
        unmeasured: operations with MACs that no row prices.
    """

    table: CostTable
    operations: int
    networks: tuple[NetworkCheck, ...]
    factors: Factors
    outliers: tuple[int, int]
    unmeasured: tuple[Operation, ...]


def measure_table(
    models: Sequence[Model],
    runtime: Runtime,
    *,
    name: str = "measured",
    plan: TimingPlan | None = None,
    log: Log = lambda text: None,
) -> Measurement:
    """Time every distinct operation of `models` in `runtime`, and make a cost table of it.

    Each operation is timed between neighbours, at every pair of bit-widths that the runtime has,
    as the difference between a network with twice as many copies and one with as many. The sums
    are then compared with the whole networks: what they are off in common is a factor on every
    row, what is left is the least error of every row.

    Args:
        models: float models, with inputs of one sample.
        runtime: what runs them.
        name: of the table.
        plan: how long and how often is measured.
        log: is told what goes on.

    Raises:
        CgmqError: a model cannot be prepared or exported, or times differ too much.
        UsageError: an input has more than one sample, or no operation can be timed.
    """
    _check_samples(models)
    distinct, others = distinct_operations(models)
    if not distinct:
        raise UsageError("the models have no operation that can be timed; give others")
    torch.set_num_threads(1)
    bench = _Bench(runtime, plan or TimingPlan(), log)
    measured = bench.operations(distinct)
    whole = bench.networks(models)
    draft = replace(_table(name, measured, 0.0), unpriced="zero")
    checks = _checks(models, whole, draft)
    factors = fit_factors(checks)
    left = trust(checks, factors)
    source = _source(runtime, len(distinct), factors, left)
    table = _table(name, scaled(measured, factors), left, source)
    return Measurement(
        table,
        len(distinct),
        tuple(checks),
        factors,
        (bench.outliers, bench.rounds),
        tuple(item for item in others if table.row_for(item) is None),
    )


def _table(name: str, measured: Sequence[Measured], least: float, source: str = "") -> CostTable:
    with warnings.catch_warnings():
        # Where 8 bits take longer than 32, they do.
        warnings.simplefilter("ignore", CostTableWarning)
        return CostTable(name=name, unit="ms", rows=tuple(rows_of(measured, least)), source=source)


def _check_samples(models: Sequence[Model]) -> None:
    for model, inputs in models:
        shapes = [tuple(tensor.shape) for tensor in inputs]
        if any(not shape or shape[0] != 1 for shape in shapes):
            raise UsageError(
                f"inputs of {type(model).__name__} have shapes {shapes}; costs are for one sample: "
                "give shapes whose first axis is 1"
            )


class _Bench:
    """Times probes and networks, and counts the rounds."""

    def __init__(self, runtime: Runtime, plan: TimingPlan, log: Log) -> None:
        self.runtime = runtime
        self.plan = plan
        self.log = log
        self.outliers = self.rounds = 0
        self.readers: dict[Pair, float] = {}

    def operations(self, distinct: Sequence[DistinctOperation]) -> list[Measured]:
        """Time each operation at every pair of bit-widths."""
        self._time_readers()
        found: list[Measured] = []
        for first in range(0, len(distinct), _TOGETHER):
            chunk = distinct[first : first + _TOGETHER]
            copies = [_copies(item.operation) for item in chunk]
            probes = operation_probes(chunk, [2 * count for count in copies])
            exported = self._exported(probes.model, probes.inputs)
            for index, (item, count) in enumerate(zip(chunk, copies, strict=True)):
                here = self._operation(index, item, count, exported, probes)
                found += here
                costs = ", ".join(f"w{m.pair[0]} a{m.pair[1]} {m.cost:.4g} ms" for m in here)
                place = f"{first + index + 1}/{len(distinct)}"
                self.log(f"[{place}] {item.operation.name}: {costs}")
        return found

    def _time_readers(self) -> None:
        probes = reader_probes(12)
        places = probes.outputs["readers"]
        exported = self._exported(probes.model, probes.inputs)
        timings = self._time(
            {
                (pair, size): made.part(places[:size])
                for pair, made in exported.items()
                for size in (4, 12)
            }
        )
        for pair in self.runtime.pairs:
            slope, _ = _difference(timings[pair, 4], timings[pair, 12], 8)
            self.readers[pair] = max(0.0, slope / 2)

    def _operation(
        self,
        index: int,
        item: DistinctOperation,
        copies: int,
        exported: Mapping[Pair, Exported],
        probes: Probes,
    ) -> list[Measured]:
        timings = self._time(
            {
                (pair, kind, size): made.part(probes.outputs[index, kind][:size])
                for pair, made in exported.items()
                for kind in ("with", "without")
                if (index, kind) in probes.outputs
                for size in (copies, 2 * copies)
            }
        )
        return [self._measured(item, pair, copies, timings) for pair in self.runtime.pairs]

    def _measured(
        self,
        item: DistinctOperation,
        pair: Pair,
        copies: int,
        timings: Mapping[tuple[Any, ...], Timing],
    ) -> Measured:
        few, many = timings[pair, "with", copies], timings[pair, "with", 2 * copies]
        cost, noise = _difference(few, many, copies)
        if (pair, "without", copies) in timings:
            few, many = timings[pair, "without", copies], timings[pair, "without", 2 * copies]
            without, more = _difference(few, many, copies)
            cost -= without
            noise = (noise**2 + more**2) ** 0.5
        else:
            cost -= self.readers[pair]
        cost = max(0.0, cost)
        return Measured(item.operation, pair, cost * _MS, noise / cost if cost else 0.0)

    def networks(self, models: Sequence[Model]) -> dict[tuple[int, Pair], float]:
        """Time whole networks; by index and pair, in ms."""
        found: dict[tuple[int, Pair], float] = {}
        for index, (model, inputs) in enumerate(models):
            exported = self._exported(model, inputs)
            timings = self._time({(pair,): made.whole() for pair, made in exported.items()})
            for (pair,), timing in timings.items():
                found[index, pair] = timing.seconds * _MS
            self.log(f"{type(model).__name__} as a whole")
        return found

    def _exported(self, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[Pair, Exported]:
        return {
            pair: self.runtime.export(fixed_at(model, inputs, *pair), inputs)
            for pair in self.runtime.pairs
        }

    def _time(
        self, callables: Mapping[tuple[Any, ...], Callable[[], object]]
    ) -> dict[tuple[Any, ...], Timing]:
        with one_core():
            timings = time_all(callables, self.plan)
        self.outliers += sum(timing.outliers for timing in timings.values())
        self.rounds += sum(len(timing.rounds) for timing in timings.values())
        return timings


def _copies(operation: Operation) -> int:
    """Return how many copies a probe has: few of large weights, which share the caches."""
    is_small = operation.macs < _SMALL_MACS and operation.weights < _SMALL_WEIGHTS
    return COPIES * (_MORE if is_small else 1)


def _difference(few: Timing, many: Timing, copies: int) -> tuple[float, float]:
    """Return what one copy takes and its standard error, both in seconds."""
    noise = ((few.spread * few.seconds) ** 2 + (many.spread * many.seconds) ** 2) ** 0.5
    return (many.seconds - few.seconds) / copies, noise / copies


def _checks(
    models: Sequence[Model], whole: Mapping[tuple[int, Pair], float], table: CostTable
) -> list[NetworkCheck]:
    checks = []
    for (index, pair), measured in whole.items():
        model, inputs = models[index]
        sums = sums_by_class(model, inputs, table, pair)
        checks.append(NetworkCheck(type(model).__name__, pair, measured, sums))
    return checks


def _source(runtime: Runtime, num_operations: int, factors: Factors, left: float) -> str:
    listed = ", ".join(
        f"{op} w{pair[0]} a{pair[1]} {factor:.2f}"
        for (pair, op), factor in sorted(factors.items())
        if abs(factor - 1) >= _TOLD
    )
    return (
        f"measured {datetime.now(UTC):%Y-%m-%d} on {_machine()} with {runtime.version}, one core, "
        f"processor time, one sample: {num_operations} operations between neighbours, each as the "
        "difference between a network with twice as many copies and one with as many; then "
        f"multiplied ({listed or 'with 1'}) to meet whole networks, which the sums now do within "
        f"{left:.1%}"
    )


def _machine() -> str:
    """Return the name of the processor, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({platform.machine()})"
    except OSError:
        pass
    return f"{platform.processor() or 'an unnamed processor'} ({platform.machine()})"
