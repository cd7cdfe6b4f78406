"""What does quantization without training lose? 8 bits, and mixed bit-widths at half their cost.

    python benchmarks/accuracy/post_training.py --data-root data --output build/post_training.md

On the six float networks of `tasks.py` and 512 training samples each, without labels: 8 bits
everywhere; weights of 4 bits and activations of 8, to the nearest and rounded adaptively; and mixed
bit-widths within the bit operations of that, half of those at 8 bits. With ``--mct PYTHON`` the
same networks, samples and budget go to the model-compression-toolkit in the environment of that
interpreter (`mct_mixed.py`). It ends with 1 where 8 bits lose more than 0.3 points, or mixed
bit-widths are worse than 4 and 8 bits or than the toolkit's. Rows are kept in a JSON-lines file,
from which a run that was cut goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent)]

from tasks import TASKS, Split, Task, accuracy, calibration, float_model  # noqa: E402

import cgmq_fx  # noqa: E402
from cgmq_fx.selectors import Operand  # noqa: E402

#: Half the bit operations at 8 bits, as a share of those in float.
HALF = "3.125%"
WAYS = ("8/8", "4/8 nearest", "4/8", "mixed")
TOOLKIT = "mixed, toolkit"
MOST_LOST = 0.3


def quantized(model: nn.Module, loader: list[Tensor]) -> dict[str, nn.Module]:
    """Return what each of `WAYS` makes of a network."""
    inputs = (loader[0],)
    uniform = {_is_weight: {"bit_width": 4}, _is_no_weight: {"bit_width": 8}}
    prepared = cgmq_fx.prepare(model, HALF, example_inputs=inputs, overrides=uniform)
    cgmq_fx.calibrate(prepared, loader)
    nearest = cgmq_fx.lower(prepared)
    cgmq_fx.round_weights(prepared, loader)
    cgmq_fx.correct_bias(prepared, loader)
    made = (
        cgmq_fx.quantize(model, loader),
        nearest,
        cgmq_fx.lower(prepared),
        cgmq_fx.quantize(model, loader, preset="mixed", budget=HALF, example_inputs=inputs),
    )
    return dict(zip(WAYS, made, strict=True))


def _is_weight(operand: Operand) -> bool:
    return operand.role == "weight"


def _is_no_weight(operand: Operand) -> bool:
    return not _is_weight(operand)


def by_the_toolkit(python: str, task: Task, root: str, seed: int) -> float:
    """Return the accuracy of the toolkit's network; not a number where it failed."""
    script = Path(__file__).with_name("mct_mixed.py")
    options = ["--data-root", root, "--seed", str(seed), "--tasks", task.name]
    done = subprocess.run([python, str(script), *options], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found.get(task.name, float("nan"))


def row(task: Task, train: Split, test: Split, seed: int) -> dict[str, Any]:
    """Return the accuracy in float and by each way."""
    model = float_model(task, train, seed)
    made = quantized(model, calibration(train))
    assert all(cgmq_fx.report(fixed).satisfied for fixed in made.values())
    found = {way: accuracy(fixed, test) for way, fixed in made.items()}
    return {"task": task.name, "seed": seed, "float": accuracy(model, test), **found}


def faults_of(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a row does not reach."""
    if found["8/8"] < found["float"] - MOST_LOST:
        yield f"8 bits of {found['task']}"
    if found["mixed"] < found["4/8"]:
        yield f"mixed of {found['task']}, beside 4/8"
    if found["mixed"] < found.get(TOOLKIT, 0.0):
        yield f"mixed of {found['task']}, beside the toolkit's"


def page(lines: list[str], faults: list[str], command: str) -> str:
    """Return the page that says what was found."""
    return "\n".join(
        [
            "# Without training",
            "",
            f"`{command}`, torch {torch.__version__}, one thread. Test accuracies in percent; "
            f"4/8 are weights of 4 bits and activations of 8, mixed has the same bit operations "
            f"({HALF} of the float network's). 512 samples without labels. "
            f"{len(lines) - 2} of {len(TASKS)} networks.",
            "",
            *lines,
            "",
            f"**Not reached: {'; '.join(faults)}.**" if faults else "**All reached.**",
            "",
        ]
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mct", default="", metavar="PYTHON")
    parser.add_argument("--tasks", default="", help="names to run, with commas; all by default")
    parser.add_argument("--rows", type=Path, default=Path("build/post_training.jsonl"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    text = arguments.rows.read_text(encoding="utf-8") if arguments.rows.exists() else ""
    kept = [json.loads(line) for line in text.splitlines()]
    rows = {one["task"]: one for one in kept if one["seed"] == arguments.seed}
    columns = ["float", *WAYS, *([TOOLKIT] if arguments.mct else [])]
    for task in TASKS:
        if arguments.tasks and task.name not in arguments.tasks.split(","):
            continue
        if task.name in rows and set(columns) <= set(rows[task.name]):
            continue
        root, seed = arguments.data_root, arguments.seed
        found = rows.get(task.name) or row(task, *task.data(root), seed)
        if arguments.mct:
            found[TOOLKIT] = by_the_toolkit(arguments.mct, task, root, seed)
        rows[task.name] = found
        print(json.dumps(found), flush=True)
        with arguments.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    lines = [f"| architecture | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for found in rows.values():
        cells = [f"{found[column]:.2f}" for column in columns]
        lines.append(f"| {found['task']} | {' | '.join(cells)} |")
    faults = [fault for found in rows.values() for fault in faults_of(found)]
    command = f"python benchmarks/accuracy/post_training.py --seed {arguments.seed}"
    text = page(lines, faults, command + (" --mct PYTHON" if arguments.mct else ""))
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
