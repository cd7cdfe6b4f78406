"""Do runtimes agree with each other on real test images? And how large are the files?

    python benchmarks/runtime_agreement.py --data-root data --output build/runtime_agreement.md

LeNet-5 on MNIST and ResNet-20 on the JPEG copy of CIFAR-10 (`accuracy/tasks.py`), quantized without
training to 8 bits and to mixed bit-widths, in PyTorch, in ONNX Runtime (as the file says it and
optimized), compiled by Inductor, in ExecuTorch, and in integers (`fixed.integer_reference`). It
tells the accuracy in each, the share of test images that get the class that PyTorch gives them, the
largest difference of a logit, and the size of every file beside float32. It ends with 1 where fewer
than 99.9 % of MNIST's or 99.5 % of CIFAR's images get the same class.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from torch._inductor import config

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "accuracy")]

import executorch_runs  # noqa: E402
import onnx_runs  # noqa: E402
from tasks import TASKS, Split, Task, calibration, cifar, cifar_part, float_model  # noqa: E402

import cgmq_fx  # noqa: E402
from cgmq_fx.lowered import LoweredModule  # noqa: E402

LEAST = {"LeNet-5": 99.9, "ResNet-20": 99.5}
SUFFIXES = (".safetensors", ".onnx", ".qonnx.onnx", ".pt2", ".pte")
_BATCH = 500

Run = Callable[[Tensor], Tensor]


def runs(fixed: LoweredModule, files: Mapping[str, Path]) -> dict[str, Run]:
    """Return what computes the logits of a batch in each runtime."""
    torch._dynamo.reset()
    program = torch.compile(cgmq_fx.load_exported(files[".pt2"]))
    optimized = onnx_runs.session(files[".onnx"])
    plain = onnx_runs.session(files[".onnx"], onnx_runs.UNOPTIMIZED)
    return {
        "PyTorch": fixed,
        "integers": lambda x: fixed.integer_reference(x, kernels="float"),
        "ONNX Runtime, unoptimized": lambda x: _outputs(plain, x),
        "ONNX Runtime": lambda x: _outputs(optimized, x),
        "Inductor": program,
        "ExecuTorch": lambda x: executorch_runs.run(files[".pte"], [x])[0],
    }


def _outputs(session: onnxruntime.InferenceSession, x: Tensor) -> Tensor:
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(found)


def compared(made: Mapping[str, Run], test: Split) -> dict[str, tuple[float, float, float]]:
    """Return by runtime accuracy and agreement in percent, and the most that a logit differs."""
    logits = {
        name: torch.cat([run(x) for x in test[0].split(_BATCH)]) for name, run in made.items()
    }
    first = logits["PyTorch"]
    return {
        name: (
            100 * float((own.argmax(1) == test[1]).float().mean()),
            100 * float((own.argmax(1) == first.argmax(1)).float().mean()),
            float((own - first).abs().max()),
        )
        for name, own in logits.items()
    }


def quantized(model: nn.Module, loader: list[Tensor]) -> dict[str, LoweredModule]:
    """Return the networks that are compared."""
    inputs = (loader[0],)
    mixed = cgmq_fx.quantize(model, loader, preset="mixed", budget="2%", example_inputs=inputs)
    return {"8 bits": cgmq_fx.quantize(model, loader), "mixed, 2 %": mixed}


def measure(task: Task, root: str, folder: Path) -> tuple[list[str], list[str], bool]:
    """Return the lines of both tables for one network, and whether runtimes agree enough."""
    train, test = task.data(root)
    if task.data is cifar:
        test = cifar_part(root, "test", 1000)  # all of them
    model = float_model(task, train, 0)
    parameters = 4 * sum(parameter.numel() for parameter in model.parameters())
    lines, sizes, agrees = [], [], True
    for kind, fixed in quantized(model, calibration(train)).items():
        files = {
            suffix: cgmq_fx.export(
                fixed, folder / f"model{suffix}", example_inputs=(test[0][:_BATCH],)
            )
            for suffix in SUFFIXES
        }
        for name, (right, same, off) in compared(runs(fixed, files), test).items():
            lines.append(
                f"| {task.name} | {kind} | {name} | {right:.2f} | {same:.2f} | {off:.2g} |"
            )
            agrees &= same >= LEAST[task.name]
        held = [path.stat().st_size for path in files.values()]
        shares = " | ".join(f"{size:,} ({100 * size / parameters:.1f} %)" for size in held)
        sizes.append(f"| {task.name} | {kind} | {parameters:,} | {shares} |")
    return lines, sizes, agrees


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    config.freezing = True
    lines: list[str] = []
    sizes: list[str] = []
    agrees = True
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for task in (task for task in TASKS if task.name in LEAST):
            found = measure(task, arguments.data_root, Path(folder))
            lines, sizes, agrees = lines + found[0], sizes + found[1], agrees and found[2]
            print("\n".join((*found[0], *found[1])), flush=True)
    text = "\n".join(
        [
            "# Runtimes on test images",
            "",
            f"`python benchmarks/runtime_agreement.py`, torch {torch.__version__}, ONNX Runtime "
            f"{onnxruntime.__version__}. Accuracy, and images that get the class that PyTorch "
            f"gives them, in percent; the largest difference of a logit.",
            "",
            "| network | bits | runtime | accuracy | same class | logits |",
            "| --- | --- | --- | --- | --- | --- |",
            *lines,
            "",
            "Bytes of the files, and of what float32 takes. QONNX keeps weights as float numbers.",
            "",
            f"| network | bits | float32 | {' | '.join(SUFFIXES)} |",
            "| --- | --- | --- |" + " --- |" * len(SUFFIXES),
            *sizes,
            "",
            "**All agree.**" if agrees else "**Some do not agree enough.**",
            "",
        ]
    )
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    sys.exit(not agrees)


if __name__ == "__main__":
    main()
