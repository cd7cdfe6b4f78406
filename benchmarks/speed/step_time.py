"""How long a training step with learned bit-widths takes beside a float step.

    python benchmarks/speed/step_time.py --threads 1 --compile --rows build/speed.jsonl

One process, steps in turns; what is told is the median of the rounds' ratios and their quartiles.
Another tool, in its own environment: `--tool NAME` (see tools.py). Each result is also a line of
JSON, from which results.py makes the page.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Barriers that spin measure nothing but the neighbours' load; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from networks import WORKLOADS
from tools import TOOLS, steps_of, versions_of
from training import Timing, interleave, ratio

#: What a contender is compared with, where that is not "float".
BASES = {"compiled": "compiled float"}


def rows_of(tool: str, network: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each contender of a tool on a network."""
    options = {"compile": arguments.compile, "granularity": arguments.granularity}
    torch.manual_seed(0)
    steps = steps_of(tool, WORKLOADS[network], options)
    timings = interleave(steps, arguments.rounds)
    common = {
        "tool": tool,
        "network": network,
        "threads": arguments.threads,
        "granularity": arguments.granularity or "layer",
        "rounds": arguments.rounds,
        "versions": versions_of(tool),
    }
    return [common | row(name, timings) for name in steps if name != "float"]


def rows_or_reason(tool: str, network: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a tool on a network; of one that fails there a row with the reason."""
    try:
        return rows_of(tool, network, arguments)
    except Exception as error:
        if tool == "cgmq":
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return [{"tool": tool, "network": network, "threads": arguments.threads, "failed": reason}]


def row(name: str, timings: dict[str, Timing]) -> dict[str, Any]:
    """Return how a contender did against its base."""
    base = BASES.get(name, "float")
    own, other = timings[name], timings[base]
    return {
        "contender": name,
        "base": base,
        "wall": asdict(ratio(own.wall, other.wall)),
        "cpu": asdict(ratio(own.cpu, other.cpu)),
        "step_ms": 1000 * sorted(own.wall)[len(own.wall) // 2],
        "base_ms": 1000 * sorted(other.wall)[len(other.wall) // 2],
    }


def text_of(row: dict[str, Any]) -> str:
    """Return a row as a line to read."""
    if "failed" in row:
        return f"{row['network']:13} {row['threads']} thread(s) {row['tool']}: {row['failed']}"
    wall, cpu = row["wall"], row["cpu"]
    return (
        f"{row['network']:13} {row['threads']} thread(s) {row['tool']} {row['contender']:14} "
        f"{row['step_ms']:7.1f} ms / {row['base']} {row['base_ms']:7.1f} ms: "
        f"wall {wall['median']:.3f} ({wall['low']:.3f} to {wall['high']:.3f}), "
        f"processor {cpu['median']:.3f} ({cpu['low']:.3f} to {cpu['high']:.3f})"
    )


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tool", choices=TOOLS, default="cgmq")
    parser.add_argument("--networks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile, against itself")
    parser.add_argument("--granularity", help="of the gates, where a tool has a choice")
    parser.add_argument("--rows", type=Path, help="file to which lines of JSON are added")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for network in arguments.networks:
        for found in rows_or_reason(arguments.tool, network, arguments):
            print(text_of(found), flush=True)
            if arguments.rows:
                arguments.rows.parent.mkdir(parents=True, exist_ok=True)
                with arguments.rows.open("a") as file:
                    file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
