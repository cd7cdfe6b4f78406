"""Does a measured table predict the latency of networks that it was not made from?

    python benchmarks/predicted_latency.py --output benchmarks/results/predicted_latency.md

Makes a table by timing the operations of one list of networks on this machine, prices another list
with it, measures those, and compares. Ends with 0 where the median error is at most 15 %. With
``--only resnet`` both lists are cut to the networks whose names start so.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from latency_networks import MADE_FROM, OTHERS, Network, built, only

from cgmq_fx.cost.table import CostTable
from cgmq_fx.measure.fixing import fixed_at
from cgmq_fx.measure.measure import Measurement, measure_table
from cgmq_fx.measure.predict import predicted
from cgmq_fx.measure.runtimes import Runtime, runtime
from cgmq_fx.measure.timing import TimingPlan, one_core, time_all

MAX_MEDIAN_ERROR = 0.15


def main() -> int:
    """Measure, compare, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="networks whose names start so")
    parser.add_argument("--table", type=Path, help="write the measured table there, too")
    parser.add_argument("--output", type=Path, help="write the page there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    runs = runtime(arguments.runtime)
    plan = TimingPlan(rounds=arguments.rounds)
    made_from, others = only(MADE_FROM, arguments.only), only(OTHERS, arguments.only)
    found = measure_table(built(made_from), runs, plan=plan, log=_log)
    if arguments.table:
        arguments.table.write_text(found.table.to_toml(), encoding="utf-8")
    rows = compare(others, found.table, runs, plan)
    command = f"python benchmarks/predicted_latency.py --runtime {runs.name}"
    command += f" --only {arguments.only}" if arguments.only else ""
    counts = f"a table made from {len(made_from)} networks prices {len(others)} others"
    page = _page(f"`{command}`: {counts}.", found, rows, time.monotonic() - begin)
    print(page)
    if arguments.output:
        arguments.output.write_text(page + "\n", encoding="utf-8")
    return 0 if _median_error(rows) <= MAX_MEDIAN_ERROR else 1


Row = tuple[str, str, float, float]


def compare(
    networks: Sequence[Network], table: CostTable, runs: Runtime, plan: TimingPlan
) -> list[Row]:
    """Return name, bit-widths, predicted and measured ms of each network at each pair of widths."""
    rows: list[Row] = []
    for (name, _, _), (model, inputs) in zip(networks, built(networks), strict=True):
        callables = {
            pair: runs.export(fixed_at(model, inputs, *pair), inputs).whole() for pair in runs.pairs
        }
        with one_core():
            timings = time_all(callables, plan)
        for pair, timing in timings.items():
            expected = float(predicted(model, inputs, table, *pair))
            rows.append((name, "w{} a{}".format(*pair), expected, 1000 * timing.seconds))
        _log(name)
    return rows


def _log(text: str) -> None:
    print(text, file=sys.stderr)


def _error(row: Row) -> float:
    return abs(row[2] / row[3] - 1)


def _median_error(rows: Sequence[Row]) -> float:
    return statistics.median(map(_error, rows))


def _page(intro: str, found: Measurement, rows: Sequence[Row], seconds: float) -> str:
    lines = [
        "# Predicted and measured latency",
        "",
        intro,
        "",
        f"- Table: {found.table.source}.",
        f"- {found.operations} operations were timed; {found.outliers[0]} of {found.outliers[1]} "
        "rounds were left out as outliers.",
        f"- Took {seconds:.0f} s.",
        "",
        "| network | bits | predicted, ms | measured, ms | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {bits} | {expected:.3f} | {measured:.3f} | {expected / measured - 1:+.1%} |"
        for name, bits, expected, measured in rows
    ]
    for bits in sorted({row[1] for row in rows}):
        here = [row for row in rows if row[1] == bits]
        lines += [
            "",
            f"Median error at {bits}: {_median_error(here):.1%}; "
            f"largest {max(map(_error, here)):.1%}.",
        ]
    lines += [
        "",
        f"**Median error of all: {_median_error(rows):.1%}** (at most "
        f"{MAX_MEDIAN_ERROR:.0%} wanted).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
