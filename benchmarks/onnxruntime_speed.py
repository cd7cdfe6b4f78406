"""How fast is an ``.onnx`` file in ONNX Runtime, beside float32 and ONNX Runtime's own quantizer?

For each network and batch four files run in turn, in one process, on one thread: the float32
network, ours at 8 and at 4 bits, and what `onnxruntime.quantization.quantize_static` makes of the
float32 file (QDQ, per channel, after its own preprocessing). Run it with

    python benchmarks/onnxruntime_speed.py --output benchmarks/results/onnxruntime_speed.md

It ends with 1 where our file at 8 bits is more than 3 % slower than that of `quantize_static`.
"""

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import quantization
from torch import Tensor, nn

from cgmq_fx.export import export

sys.path[:0] = [str(Path(__file__).parent)]  # the modules beside this script

import onnx_runs  # noqa: E402
import speeds  # noqa: E402

THEIRS = "quantize_static, 8 bits"
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
    fixed = speeds.fixed_at(model, x, bits)
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


def contender(path: Path, x: Tensor) -> speeds.Contender:
    """Return what runs a file."""
    opened = onnx_runs.session(path)
    given = {opened.get_inputs()[0].name: np.ascontiguousarray(x.numpy())}
    return speeds.Contender(lambda: opened.run(None, given), speeds.size_of(path))


def contenders(
    model: nn.Module, x: Tensor, folder: Path
) -> Mapping[str, Callable[[], speeds.Contender]]:
    """Return what makes each contender."""
    plain = float_file(model, x, folder)
    return {
        speeds.FLOAT: lambda: contender(plain, x),
        speeds.OURS_8: lambda: contender(our_file(model, x, 8, folder), x),
        speeds.OURS_4: lambda: contender(our_file(model, x, 4, folder), x),
        THEIRS: lambda: contender(their_file(plain, x, folder), x),
    }


QUESTION = speeds.Question(
    "Speed of .onnx in ONNX Runtime",
    "onnxruntime_speed.py",
    ("onnxruntime", "torch"),
    "size",
    contenders,
    ((speeds.OURS_8, THEIRS),),
    tolerance=1.03,  # a run's noise
)


if __name__ == "__main__":
    speeds.answer(QUESTION)
