"""Is there anything to tune? The same call, defaults only, for six architectures at three budgets.

    python benchmarks/accuracy/nothing_to_tune.py --data-root data --output build/untuned.md

Each budget starts from the same float network, by ``prepare(model, budget)`` and ``fit(...)`` with
the optimizer and the direction of their defaults. Rows are kept in a JSON-lines file, from which a
run that was cut goes on. It ends with 1 where a budget is not met.
"""

import argparse
import json
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
    started = time.process_time()
    prepared = cgmq_fx.prepare(model, budget, example_inputs=(train[0][:1],))
    result = cgmq_fx.fit(
        prepared, Batches(train), F.cross_entropy, epochs=task.guided_epochs, progress=False
    )
    (cost,) = cgmq_fx.report(result.fixed).resources
    return {
        "task": task.name,
        "budget": budget,
        "seed": seed,
        "float": accuracy(model, test),
        "fixed": accuracy(result.fixed, test),
        "met": cgmq_fx.report(result.fixed).satisfied,
        "share": 100 * float(cost.total / cost.reference),
        "seconds": time.process_time() - started,
    }


def page(rows: list[dict[str, Any]], seed: int) -> str:
    """Return the page that says what was found, one line for each task that is complete."""
    lines = [
        "# Nothing to tune",
        "",
        f"`python benchmarks/accuracy/nothing_to_tune.py --seed {seed}`, torch "
        f"{torch.__version__}, one thread. Test accuracies in percent, then the bit operations "
        "that the lowered network takes, as a share of the float one's. Inputs arrive with 8 bits. "
        "The float networks are trained for minutes, and the guided epochs train on: some end "
        "above their float network.",
        "",
        "Epochs in float and under a guide: "
        + ", ".join(f"{task.name} {task.epochs} and {task.guided_epochs}" for task in TASKS)
        + ".",
        "",
        "| architecture | float | " + " | ".join(BUDGETS) + " | seconds of processor time |",
        "| --- | --- | " + "--- | " * len(BUDGETS) + "--- |",
    ]
    for task in TASKS:
        found = [row for row in rows if row["task"] == task.name]
        if len(found) == len(BUDGETS):
            cells = [f"{row['fixed']:.2f} ({row['share']:.3f} %)" for row in found]
            seconds = sum(row["seconds"] for row in found)
            cells = [task.name, f"{found[0]['float']:.2f}", *cells, f"{seconds:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    met = sum(row["met"] for row in rows)
    return "\n".join([*lines, "", f"**{met} of {len(rows)} budgets met.**", ""])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", default="", help="names to run, with commas; all by default")
    parser.add_argument("--rows", type=Path, default=Path("build/untuned.jsonl"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    text = arguments.rows.read_text(encoding="utf-8") if arguments.rows.exists() else ""
    kept = [json.loads(line) for line in text.splitlines()]
    rows = [row for row in kept if row["seed"] == arguments.seed]
    done = {(row["task"], row["budget"]) for row in rows}
    for task in TASKS:
        budgets = [budget for budget in BUDGETS if (task.name, budget) not in done]
        if not budgets or (arguments.tasks and task.name not in arguments.tasks.split(",")):
            continue
        train, test = task.data(arguments.data_root)
        for budget in budgets:
            rows.append(run(task, train, test, budget, arguments.seed))
            print(json.dumps(rows[-1]), flush=True)
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    text = page(rows, arguments.seed)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    sys.exit(not all(row["met"] for row in rows))


if __name__ == "__main__":
    main()
