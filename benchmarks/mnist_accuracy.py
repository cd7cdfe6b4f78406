"""Test accuracy of LeNet-5 on MNIST under four budgets, by examples/mnist.py.

    python benchmarks/mnist_accuracy.py --data-root data

Every run is the example as a user would start it, one process and one thread each. The bound on the
cost is checked by `lower`; the last state is taken, so that nothing is chosen by the test set.
Writes benchmarks/results/mnist_accuracy.md, of rows in a JSON-lines file from which a run that was
cut goes on; runs of other numbers of epochs have a table of their own.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mnist_accuracy.md"


@dataclass(frozen=True)
class Case:
    """A budget, whether the image's bit-width is learned, and the mean accuracy asked for.

    `is_narrow`: bit-widths 0 and 1 are among those to choose from.
    """

    budget: str
    learn_input_bits: bool
    goal: float
    is_narrow: bool = False

    def __str__(self) -> str:
        narrow = ", 0 and 1 bit allowed" if self.is_narrow else ""
        return f"{self.budget}, image {'learned' if self.learn_input_bits else 'at 8 bit'}{narrow}"


CASES = (
    Case("0.6%", False, 99.45),
    Case("0.4%", True, 99.40),
    Case("0.2%", True, 99.25, is_narrow=True),
    Case("0.1%", True, 98.9, is_narrow=True),
)
NARROW = [str(bits) for bits in (0, 1, 2, 4, 8, 16, 32)]


@dataclass(frozen=True)
class Run:
    """What one run printed, and the epochs that it was given."""

    case: Case
    seed: int
    epochs: int
    guided_epochs: int
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
    command += ["--widths", *NARROW] if case.is_narrow else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    started = time.monotonic()
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    return Run(
        case,
        seed,
        arguments.epochs,
        arguments.guided_epochs,
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


def page(runs: list[Run]) -> str:
    """Return all runs as Markdown, apart by the numbers of epochs that they were given."""
    lengths = sorted({(r.epochs, r.guided_epochs) for r in runs}, reverse=True)
    tables = [table([r for r in runs if (r.epochs, r.guided_epochs) == pair]) for pair in lengths]
    return "\n".join(["# LeNet-5 on MNIST", "", *tables])


def table(runs: list[Run]) -> str:
    """Return runs of the same numbers of epochs and their means."""
    options = f"--epochs {runs[0].epochs} --guided-epochs {runs[0].guided_epochs}"
    lines = [
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


def kept(path: Path) -> list[Run]:
    """Return the rows of a file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = map(json.loads, text.splitlines())
    return [Run(**{**row, "case": Case(**row["case"])}) for row in rows]


def main() -> None:
    """Run the cases that no row is there of, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--guided-epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=[case.budget for case in CASES])
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "mnist_accuracy.jsonl")
    arguments = parser.parse_args()
    epochs = (arguments.epochs, arguments.guided_epochs)
    runs = kept(arguments.rows)
    done = {(r.case.budget, r.seed) for r in runs if (r.epochs, r.guided_epochs) == epochs}
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for case in CASES:
            if case.budget not in arguments.budgets or (case.budget, seed) in done:
                continue
            runs.append(run(case, seed, arguments))
            print(runs[-1], flush=True)
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(runs[-1])) + "\n")
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(page(runs), encoding="utf-8")
    print(page(runs))


if __name__ == "__main__":
    main()
