"""Front end: an `nn.Module` in, a `torch.fx.GraphModule` with the same numbers out.

Beyond `torch.fx.symbolic_trace`:
  * In-place operators stay in place.
  * ``self.training`` is read while the graph runs, so that `train()` and `eval()` keep their
    meaning. A parameterless module that branches on it (a drop-path) stays a module.
  * With example inputs, a branch on a shape is decided by it, and the graph guards the decision.
  * A Python function marked with `torch.fx.wrap` is opened when its body can be traced.
  * A layer of torch.nn is one node; a composite of torch.nn (a transformer layer) is opened.
"""

import inspect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.merge_modes import merge_modes
from cgmq_fx.passes.recording import ConstantWrittenError
from cgmq_fx.passes.trace_options import TraceOptions
from cgmq_fx.passes.tracer import ModelTracer
from cgmq_fx.passes.training_mode import TRAINING_MODE, add_mode, add_modes, guard_modes
from cgmq_fx.passes.user_code import is_library
from cgmq_fx.passes.value_evaluator import ValueEvaluator
from cgmq_fx.passes.values import fake_mode, map_tensors


def trace(
    model: nn.Module,
    inputs: Sequence[Any] | None = None,
    batch_axis: int | None = 0,
    reserved: Sequence[str] = (),
    options: TraceOptions | None = None,
) -> fx.GraphModule:
    """Trace `model` into a graph module that holds the same submodules, parameters and buffers.

    Args:
        model: the module; where the graph reads the mode of a submodule, that gains a submodule
            `TRAINING_MODE`. It is shared with the result.
        inputs: one value for each argument of the model's forward, of which shapes and dtypes
            matter; None when they are not known. What is not a tensor is taken as it is, and
            guarded.
        batch_axis: the axis of the inputs that counts samples. A branch must not be decided by a
            batch of one, so it is traced as a batch of two where the model allows.
        reserved: names that later passes will give to submodules.
        options: what stays closed, and which arguments are fixed.

    Raises:
        UnsupportedModelError: the model cannot be traced; the message has the user's file and line
            and the ways out.
    """
    options = options or TraceOptions()
    check_names(model, reserved)
    _check_not_scripted(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        try:
            shapes = two_samples(inputs, batch_axis)
            tracer, graph = _trace_once(model, shapes, options, training=False)
        except UnsupportedModelError:
            shapes = inputs
            tracer, graph = _trace_once(model, shapes, options, training=False)
        if tracer.branched_on_mode:
            _, in_training = _trace_once(model, shapes, tracer.options, training=True)
            add_mode(model, "")
            for branch in (graph, in_training):
                add_modes(model, branch)
            places = list(tracer.branched_on_mode.values())
            graph = merge_modes(graph, in_training, TRAINING_MODE, places, model)
            guard_modes(graph, tracer.branched_on_mode)
    finally:
        for module, mode in modes.items():
            module.training = mode
    # Added last: a model that walks over its children would call them.
    add_modes(model, graph)
    return graph_module(model, graph)


def graph_module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return `graph` as a module that shares all submodules and tensors of `model`."""
    gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    adopt(gm, model)
    # A constant that the forward makes is in no checkpoint of the model.
    gm._non_persistent_buffers_set |= gm._buffers.keys() - model._buffers.keys()
    return gm


def adopt(gm: fx.GraphModule, root: nn.Module) -> None:
    """Give `gm` the submodules and tensors of `root`, in the order that they have there."""
    for kind in ("_modules", "_parameters", "_buffers"):
        held, given = getattr(gm, kind), getattr(root, kind)
        own = {name: value for name, value in held.items() if name not in given}
        held.clear()
        held.update({**given, **own})
    gm._non_persistent_buffers_set |= root._non_persistent_buffers_set


def two_samples(inputs: Sequence[Any] | None, batch_axis: int | None) -> Sequence[Any] | None:
    """Return `inputs` with a batch of one repeated, on tensors without data."""
    if inputs is None or batch_axis is None:
        return inputs
    mode = fake_mode()

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() > batch_axis and tensor.shape[batch_axis] == 1:
            shape = list(tensor.shape)
            shape[batch_axis] = 2
            with mode:
                return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        return tensor

    return map_tensors(repeat, inputs)


def check_names(model: nn.Module, reserved: Sequence[str]) -> None:
    """Refuse a model whose attributes have names that a prepared graph uses itself."""
    taken = {*vars(fx.GraphModule), "graph", "code", "meta", TRAINING_MODE, *reserved}
    clashes = sorted(
        name for name in (*model._modules, *model._parameters, *model._buffers) if name in taken
    )
    if clashes:
        raise UnsupportedModelError(
            f"{type(model).__name__} has attributes {clashes}, names that a prepared graph uses "
            f"itself; rename them, or wrap the model in a module that holds it as 'model'"
        )


def _check_not_scripted(model: nn.Module) -> None:
    scripted = [path for path, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds scripted modules {scripted[:4]}, whose copies get no "
            f"gradients; give prepare the model before torch.jit.script"
        )


def _trace_once(
    model: nn.Module, inputs: Sequence[Any] | None, options: TraceOptions, *, training: bool
) -> tuple[ModelTracer, fx.Graph]:
    evaluator = None
    if inputs is not None:
        names = list(inspect.signature(model.forward).parameters)
        evaluator = ValueEvaluator(dict(zip(names, inputs, strict=False)))
    tracer = ModelTracer(evaluator, training, options)
    try:
        with fast_path_off():
            return tracer, tracer.trace(model)
    except UnsupportedModelError:
        raise
    except Exception as error:
        if isinstance(error, ConstantWrittenError) and not options.creations:
            return _trace_once(model, inputs, replace(options, creations=True), training=training)
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced{at_user_line(error)}: "
            f"{type(error).__name__}: {error}\n"
            f"{_ways_out(_layer_of(error, model), _largest_part(model), inputs is not None)}"
        ) from error


def _ways_out(layer: str, part: str, has_inputs: bool) -> str:
    """Return what a user can do about code that cannot be traced."""
    ways = [
        "give prepare example_inputs=(...), so that shapes decide" if not has_inputs else "",
        f"keep a layer closed, in float and priced at 32 bits: prepare(leaf_modules=[{layer}])",
        "fix an argument that is no tensor: prepare(concrete_args={'name': value})",
        "mark a function of the module with torch.fx.wrap, so that it stays one operation",
        "trace with torch.export: prepare(front_end='export')",
        f"prepare a part that can be traced alone, such as prepare(model.{part}, ...)" * bool(part),
    ]
    return "Ways out: " + ";\n  ".join(filter(None, ways)) + "."


def _largest_part(model: nn.Module) -> str:
    """Return the name of the child with the most parameters."""
    sizes = {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in model.named_children()
    }
    return max(sizes, key=sizes.__getitem__, default="")


def _layer_of(error: BaseException, model: nn.Module) -> str:
    """Return the path of the innermost submodule in which `error` was raised, as source."""
    paths = {id(module): path for path, module in model.named_modules() if path}
    found = "'...'"
    trail = error.__traceback__
    while trail is not None:
        owner = trail.tb_frame.f_locals.get("self")
        found = repr(paths[id(owner)]) if id(owner) in paths else found
        trail = trail.tb_next
    return found


def at_user_line(error: BaseException) -> str:
    """Return " at " and the line of the user's code from which `error` came, or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not is_library(frame.filename):
            return f" at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return ""


@contextmanager
def fast_path_off() -> Iterator[None]:
    """Take the way of training through attention layers: the fused one cannot be recorded."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
