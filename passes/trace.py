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
from typing import Any

import torch
from torch import fx, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.guards import TrainingMode
from cgmq_fx.passes.merge_modes import merge_modes
from cgmq_fx.passes.tracer import TRAINING_MODE, ModelTracer, is_library
from cgmq_fx.passes.values import ValueEvaluator, fake_mode


def trace(
    model: nn.Module,
    inputs: Sequence[Any] | None = None,
    batch_axis: int | None = 0,
    reserved: Sequence[str] = (),
) -> fx.GraphModule:
    """Trace `model` into a graph module that holds the same submodules, parameters and buffers.

    Args:
        model: the module; where the graph reads the mode, it gains a submodule `TRAINING_MODE`. It
            is shared with the result.
        inputs: one value for each argument of the model's forward, of which shapes and dtypes
            matter; None when they are not known. What is not a tensor is taken as it is, and
            guarded.
        batch_axis: the axis of the inputs that counts samples. A branch must not be decided by a
            batch of one, so it is traced as a batch of two where the model allows.
        reserved: names that later passes will give to submodules.

    Raises:
        UnsupportedModelError: the model cannot be traced; the message has the user's file and line
            and the ways out.
    """
    _check_names(model, reserved)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        try:
            shapes = two_samples(inputs, batch_axis)
            tracer, graph = _trace_once(model, shapes, training=False)
        except UnsupportedModelError:
            shapes = inputs
            tracer, graph = _trace_once(model, shapes, training=False)
        if tracer.branched_on_mode:
            _, in_training = _trace_once(model, shapes, training=True)
            graph = merge_modes(graph, in_training, TRAINING_MODE, tracer.branched_on_mode)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if any(node.target == TRAINING_MODE for node in graph.nodes):
        # Added last: a model that walks over its children would call it.
        flag = TrainingMode()
        flag.training = model.training
        model.add_module(TRAINING_MODE, flag)
    gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    gm._modules.update(model._modules)
    gm._parameters.update(model._parameters)
    gm._buffers.update(model._buffers)
    gm._non_persistent_buffers_set |= model._non_persistent_buffers_set
    return gm


def two_samples(inputs: Sequence[Any] | None, batch_axis: int | None) -> Sequence[Any] | None:
    """Return `inputs` with a batch of one repeated, on tensors without data."""
    if inputs is None or batch_axis is None:
        return inputs
    mode = fake_mode()

    def repeat(value: Any) -> Any:
        if (
            isinstance(value, torch.Tensor)
            and value.dim() > batch_axis
            and value.shape[batch_axis] == 1
        ):
            shape = list(value.shape)
            shape[batch_axis] = 2
            with mode:
                return torch.empty(shape, dtype=value.dtype, device=value.device)
        return value

    return [repeat(value) for value in inputs]


def _check_names(model: nn.Module, reserved: Sequence[str]) -> None:
    taken = {*vars(fx.GraphModule), "graph", "code", "meta", TRAINING_MODE, *reserved}
    clashes = sorted(
        name for name in (*model._modules, *model._parameters, *model._buffers) if name in taken
    )
    if clashes:
        raise UnsupportedModelError(
            f"{type(model).__name__} has attributes {clashes}, names that a prepared graph uses "
            f"itself; rename them, or wrap the model in a module that holds it as 'model'"
        )


def _trace_once(
    model: nn.Module, inputs: Sequence[Any] | None, *, training: bool
) -> tuple[ModelTracer, fx.Graph]:
    evaluator = None
    if inputs is not None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        evaluator = ValueEvaluator(dict(zip(names, inputs, strict=False)))
    tracer = ModelTracer(evaluator, training)
    try:
        with _fast_path_off():
            return tracer, tracer.trace(model)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be traced at {_user_line(error)}: "
            f"{type(error).__name__}: {error}\nWays out: give prepare example_inputs=(...) so that "
            f"shapes decide branches; move the code into a function marked with torch.fx.wrap, "
            f"which then stays one operation; or prepare the traceable part of the model alone."
        ) from error


def _user_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not is_library(frame.filename):
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    last = frames[-1]
    return f"{last.filename}:{last.lineno}"


@contextmanager
def _fast_path_off() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
