"""A lowered graph as an ONNX model in which grids are still marks, by torch's own exporter."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.marked_graph import MarkedGraph

#: First with 4-bit and 16-bit types in QuantizeLinear.
OPSET = 21
BATCH = "batch"
_LEAST_BATCH = 2  # torch.export takes a size of 1 for a constant
_MAX_TEXT = 2000


def require_onnx() -> None:
    """Check that the packages are there.

    Raises:
        UsageError: one is missing.
    """
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError as error:
            raise UsageError(
                f"the export to ONNX needs the package {package}, which is not installed: "
                f"pip install 'cgmq-fx[onnx]'"
            ) from error


def marked_program(graph: MarkedGraph, inputs: Sequence[Any], batch_axis: int | None) -> Any:
    """Return the graph as an ``onnx.ModelProto`` with marks and any batch size.

    Args:
        graph: with marks.
        inputs: what its forward takes; where they hold one sample, it is repeated.
        batch_axis: the axis of the inputs that counts samples; None: their shapes are fixed.

    Raises:
        UnsupportedModelError: an operation has no counterpart in ONNX, or the graph cannot be
            exported; the message names it.
    """
    given = tuple(inputs) if batch_axis is None else _several(tuple(inputs), batch_axis)
    shapes = None if batch_axis is None else _open_batch(given, batch_axis)
    with _quiet():
        try:
            program = torch.export.export(
                graph.module, given, dynamic_shapes=shapes, strict=False
            ).run_decompositions({})
        except Exception as error:
            raise _unsupported(graph, error, "torch.export") from error
        try:
            found = torch.onnx.export(
                program, given, dynamo=True, opset_version=OPSET, verbose=False, optimize=True
            )
        except Exception as error:
            raise _unsupported(graph, error, "torch.onnx.export") from error
        assert found is not None
        model = found.model_proto
    _name_batch(model, batch_axis)
    return model


def _unsupported(graph: MarkedGraph, error: Exception, step: str) -> UnsupportedModelError:
    deepest: BaseException = error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    lines = [str(item).partition("\n")[0] for item in (error, deepest) if str(item)]
    text = ": ".join(dict.fromkeys(lines))[:_MAX_TEXT]
    return UnsupportedModelError(
        f"{type(graph.module).__name__} has no ONNX form: {step} says {text!r}; replace that "
        f"operation by ones that ONNX has, or export to .safetensors, which holds any graph"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters print of themselves away; what fails raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


# -- batch -----------------------------------------------------------------------------------------


def _batch_of(inputs: tuple[Any, ...], axis: int) -> int | None:
    """Return the number of samples: what the first tensor with that axis has along it."""
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim > axis:
            return leaf.shape[axis]
    return None


def _counts(leaf: Any, axis: int, batch: int | None) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == batch


def _several(inputs: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    """Return inputs of more than one sample."""
    batch = _batch_of(inputs, axis)
    if batch is None or batch >= _LEAST_BATCH:
        return inputs

    def repeated(leaf: Any) -> Any:
        if not _counts(leaf, axis, batch):
            return leaf
        return torch.cat([leaf] * _LEAST_BATCH, dim=axis)

    return tuple(pytree.tree_map(repeated, item) for item in inputs)


def _open_batch(inputs: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    batch = _batch_of(inputs, axis)
    return tuple(
        pytree.tree_map(
            lambda leaf: {axis: Dim.DYNAMIC} if _counts(leaf, axis, batch) else None, item
        )
        for item in inputs
    )


def _name_batch(model: Any, axis: int | None) -> None:
    """Call the open size by its name instead of the exporter's symbol."""
    if axis is None:
        return
    shapes = [item.type.tensor_type.shape for item in (*model.graph.input, *model.graph.output)]
    symbols = {
        shape.dim[axis].dim_param
        for shape in shapes[: len(model.graph.input)]
        if len(shape.dim) > axis and shape.dim[axis].dim_param
    }
    for shape in shapes:
        for dim in shape.dim:
            if dim.dim_param in symbols:
                dim.dim_param = BATCH
