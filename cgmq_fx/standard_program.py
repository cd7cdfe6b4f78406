"""A lowered module as a program of `torch.export`, quantized by PyTorch's standard operators."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from cgmq_fx.errors import CgmqError, UnsupportedModelError, UsageError
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.standard_quantization import StandardQuantization
from cgmq_fx.program_json import quantizer_index
from cgmq_fx.standard_modules import StandardQuantizer

_STACK = "nn_module_stack"
#: What torch.export notes of the Python code that a node came from.
_SOURCES = (_STACK, "stack_trace", "source_fn_stack", "torch_fn", "from_node", "custom")
_MAX_TEXT = 2000


def standard_program(
    fixed: LoweredModule,
    example_inputs: Sequence[Any],
    quantizers: Sequence[str],
    spelling: StandardQuantization,
) -> ExportedProgram:
    """Return the program of a lowered module; it names no code that it was made from.

    Weights are constants of integers behind dequantize operators, activations pass a quantize and
    a dequantize operator. The batch is open where the costs are for one sample.

    Args:
        fixed: what `lower` returned.
        example_inputs: one value for each argument of its forward.
        quantizers: paths of the quantizers of activations; the quantize operators of the i-th are
            called ``quantize_<i>``, and ``quantize_<i>_1`` and so on where there are several.
        spelling: how the quantizers are said in operators.

    Raises:
        UnsupportedModelError: torch.export cannot take the module, or not with an open batch.
        UsageError: it is not computed in float32.
    """
    twin = copy.deepcopy(fixed)
    Pipeline((spelling,)).run(twin)
    module = fx.GraphModule(twin, twin.graph, type(fixed).__name__)
    own_storage(module)
    batch_axis = fixed.plan.settings.batch_axis
    program = _exported(module, tuple(example_inputs), batch_axis)
    _name_quantizers(program, module, quantizers)
    for node in program.graph.nodes:
        for key in _SOURCES:
            node.meta.pop(key, None)
    return program


def own_storage(module: nn.Module) -> None:
    """Give every tensor memory of its own, in order and without gaps, as files hold it."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


def _exported(
    module: fx.GraphModule, inputs: tuple[Any, ...], batch_axis: int | None
) -> ExportedProgram:
    given = _two_samples(inputs, batch_axis)
    shapes = pytree.tree_map(lambda leaf: _open_axes(leaf, batch_axis), given)
    try:
        with torch.no_grad():
            return torch.export.export(module, given, dynamic_shapes=shapes, strict=False)
    except CgmqError:
        raise
    except Exception as error:  # torch.export raises whatever the module does
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be exported by torch.export with an open batch along "
            f"axis {batch_axis}: {type(error).__name__}: {str(error)[:_MAX_TEXT]}\nWays out: "
            f"prepare the model with batch_axis=None, which fixes the shapes of the example "
            f"inputs; or export to .safetensors."
        ) from error


def _two_samples(inputs: tuple[Any, ...], batch_axis: int | None) -> tuple[Any, ...]:
    """Return inputs whose batch is not 1, which torch.export would take for a fixed size."""

    def repeat(leaf: Any) -> Any:
        if batch_axis is None or not _has_axis(leaf, batch_axis) or leaf.shape[batch_axis] != 1:
            return leaf
        return torch.cat((leaf, leaf), batch_axis)

    return tuple(pytree.tree_map(repeat, inputs))


def _open_axes(leaf: Any, batch_axis: int | None) -> dict[int, Any] | None:
    if batch_axis is None or not _has_axis(leaf, batch_axis):
        return None
    return {batch_axis: Dim.DYNAMIC}


def _has_axis(leaf: Any, axis: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > axis


def _name_quantizers(
    program: ExportedProgram, module: nn.Module, quantizers: Sequence[str]
) -> None:
    """Name each quantize operator after the quantizer that it stands for."""
    index = {path: place for place, path in enumerate(quantizers)}
    targets = _quantize_targets()
    # First those that may have such a name by chance get another.
    for node in program.graph.nodes:
        if node.op == "call_function" and quantizer_index(node.name) is not None:
            node._rename(f"{node.name}_other")
    for node in program.graph.nodes:
        if node.target in targets:
            path = _path_of(node.meta.get(_STACK, {}), module, index)
            node._rename(f"quantize_{index[path]}")


def _quantize_targets() -> frozenset[Any]:
    ops: Any = torch.ops.quantized_decomposed
    return frozenset({ops.quantize_per_tensor.default, ops.quantize_per_channel.default})


def _path_of(stack: Mapping[str, Any], module: nn.Module, index: Mapping[str, int]) -> str:
    """Return the path of the quantizer that made a node, from the modules that it came through."""
    paths = [entry[0] for entry in stack.values()]
    for path in reversed(paths):
        if path in index and isinstance(module.get_submodule(path), StandardQuantizer):
            return str(path)
    raise UsageError(f"a quantize operator came through {paths}, none of which is a quantizer")
