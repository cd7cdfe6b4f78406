"""A lowered module as a program of ExecuTorch, with all that XNNPACK takes delegated to it."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils import _pytree as pytree

from cgmq_fx.errors import CgmqError, UnsupportedModelError, UsageError
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.packed_file import CODES
from cgmq_fx.passes.drop_rectifiers import DropRectifiers
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.repeat_quantizers import RepeatQuantizers
from cgmq_fx.passes.xnnpack_quantization import XnnpackQuantization
from cgmq_fx.standard_program import own_storage

_DEQUANTIZE = "quantized_decomposed.dequantize_per_channel.default"
_MAX_TEXT = 2000


def require_executorch() -> None:
    """Check that the package is there.

    Raises:
        UsageError: it is not.
    """
    try:
        with _quiet():
            import executorch.exir  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "the export to .pte needs the package executorch, which is not installed: "
            "pip install 'cgmq-fx[executorch]'"
        ) from error


def executorch_program(fixed: LoweredModule, inputs: Sequence[Any]) -> bytes:
    """Return the program of a lowered module, as ExecuTorch writes it, after it ran once.

    Its batch is any size from 1 to that of the inputs, where costs are for one sample.

    Args:
        fixed: what `lower` returned.
        inputs: one value for each argument of its forward.

    Raises:
        UnsupportedModelError: torch.export or ExecuTorch cannot take the module, or has no kernel
            for an operation.
        UsageError: it is not computed in float32.
    """
    values: frozenset[str] = frozenset()
    careful = False
    with _quiet():
        while True:
            program = _exported(fixed, tuple(inputs), values)
            try:
                edge = _delegated(program, careful=careful)
                left = _left_weights(edge) - values
                if not left:
                    found = bytes(edge.to_executorch().buffer)
                    _run(found, inputs)
                    return found
            except Exception as error:  # ExecuTorch raises whatever its parts do
                if careful:
                    raise _unsupported(fixed, error, "ExecuTorch") from error
                careful = True
                continue
            # XNNPACK computes these operations otherwise than in int8, or not at all.
            values |= left


def _exported(
    fixed: LoweredModule, inputs: tuple[Any, ...], values: frozenset[str]
) -> torch.export.ExportedProgram:
    twin = copy.deepcopy(fixed)
    prepared = (RepeatQuantizers(), DropRectifiers(), RepeatQuantizers())
    Pipeline((*prepared, XnnpackQuantization(values))).run(twin)
    module = fx.GraphModule(twin, twin.graph, type(fixed).__name__)
    own_storage(module)
    shapes = _open_batch(inputs, fixed.plan.settings.batch_axis)
    try:
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    except CgmqError:
        raise
    except Exception as error:  # torch.export raises whatever the module does
        raise _unsupported(fixed, error, "torch.export") from error
    _repeat_dequantize(program.graph)
    return program


def _repeat_dequantize(graph: fx.Graph) -> None:
    """Give every reader of codes a dequantize operator of its own.

    XNNPACK's partitioner takes one for a part of an int8 layer, and with it all that it goes to.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or "quantized_decomposed.dequantize" not in str(node.target):
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.node_copy(node))


def _open_batch(inputs: tuple[Any, ...], axis: int | None) -> Any:
    """Return which axes of the inputs may be shorter; None where their shapes are fixed."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    batch = next((leaf.shape[axis] for leaf in tensors if axis is not None and leaf.ndim > axis), 1)
    if axis is None or batch < 2:
        return None
    size = Dim("batch", min=1, max=batch)

    def open_axis(leaf: Any) -> dict[int, Any] | None:
        counts = isinstance(leaf, Tensor) and leaf.ndim > axis and leaf.shape[axis] == batch
        return {axis: size} if counts else None

    return tuple(pytree.tree_map(open_axis, item) for item in inputs)


def _delegated(program: torch.export.ExportedProgram, *, careful: bool) -> Any:
    """Return the program in ExecuTorch's dialect, with parts for XNNPACK; see `_configurations`."""
    # The kernels for what XNNPACK does not take are registered by this import.
    import executorch.kernels.quantized  # noqa: F401
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    partitioner = XnnpackPartitioner(configs=_configurations(careful=careful))
    return to_edge_transform_and_lower(program, partitioner=[partitioner])


def _configurations(*, careful: bool) -> list[Any]:
    """Return what XNNPACK may take: of quantize and dequantize operators those of int8 alone.

    Its own configurations take any, and compute wrong numbers or fail. Batch norms that are left
    are not taken: XNNPACK would fold them into weights, off their grids. Where `careful`, float
    layers that read codes are not either: its passes over convolutions of one dimension and over
    padding take some for int8 layers, and fail.
    """
    from executorch.backends.xnnpack.partition import config
    from executorch.backends.xnnpack.partition.config.gemm_configs import GEMMConfig

    def narrowed(kind: Any) -> Any:
        class Narrowed(kind):  # type: ignore[misc]
            def check_constraints(self, node: fx.Node, ep: Any) -> bool:
                is_mixed = careful and isinstance(self, GEMMConfig) and _reads_codes(node)
                if _is_foreign(node) or is_mixed:
                    return False
                return bool(super().check_constraints(node, ep))

            def get_partition(self, node: fx.Node, ep: Any) -> list[fx.Node]:
                if isinstance(self, GEMMConfig) or not _touches_foreign(node):
                    return list(super().get_partition(node, ep))
                return [node]

        return Narrowed

    kinds = (kind for kind in config.ALL_PARTITIONER_CONFIGS if kind is not config.BatchNormConfig)
    return [narrowed(kind) for kind in kinds]


def _reads_codes(layer: fx.Node) -> bool:
    """Tell whether a layer with a float weight reads codes, padded or not."""
    inputs = [*layer.all_input_nodes]
    inputs += [item.all_input_nodes[0] for item in inputs if "constant_pad" in str(item.target)]
    reads = any("dequantize_per_tensor" in str(item.target) for item in inputs)
    return reads and not any("dequantize_per_channel" in str(item.target) for item in inputs)


def _touches_foreign(node: fx.Node) -> bool:
    """Tell whether codes that XNNPACK has no type for stand before a node, or behind it.

    An activation may stand between the two.
    """
    behind = [*node.users, *(user for users in node.users for user in users.users)]
    return any(map(_is_foreign, (*node.all_input_nodes, *behind)))


def _is_foreign(node: fx.Node) -> bool:
    """Tell whether a node makes or reads codes that XNNPACK has no type for."""
    name = str(node.target)
    if node.op != "call_function" or "quantized_decomposed" not in name:
        return False
    return "per_channel" in name or torch.int8 not in node.args


def _run(program: bytes, inputs: Sequence[Any]) -> None:
    """Run a program once: ExecuTorch has no kernels for some operators, and finds it out then."""
    from executorch.runtime import Runtime

    leaves = pytree.tree_leaves(tuple(inputs))
    given = [leaf.contiguous() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    loaded = Runtime.get().load_program(program)  # a method does not keep it
    loaded.load_method("forward").execute(given)


def _left_weights(edge: Any) -> frozenset[str]:
    """Return the paths of integer weights that XNNPACK did not take."""
    program = edge.exported_program()
    buffers = program.graph_signature.inputs_to_buffers
    found = (
        buffers[node.args[0].name]
        for node in program.graph.nodes
        if node.op == "call_function" and _DEQUANTIZE in str(node.target)
        if node.args[0].name in buffers
    )
    return frozenset(name.removesuffix(CODES) for name in found if name.endswith(CODES))


def _unsupported(fixed: LoweredModule, error: Exception, step: str) -> UnsupportedModelError:
    deepest: BaseException = error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    texts = dict.fromkeys(f"{type(item).__name__}: {item}" for item in (error, deepest))
    return UnsupportedModelError(
        f"{type(fixed).__name__} has no form in ExecuTorch: {step} says "
        f"{'; '.join(texts)[:_MAX_TEXT]}\n"
        f"Ways out: example inputs of one sample, or batch_axis=None "
        f"in prepare, which fix the shapes; other operations; or the export to .safetensors, which "
        f"holds any graph."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the packages print of themselves away; what fails raises."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
