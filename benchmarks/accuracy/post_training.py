"""What does quantization without training lose? 8 bits, and mixed bit-widths at half their cost.

    python benchmarks/accuracy/post_training.py --data-root data --output build/post_training.md

On the six float networks of `tasks.py` and 512 training samples each, without labels: 8 bits
everywhere; weights of 4 bits and activations of 8, to the nearest and rounded adaptively; and mixed
bit-widths within the bit operations of that, half of those at 8 bits. With ``--mct PYTHON`` the
same networks, samples and budget go to the model-compression-toolkit in the environment of that
interpreter (`mct_mixed.py`). It ends with 1 where 8 bits lose more than 0.3 points, or mixed
bit-widths are worse than 4 and 8 bits or than the toolkit's.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent)]

from tasks import TASKS, Split, Task, accuracy, calibration, float_model  # noqa: E402

import cgmq_fx  # noqa: E402
from cgmq_fx.selectors import Operand  # noqa: E402

#: Half the bit operations at 8 bits, as a share of those in float.
HALF = "3.125%"
WAYS = ("8/8", "4/8 nearest", "4/8", "mixed")
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


def by_the_toolkit(python: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the accuracy of the toolkit's networks by task; none where it failed."""
    script = Path(__file__).with_name("mct_mixed.py")
    options = ["--data-root", arguments.data_root, "--seed", str(arguments.seed)]
    done = subprocess.run([python, str(script), *options], stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(task: Task, train: Split, test: Split, seed: int) -> tuple[float, dict[str, float]]:
    """Return the accuracy in float and by each way."""
    model = float_model(task, train, seed)
    made = quantized(model, calibration(train))
    assert all(cgmq_fx.report(fixed).satisfied for fixed in made.values())
    return accuracy(model, test), {way: accuracy(fixed, test) for way, fixed in made.items()}


def page(lines: list[str], faults: list[str], command: str) -> str:
    """Return the page that says what was found."""
    return "\n".join(
        [
            "# Without training",
            "",
            f"`{command}`, torch {torch.__version__}, one thread. Test accuracies in percent; "
            f"4/8 are weights of 4 bits and activations of 8, mixed has the same bit operations "
            f"({HALF} of the float network's). 512 samples without labels.",
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
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    theirs = by_the_toolkit(arguments.mct, arguments) if arguments.mct else {}
    columns = ["float", *WAYS, *(["mixed, toolkit"] if theirs else [])]
    lines = [f"| architecture | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    faults = []
    for task in TASKS:
        exact, found = row(task, *task.data(arguments.data_root), arguments.seed)
        cells = [exact, *found.values()]
        least = found["4/8"]
        if theirs:
            cells.append(theirs.get(task.name, float("nan")))
            least = max(least, theirs.get(task.name, 0.0))
        lines.append(f"| {task.name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
        print(lines[-1], flush=True)
        if found["8/8"] < exact - MOST_LOST:
            faults.append(f"8 bits of {task.name}")
        if found["mixed"] < least:
            faults.append(f"mixed of {task.name}")
    command = f"python benchmarks/accuracy/post_training.py --seed {arguments.seed}"
    text = page(lines, faults, command + (" --mct PYTHON" if theirs else ""))
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
