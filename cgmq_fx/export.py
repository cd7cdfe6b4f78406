"""`export`: a lowered module as a file, which is verified before it is put in place."""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cgmq_fx.errors import BudgetError, CgmqError, UsageError
from cgmq_fx.export_onnx import write_qdq, write_qonnx
from cgmq_fx.export_packed import write_packed
from cgmq_fx.export_program import write_program
from cgmq_fx.export_pte import write_pte
from cgmq_fx.frozen import FrozenWeight
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.passes.values import map_tensors
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.report import Report, report
from cgmq_fx.verify import verify

_PACKED = "safetensors"
#: What writes a file, by its format; the last argument are example inputs, where they were given.
_WRITERS: Mapping[str, Callable[[LoweredModule, Report, Path, Sequence[Any] | None], None]] = {
    "onnx": write_qdq,
    "pt2": write_program,
    "pte": write_pte,
    "qonnx": write_qonnx,
    _PACKED: lambda fixed, contents, path, _: write_packed(fixed, contents, path),
}
#: The format of a file by how its name ends; the first that fits, does.
_ENDINGS: Mapping[str, str] = {
    ".qonnx.onnx": "qonnx",
    ".onnx": "onnx",
    ".pt2": "pt2",
    ".pte": "pte",
    ".safetensors": _PACKED,
}


def export(
    fixed: LoweredModule,
    path: str | os.PathLike[str],
    *,
    example_inputs: Sequence[Any] | None = None,
    format: str | None = None,
) -> Path:
    """Write a lowered module to a file whose format its suffix names, and return the path.

    ``.safetensors``: weights as integers packed at their true width, with the graph, the budgets
    and the cost tables in a manifest (docs/formats/safetensors.md). ``.pt2``: a program of
    `torch.export` with PyTorch's standard quantization operators, and the same manifest
    (docs/formats/pt2.md). ``.onnx``: QuantizeLinear and DequantizeLinear with integer weights, for
    ONNX Runtime; ``.qonnx.onnx``: Quant nodes of QONNX (docs/formats/onnx.md). ``.pte``: a program
    of ExecuTorch whose int8 layers XNNPACK computes (docs/formats/pte.md). The file is written
    beside its place, `cgmq_fx.verify` recomputes every cost from it, and only then does it take its
    place: an older file there stays as it was if anything fails.

    Args:
        fixed: what `cgmq_fx.lower` returned.
        path: where to; the folder must be there.
        example_inputs: one value for each argument of its forward, for the formats that hold
            programs.
        format: ``"onnx"``, ``"pt2"``, ``"pte"``, ``"qonnx"`` or ``"safetensors"``; by default
            what the path ends with says.

    Raises:
        UsageError: there is no such format or suffix, `fixed` is not lowered, or holds what the
            format cannot.
        UnsupportedModelError: the format has no form of an operation.
        BudgetError: `fixed` exceeds a budget.
        CostTableError: a cost table is code, which no file can hold.
    """
    target = Path(path)
    chosen = _format_of(target, format)
    _check_is_lowered(fixed)
    contents = report(fixed)
    _check_budgets(contents)
    if chosen != _PACKED:
        _check_units(fixed)
    if example_inputs is not None:
        # A program that was recorded with another order in memory reads any input in that order.
        example_inputs = tuple(map_tensors(torch.Tensor.contiguous, tuple(example_inputs)))
    if not target.parent.is_dir():
        raise UsageError(f"export to {str(target)!r}: there is no folder {str(target.parent)!r}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".cgmq-fx-") as folder:
        written = Path(folder) / target.name
        _WRITERS[chosen](fixed, contents, written, example_inputs)
        _check_file(contents, written)
        written.replace(target)
    return target


def _format_of(target: Path, chosen: str | None) -> str:
    if chosen is not None:
        if chosen in _WRITERS:
            return chosen
        raise UsageError(
            f"export to {str(target)!r}: there is no format {chosen!r}; there is "
            f"{', '.join(sorted(_WRITERS))}"
        )
    for ending, name in _ENDINGS.items():
        if target.name.endswith(ending):
            return name
    raise UsageError(
        f"export to {str(target)!r}: no format has the suffix {target.suffix!r}; there is "
        f"{', '.join(sorted(_ENDINGS))}"
    )


def _check_is_lowered(fixed: object) -> None:
    if isinstance(fixed, LoweredModule):
        return
    name = type(fixed).__name__
    if isinstance(fixed, PreparedModule):
        raise UsageError(
            f"export got {name}, a prepared model, whose bit-widths may still change; give it what "
            f"cgmq_fx.lower returned"
        )
    kind = "a float model" if isinstance(fixed, nn.Module) else "not a model"
    raise UsageError(f"export got {name}, {kind}; it takes what cgmq_fx.lower returned")


def _check_units(fixed: LoweredModule) -> None:
    """Refuse weights whose elements differ in bit-width, for formats with a scale per channel."""
    weights = [module for module in fixed.modules() if isinstance(module, FrozenWeight)]
    odd = [item.site for item in weights if item.unit_bits is not None and item.scale.ndim > 1]
    if odd:
        raise UsageError(
            f"the elements of the weights {odd[:5]} differ in bit-width and in scale, which no "
            f"runtime of this format has; export to .safetensors, or prepare the model with "
            f"granularity='channel'"
        )


def _check_budgets(contents: Report) -> None:
    over = [item.name for item in contents.resources if not item.is_satisfied]
    if over:
        raise BudgetError(
            f"{contents.model} exceeds its budgets on {', '.join(over)} and is not exported; lower "
            f"the prepared model again"
        )


def _check_file(contents: Report, written: Path) -> None:
    """Check that the file alone says of the costs what the report says."""
    found = verify(written)
    if not found.satisfied or found.totals != contents.totals or found.budgets != contents.budgets:
        raise CgmqError(
            f"{contents.model} was not exported: its report has the totals {contents.totals}, its "
            f"file {found.totals}; please report this, with the model"
        )
