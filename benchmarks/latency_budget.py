"""Does what was trained to a budget in ms run within it?

    python benchmarks/latency_budget.py --table board.toml

`benchmarks/predicted_latency.py --table board.toml` makes the table; without `--table` it is
measured first. Two networks that it was not made from are trained for a little while on digits to
three budgets each, lowered, exported and timed. The error that the table states of itself is the
margin: `prepare` is given the budget divided by one plus it. Ends with 0 where every measured
latency is within its budget. ``--only resnet`` takes those whose names start so.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from latency_networks import IMAGE, MADE_FROM, OTHERS, built
from sklearn.datasets import load_digits
from torch import nn

from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.table import CostTable
from cgmq_fx.fit import fit
from cgmq_fx.measure.fixing import prepared_for_timing, uniform_bits
from cgmq_fx.measure.measure import measure_table
from cgmq_fx.measure.predict import uncertainty
from cgmq_fx.measure.runtimes import Runtime, runtime
from cgmq_fx.measure.timing import TimingPlan, one_core, time_all
from cgmq_fx.prepare import prepare

NETWORKS = ("resnet 16 [3 3 3]", "mobilenet 48 [2 2] x3")
#: Where the budgets lie between 8 bits everywhere and float.
SHARES = (0.1, 0.35, 0.7)
STEPS, BATCH = 12, 8


@dataclass(frozen=True)
class Run:
    """One network trained to one budget; latencies in ms."""

    network: str
    budget: float
    margin: float
    predicted: float
    measured: float
    num_integer: int
    num_sites: int

    @property
    def is_within(self) -> bool:
        """Whether the measured latency is within the budget."""
        return self.measured <= self.budget


def main() -> int:
    """Train, export, measure, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--table", type=Path, help="a table that was measured before")
    parser.add_argument("--only", default="", help="networks whose names start so")
    parser.add_argument("--output", type=Path, help="write the page there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = runtime(arguments.runtime)
    if arguments.table:
        table = load_table(arguments.table)
    else:
        table = measure_table(built(MADE_FROM), runs, log=_log).table
    names = [name for name in NETWORKS if name.startswith(arguments.only)]
    made = {name: make for name, make, _ in OTHERS}
    results = [run for name in names for run in _runs(name, made[name], table, runs)]
    page = _page(table, results)
    print(page)
    if arguments.output:
        arguments.output.write_text(page + "\n", encoding="utf-8")
    return 0 if all(result.is_within for result in results) else 1


def _runs(name: str, make: Callable[[], nn.Module], table: CostTable, runs: Runtime) -> list[Run]:
    found = []
    for share in SHARES:
        torch.manual_seed(0)
        model = make()
        lowest, highest, margin = _range(model, table)
        budget = float(f"{(lowest + share * (highest - lowest)) * (1 + margin):.3g}")
        found.append(_run(name, model, budget, margin, table, runs))
        _log(str(found[-1]))
    return found


def _range(model: nn.Module, table: CostTable) -> tuple[float, float, float]:
    """Return what the table says of 8 bits and of float, in ms, and its error at 8 bits."""
    accounting = prepared_for_timing(model, (torch.randn(IMAGE),), (8,), table).plan.accounting
    integer, wide = (uniform_bits(accounting, bits, bits) for bits in (8, 32))
    low, high = (float(accounting.totals(bits)[table.name]) for bits in (integer, wide))
    margin = max(uncertainty(accounting, table, bits) for bits in (integer, wide))
    return low, high, float(margin)


def _run(
    name: str, model: nn.Module, budget: float, margin: float, table: CostTable, runs: Runtime
) -> Run:
    inputs = (torch.randn(IMAGE),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare(
            model,
            {table.name: f"{budget / (1 + margin):.6g} ms"},
            cost_table=table,
            example_inputs=inputs,
            widths=(8,),
        )
    result = fit(prepared, _batches(), nn.functional.cross_entropy, epochs=2, progress=False)
    fixed = result.fixed
    call = runs.export(fixed, inputs).whole()
    with one_core():
        timing = time_all({"fixed": call}, TimingPlan(rounds=31))["fixed"]
    bits = list(fixed.bit_widths.values())
    accounting = prepared.plan.accounting
    predicted = float(accounting.totals(bits)[table.name])
    narrow = sum(width <= 8 for width in bits)
    return Run(name, budget, margin, predicted, 1000 * timing.seconds, narrow, len(bits))


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return digits, enlarged to the image of the networks."""
    data = load_digits()
    images = torch.from_numpy(data.images[: STEPS * BATCH]).float()[:, None] / 16
    images = nn.functional.interpolate(images, size=IMAGE[2:], mode="bilinear")
    images = images.expand(-1, IMAGE[1], -1, -1).contiguous()
    labels = torch.from_numpy(data.target[: STEPS * BATCH])
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def _log(text: str) -> None:
    print(text, file=sys.stderr)


def _page(table: CostTable, results: Sequence[Run]) -> str:
    lines = [
        "# Budgets in ms, measured",
        "",
        "`python benchmarks/latency_budget.py`: networks that the table was not made from, trained "
        "to a budget, lowered, exported and timed. `prepare` is given the budget divided by one "
        "plus the margin, which is the error that the table states of the network.",
        "",
        f"- Table: {table.source}.",
        "",
        "| network | budget, ms | margin | predicted, ms | measured, ms | within | at 8 bits |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {run.network} | {run.budget:.3g} | {run.margin:.1%} | {run.predicted:.3f} | "
        f"{run.measured:.3f} | {'yes' if run.is_within else 'NO'} | "
        f"{run.num_integer} of {run.num_sites} |"
        for run in results
    ]
    within = sum(run.is_within for run in results)
    return "\n".join([*lines, "", f"**Within the budget: {within} of {len(results)}.**"])


if __name__ == "__main__":
    sys.exit(main())
