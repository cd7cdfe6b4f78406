"""Is there anything to tune? The same call, defaults only, for six architectures at three budgets.

    python benchmarks/accuracy/nothing_to_tune.py --data-root data --output build/untuned.md

Each budget starts from the same float network, by ``prepare(model, budget)`` and ``fit(...)`` with
the optimizer and the direction of their defaults. It ends with 1 where a budget is not met.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent)]

from tasks import TASKS, Batches, Split, Task, accuracy, float_model  # noqa: E402

import cgmq_fx  # noqa: E402

BUDGETS = ("4%", "2%", "1%")


def run(task: Task, train: Split, test: Split, budget: str, seed: int) -> dict[str, Any]:
    """Train one network to one budget."""
    model = float_model(task, train, seed)
    torch.manual_seed(seed)
    started = time.monotonic()
    prepared = cgmq_fx.prepare(model, budget, example_inputs=(train[0][:1],))
    result = cgmq_fx.fit(
        prepared, Batches(train), F.cross_entropy, epochs=task.guided_epochs, progress=False
    )
    (cost,) = cgmq_fx.report(result.fixed).resources
    return {
        "fixed": accuracy(result.fixed, test),
        "met": cgmq_fx.report(result.fixed).satisfied,
        "share": 100 * float(cost.total / cost.reference),
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", default="", help="names to run, with commas; all by default")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Nothing to tune",
        "",
        f"`python benchmarks/accuracy/nothing_to_tune.py --seed {arguments.seed}`, torch "
        f"{torch.__version__}, one thread. Test accuracies in percent, then the bit operations "
        "that the lowered network takes, as a share of the float one's. Inputs arrive with 8 bits.",
        "",
        "| architecture | float | " + " | ".join(BUDGETS) + " | seconds |",
        "| --- | --- | " + "--- | " * len(BUDGETS) + "--- |",
    ]
    met = count = 0
    for task in TASKS:
        if arguments.tasks and task.name not in arguments.tasks.split(","):
            continue
        train, test = task.data(arguments.data_root)
        exact = accuracy(float_model(task, train, arguments.seed), test)
        found = [run(task, train, test, budget, arguments.seed) for budget in BUDGETS]
        met, count = met + sum(item["met"] for item in found), count + len(found)
        cells = [f"{item['fixed']:.2f} ({item['share']:.3f} %)" for item in found]
        seconds = sum(item["seconds"] for item in found)
        lines.append(f"| {task.name} | {exact:.2f} | {' | '.join(cells)} | {seconds:.0f} |")
        print(lines[-1], flush=True)
    lines += ["", f"**{met} of {count} budgets met.**"]
    print(lines[-1])
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(met < count)


if __name__ == "__main__":
    main()
