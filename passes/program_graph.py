"""An exported program as a graph over the modules, parameters and buffers of its model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.export_inputs import PARTS, ModelCall
from cgmq_fx.passes.meta import EXPORTED, MODULE_PATH, ExportedTensor

#: Name of the submodule of `ModelCall` that holds the model, as parameters are called in a program.
_PREFIX = "model."
_ATEN = torch.ops.aten
# They assert of a tensor what the program itself has made of it.
_DROPPED = frozenset({_ATEN._assert_tensor_metadata.default})
_HIGHER_ORDER = torch.ops.higher_order


def program_graph(
    program: ExportedProgram, call: ModelCall, parts: nn.Module
) -> tuple[fx.Graph, tuple[fx.Node, ...]]:
    """Return the graph of `program` with the placeholders of the model, and its input tensors.

    Parameters and buffers are `get_attr` nodes under their names in the model; constants become
    buffers of `parts` that are not in its state dict. The output is the list of the tensors that
    the model returns.

    Raises:
        UnsupportedModelError: the program holds a kind of input or operation with no counterpart.
    """
    translation = _Translation(program, call, parts)
    return translation.graph, translation.tensors


class _Translation:
    def __init__(self, program: ExportedProgram, call: ModelCall, parts: nn.Module) -> None:
        self.program, self.parts = program, parts
        self.graph = fx.Graph()
        self._attributes: dict[str, fx.Node] = {}
        tensors = call.add_inputs(self.graph, parts)
        self.tensors = tuple(tensors)
        env = self._sources(tensors)
        results = self._inline(program.graph_module, env)
        outputs = []
        for spec, value in zip(program.graph_signature.output_specs, results, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                outputs.append(value)
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                target = self._attribute(_own_name(str(spec.target)))
                self.graph.call_function(_ATEN.copy_.default, (target, value))
            else:
                raise _unsupported(f"an output of the kind {spec.kind.name}")
        self.graph.output(outputs)

    def _sources(self, tensors: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        placeholders = [n for n in self.program.graph.nodes if n.op == "placeholder"]
        specs = self.program.graph_signature.input_specs
        given = iter(tensors)
        env: dict[fx.Node, Any] = {}
        for node, spec in zip(placeholders, specs, strict=True):
            match spec.kind:
                case InputKind.USER_INPUT:
                    env[node] = next(given)
                    _describe(env[node], node)
                case InputKind.PARAMETER | InputKind.BUFFER:
                    env[node] = self._attribute(_own_name(str(spec.target)), node)
                case InputKind.CONSTANT_TENSOR:
                    value = self.program.constants[str(spec.target)]
                    env[node] = self._attribute(self._constant(value), node)
                case _:
                    raise _unsupported(f"an input of the kind {spec.kind.name}")
        return env

    def _attribute(self, name: str, source: fx.Node | None = None) -> fx.Node:
        if name not in self._attributes:
            last = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
            if last is None:
                self._attributes[name] = self.graph.get_attr(name)
            else:
                with self.graph.inserting_before(last):
                    self._attributes[name] = self.graph.get_attr(name)
            if source is not None:
                _describe(self._attributes[name], source)
        return self._attributes[name]

    def _constant(self, value: Tensor) -> str:
        """Return the name of a part that holds `value`; equal ones are one."""
        count = 0
        while hasattr(self.parts, f"constant_{count}"):
            held = getattr(self.parts, f"constant_{count}")
            same = isinstance(held, Tensor) and held.dtype == value.dtype
            if same and held.shape == value.shape and torch.equal(held, value):
                break
            count += 1
        else:
            buffer = value.detach().clone()
            self.parts.register_buffer(f"constant_{count}", buffer, persistent=False)
        return f"{PARTS}.constant_{count}"

    # -- operations ------------------------------------------------------------------------------

    def _inline(self, module: fx.GraphModule, env: dict[fx.Node, Any]) -> Sequence[Any]:
        """Add what `module` computes; `env` has the values of its placeholders."""
        for node in module.graph.nodes:
            if node.op == "placeholder" or node.target in _DROPPED:
                continue
            if node.op == "output":
                results = _translated(node.args[0], env)
                return results if isinstance(results, list | tuple) else (results,)
            if node.op == "get_attr":
                env[node] = self._member(module, str(node.target))
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                env[node] = self._region(node, env)
            else:
                env[node] = self._call(node, env)
        return ()

    def _member(self, module: fx.GraphModule, target: str) -> Any:
        value: Any = module
        for part in target.split("."):
            value = getattr(value, part)
        return self._attribute(self._constant(value)) if isinstance(value, Tensor) else value

    def _call(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = _translated((node.args, node.kwargs), env)
        if _is_item(node) and not isinstance(args[0], fx.Node):
            return args[0][args[1]]  # an item of what an inlined region returned
        assert callable(node.target)
        copied = self.graph.call_function(node.target, args, kwargs)
        path = _module_path(node)
        if path:
            MODULE_PATH.set(copied, path)
        _describe(copied, node)
        return copied

    def _region(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Inline a region that runs under another setting of autograd or autocast."""
        args = _translated(node.args, env)
        if node.target is _HIGHER_ORDER.wrap_with_set_grad_enabled:
            enabled, region, *operands = args
            results = self._inline(region, _bound(region, operands))
            return results if enabled else [self._detached(value) for value in results]
        if node.target is _HIGHER_ORDER.wrap_with_autocast:
            _, _, enabled, _, region, *operands = args
            if not enabled:
                return self._inline(region, _bound(region, operands))
        raise _unsupported(f"the operation '{node.target}'")

    def _detached(self, value: Any) -> Any:
        """Cut the gradient, as the region without gradients does."""
        if not isinstance(value, fx.Node) or not EXPORTED.has(value):
            return value
        detached = self.graph.call_function(_ATEN.detach.default, (value,))
        EXPORTED.set(detached, EXPORTED.get(value))
        return detached


def _translated(value: Any, env: Mapping[fx.Node, Any]) -> Any:
    return fx.node.map_arg(value, env.__getitem__)


def _bound(region: fx.GraphModule, operands: Sequence[Any]) -> dict[fx.Node, Any]:
    placeholders = [node for node in region.graph.nodes if node.op == "placeholder"]
    return dict(zip(placeholders, operands, strict=True))


def _own_name(target: str) -> str:
    return target.removeprefix(_PREFIX)


def _is_item(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _describe(node: fx.Node, source: fx.Node) -> None:
    value = source.meta.get("val")
    if isinstance(value, Tensor):
        EXPORTED.set(node, ExportedTensor(value.dim(), value.dtype, value.device))


def _module_path(node: fx.Node) -> str:
    """Return the path of the innermost module of the model in which `node` was called."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0].partition("@")[0]
    return path.removeprefix(_PREFIX) if path.startswith(_PREFIX) else ""


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the exported model holds {what}, which has no place in a graph of torch.fx; move that "
        f"part of the model out of what you prepare, or use front_end='fx' where tracing works"
    )
