"""Writes a lowered module as ``.onnx``: the graph, with its grids as QDQ or QONNX has them."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cgmq_fx.container import FileFault
from cgmq_fx.errors import UsageError
from cgmq_fx.export_packed import packed_content
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.marked_graph import marked
from cgmq_fx.onnx_file import QDQ, QONNX, described
from cgmq_fx.onnx_marks import MarkWriter
from cgmq_fx.onnx_program import marked_program, require_onnx
from cgmq_fx.onnx_qdq import QdqWriter
from cgmq_fx.onnx_qonnx import QonnxWriter
from cgmq_fx.onnx_reader import read_onnx
from cgmq_fx.report import Report

_WRITERS: Mapping[str, type[MarkWriter]] = {QDQ: QdqWriter, QONNX: QonnxWriter}


def write_qdq(
    fixed: LoweredModule, contents: Report, path: Path, example_inputs: Sequence[Any] | None
) -> None:
    """Write `fixed` to a new file with QuantizeLinear and DequantizeLinear; see `write_onnx`."""
    write_onnx(fixed, contents, path, example_inputs, QDQ)


def write_qonnx(
    fixed: LoweredModule, contents: Report, path: Path, example_inputs: Sequence[Any] | None
) -> None:
    """Write `fixed` to a new file with Quant nodes; see `write_onnx`."""
    write_onnx(fixed, contents, path, example_inputs, QONNX)


def write_onnx(
    fixed: LoweredModule,
    contents: Report,
    path: Path,
    example_inputs: Sequence[Any] | None,
    kind: str,
) -> None:
    """Write `fixed` to a new file.

    Args:
        fixed: what `lower` returned.
        contents: its report.
        path: where to.
        example_inputs: one value for each argument of its forward.
        kind: `QDQ` or `QONNX`.

    Raises:
        UsageError: there are no example inputs, a package is not installed, or the file would be
            larger than the format allows.
        UnsupportedModelError: an operation or a grid has no form in ONNX; the message names it.
        CostTableError: a cost table is code, which no file can hold.
    """
    require_onnx()
    if example_inputs is None:
        raise UsageError(
            f"the export to {path.suffix} records the calls of {contents.model} on inputs; give "
            f"it some: cgmq_fx.export(fixed, path, example_inputs=(x,))"
        )
    _, manifest = packed_content(fixed, contents)
    marks = marked(fixed)
    model = marked_program(marks, example_inputs, fixed.plan.settings.batch_axis)
    _WRITERS[kind](model, marks).run()
    _strip(model)
    head = _serialized(model, contents.model)
    file = read_onnx(np.frombuffer(head, np.uint8), FileFault(contents.model))
    _, metadata = described(file, manifest, kind)
    path.write_bytes(head + _metadata_bytes(metadata))


def _strip(model: Any) -> None:
    """Take away what exporters note for themselves, and paths of sources among it."""
    graph = model.graph
    model.producer_name, model.producer_version = "cgmq_fx", version("cgmq-fx")
    del model.metadata_props[:], model.functions[:], graph.value_info[:]
    nodes = (*graph.node, *graph.input, *graph.output, *graph.initializer)
    for item in (graph, *nodes):
        del item.metadata_props[:]
        item.doc_string = ""


def _serialized(model: Any, name: str) -> bytes:
    try:
        found: bytes = model.SerializeToString(deterministic=True)
    except ValueError as error:
        raise UsageError(
            f"{name} takes more than 2 GiB, which no .onnx file can hold by itself ({error}); "
            f"export it to .safetensors, or export parts of the model"
        ) from error
    return found


def _metadata_bytes(metadata: Mapping[str, str]) -> bytes:
    """Return what, appended to a model, adds metadata to it: fields of a message may follow."""
    import onnx

    model = onnx.ModelProto()
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    found: bytes = model.SerializeToString(deterministic=True)
    return found
