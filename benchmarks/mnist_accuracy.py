"""Test accuracy of LeNet-5 on MNIST under two budgets, three seeds each, by examples/mnist.py.

    python benchmarks/mnist_accuracy.py --data-root data

Every run is the example as a user would start it, one process and one thread each. The bound on the
cost is checked by `lower`; the last state is taken, so that nothing is chosen by the test set.
Writes benchmarks/results/mnist_accuracy.md.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mnist_accuracy.md"


@dataclass(frozen=True)
class Case:
    """A budget, whether the image's bit-width is learned, and the least mean accuracy asked for."""

    budget: str
    learn_input_bits: bool
    goal: float

    def __str__(self) -> str:
        return f"{self.budget}, image {'learned' if self.learn_input_bits else 'at 8 bit'}"


CASES = (Case("0.6%", False, 99.2), Case("0.4%", True, 99.0))


@dataclass(frozen=True)
class Run:
    """What one run printed."""

    case: Case
    seed: int
    float_accuracy: float
    fixed_accuracy: float
    relative_bops: float
    seconds: float


def run(case: Case, seed: int, arguments: argparse.Namespace) -> Run:
    """Run the example once."""
    command = [
        sys.executable, str(ROOT / "examples" / "mnist.py"), "--data-root", arguments.data_root,
        "--budget", case.budget, "--seed", str(seed), "--epochs", str(arguments.epochs),
        "--guided-epochs", str(arguments.guided_epochs),
    ]  # fmt: skip
    command += ["--learn-input-bits"] if case.learn_input_bits else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    started = time.monotonic()
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    return Run(
        case,
        seed,
        _figure(r"^float: test accuracy ([\d.]+) %", text),
        _figure(r"^fixed: test accuracy ([\d.]+) %", text),
        _figure(r"^\s*([\d.]+) % of the reference", text),
        time.monotonic() - started,
    )


def _figure(pattern: str, text: str) -> float:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"the example printed nothing like {pattern!r}:\n{text}")
    return float(found[1])


def table(runs: list[Run], arguments: argparse.Namespace) -> str:
    """Return the runs and their means as Markdown."""
    options = f"--epochs {arguments.epochs} --guided-epochs {arguments.guided_epochs}"
    lines = [
        "# LeNet-5 on MNIST",
        "",
        f"`python benchmarks/mnist_accuracy.py {options}`; accuracy on 10,000 test images, %.",
        "",
        "| budget (relative BOPs) | seed | float | fixed | relative BOPs, % | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in runs:
        accuracies = f"{r.float_accuracy:.2f} | {r.fixed_accuracy:.2f}"
        lines.append(
            f"| {r.case} | {r.seed} | {accuracies} | {r.relative_bops:.5f} | {r.seconds:.0f} |"
        )
    for case in CASES:
        own = [r for r in runs if r.case == case]
        if own:
            lines += ["", summary(case, own)]
    return "\n".join(lines) + "\n"


def summary(case: Case, runs: list[Run]) -> str:
    """Return the mean and the spread of the runs of one case, and whether the budget was met."""
    accuracies = [r.fixed_accuracy for r in runs]
    met = all(r.relative_bops <= float(case.budget.rstrip("%")) for r in runs)
    return (
        f"**{case}**: mean {statistics.mean(accuracies):.3f} %, from {min(accuracies):.2f} to "
        f"{max(accuracies):.2f} over {len(runs)} seeds (asked: {case.goal} %); budget "
        f"{'met every time' if met else 'NOT met'}."
    )


def main() -> None:
    """Run all cases and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--guided-epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    runs: list[Run] = []
    for seed in arguments.seeds:
        for case in CASES:
            runs.append(run(case, seed, arguments))
            print(runs[-1], flush=True)
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(table(runs, arguments))
    print(table(runs, arguments))


if __name__ == "__main__":
    main()
