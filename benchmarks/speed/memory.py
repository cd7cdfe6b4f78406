"""How much memory training with learned bit-widths needs beside training the float model.

    python benchmarks/speed/memory.py --output benchmarks/results/training_memory.md

Each run is a process of its own, which tells its peak resident set. It ends with 1 where the peak
of the prepared model is more than 1.35 times that of the float one. The second ratio leaves out
what the process held before it made the model: Python, torch and this package.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from networks import WORKLOADS
from tools import float_steps, steps_of

LIMIT = 1.35
_STEPS = 5


def peak() -> float:
    """Return the peak resident set of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(network: str, contender: str) -> dict[str, float]:
    """Train a few steps; return the peak before the model was made, and at the end."""
    torch.set_num_threads(1)
    workload = WORKLOADS[network]
    import cgmq_fx  # noqa: F401  # in both, so that its code counts in neither

    before = peak()
    if contender == "float":
        steps = float_steps(workload, *workload.data(), compiled=False)
    else:
        steps = {contender: steps_of("cgmq", workload, {})[contender]}
    for _ in range(_STEPS):
        steps[contender]()
    return {"before": before, "peak": peak()}


def in_child(network: str, contender: str) -> dict[str, float]:
    """Return what `run` does in a process of its own."""
    command = [sys.executable, __file__, "--child", network, contender]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Measure, print, write; return 1 where a peak is too high."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--networks", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(*arguments.child)))
        return 0
    lines = [
        "# Peak memory of training",
        "",
        f"Peak resident set of a process that trains {_STEPS} steps, eager, one thread. torch "
        f"{torch.__version__}.",
        "",
        "| network | float | learned bit-widths | ratio | ratio without Python and torch |",
        "| --- | --: | --: | --: | --: |",
    ]
    worst = 0.0
    for network in arguments.networks:
        base, own = in_child(network, "float"), in_child(network, "eager")
        worst = max(worst, own["peak"] / base["peak"])
        net = (own["peak"] - own["before"]) / (base["peak"] - base["before"])
        lines.append(
            f"| {network} | {base['peak']:.0f} MiB | {own['peak']:.0f} MiB | "
            f"{own['peak'] / base['peak']:.2f} | {net:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    return 1 if worst > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
