"""How fast is an ``.onnx`` file in ONNX Runtime, beside float32 and ONNX Runtime's own quantizer?

For each network and batch four files run in turn, in one process, on one thread: the float32
network, ours at 8 and at 4 bits, and what `onnxruntime.quantization.quantize_static` makes of the
float32 file (QDQ, per channel, after its own preprocessing). Run it with

    python benchmarks/onnxruntime_speed.py --output benchmarks/results/onnxruntime_speed.md

Speeds are medians of the ratios of neighbouring runs. Weights are untrained: they change no time.
It ends with 1 where our file at 8 bits is more than 3 % slower than that of `quantize_static`.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime import quantization
from torch import Tensor, nn

from cgmq_fx import export, lower, prepare

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import onnx_runs  # noqa: E402

from torchvision_shim import torchvision  # noqa: E402

NETWORKS = ("resnet18", "mobilenet_v2")
FLOAT, OURS, THEIRS = "float32", "ours, 8 bits", "quantize_static, 8 bits"
#: Charges for what additions and averages read, so that it is quantized too, as
#: `quantize_static` does.
READS: dict[str, Any] = {
    "schema": 1,
    "name": "reads",
    "unit": "bit",
    "source": "the bits that additions and averages read",
    "unpriced": "zero",
    "row": [
        {"op": "add", "per": "output_element", "cost": {"formula": "lhs_bits + rhs_bits"}},
        {
            "op": ["avg_pool", "reduce"],
            "per": "input_element",
            "cost": {"formula": "activation_bits"},
        },
    ],
}
#: Ours may take this much longer than theirs: a run's noise.
TOLERANCE = 1.03
_CALIBRATION_BATCHES = 2


def float_file(model: nn.Module, x: Tensor, folder: Path) -> Path:
    """Write the float32 network with torch's exporter."""
    path = folder / "float32.onnx"
    with redirect_stdout(io.StringIO()):
        program: Any = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    program.save(str(path))
    return path


def our_file(model: nn.Module, x: Tensor, bits: int, folder: Path) -> Path:
    """Write the file of a network at one bit-width."""
    prepared = prepare(
        model,
        {"bops": "100%", READS["name"]: "100%"},
        example_inputs=(x,),
        cost_table=["bops", READS],
        widths=(bits,),
    ).eval()
    prepared(x)
    prepared.set_bit_widths([min(site.allowed) for site in prepared.plan.accounting.sites])
    prepared(x)
    fixed = lower(prepared, allow_untrained=True)
    return export(fixed, folder / f"ours{bits}.onnx", example_inputs=(x,))


class _Batches(quantization.CalibrationDataReader):
    """A few batches for the calibration of `quantize_static`."""

    def __init__(self, name: str, x: Tensor) -> None:
        batches: list[dict[str, Any]] = [{name: x.numpy()}] * _CALIBRATION_BATCHES
        self._batches: Iterator[dict[str, Any]] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def their_file(path: Path, x: Tensor, folder: Path) -> Path:
    """Write what ONNX Runtime's own quantizer makes of the float32 file."""
    ready, made = folder / "ready.onnx", folder / "theirs.onnx"
    quantization.quant_pre_process(path, ready)
    name = onnx_runs.session(ready).get_inputs()[0].name
    quantization.quantize_static(
        ready,
        made,
        _Batches(name, x),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return made


def runner(path: Path, x: Tensor) -> Callable[[], object]:
    """Return what runs a file once."""
    opened = onnx_runs.session(path)
    given = {opened.get_inputs()[0].name: np.ascontiguousarray(x.numpy())}
    return lambda: opened.run(None, given)


def timed(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the times in ms of runs that take turns, the first of them not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-2, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: Mapping[str, list[float]], over: str, under: str) -> float:
    """Return the median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def measure(name: str, batch: int, rounds: int, folder: Path) -> tuple[list[str], float]:
    """Return the lines of one network and batch, and the time of ours over that of theirs."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(batch, 3, 224, 224)
    plain = float_file(model, x, folder)
    files = {
        FLOAT: plain,
        OURS: our_file(model, x, 8, folder),
        "ours, 4 bits": our_file(model, x, 4, folder),
        THEIRS: their_file(plain, x, folder),
    }
    times = timed({kind: runner(path, x) for kind, path in files.items()}, rounds)
    lines = [
        f"| {name} | {batch} | {kind} | {statistics.median(times[kind]):.1f} ms | "
        f"{ratio(times, FLOAT, kind):.2f} | {path.stat().st_size / 2**20:.1f} MiB |"
        for kind, path in files.items()
    ]
    return lines, ratio(times, OURS, THEIRS)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        f"onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, one thread; medians of "
        f"{arguments.rounds} interleaved runs",
        "",
        "| network | batch | file | time | times float32 | size |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    beside: dict[str, float] = {}
    for name in arguments.networks:
        for batch in arguments.batches:
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                found, share = measure(name, batch, arguments.rounds, Path(folder))
            print("\n".join(found), flush=True)
            lines += found
            beside[f"{name}, batch {batch}"] = share
    lines += ["", f"Time of {OURS}, over that of {THEIRS}:", ""]
    lines += [f"- {where}: {share:.3f}" for where, share in beside.items()]
    print("\n".join(lines[-len(beside) :]))
    if arguments.output:
        title = "# Speed of .onnx in ONNX Runtime"
        command = "`python benchmarks/onnxruntime_speed.py`"
        arguments.output.write_text(f"{title}\n\n{command}\n\n" + "\n".join(lines) + "\n")
    slow = [where for where, share in beside.items() if share > TOLERANCE]
    if slow:
        sys.exit(f"more than {TOLERANCE - 1:.0%} slower than quantize_static: {', '.join(slow)}")


if __name__ == "__main__":
    main()
