"""Second front end: an `nn.Module` in, through `torch.export`, the graph form of `trace` out.

A model that Python control flow keeps from symbolic tracing is run once on tensors without data,
once for each mode, and the operations that it calls are recorded. Layers with a mode stay modules,
what differs between the modes picks by the mode, and ATen operations are raised to the functions
that passes know. The batch stays dynamic where the model allows; every assumption of the export
is a guard in the graph.
"""

import copy
import io
import logging
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.align_modes import align_modes, mode_node
from cgmq_fx.passes.closed_layers import ClosedLayers
from cgmq_fx.passes.compare_export import compare_export
from cgmq_fx.passes.export_inputs import (
    PARTS,
    ModelCall,
    add_output,
    is_same_structure,
    with_data,
)
from cgmq_fx.passes.guards import TrainingMode, select_mode
from cgmq_fx.passes.meta import KEPT_CLOSED
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.program_graph import program_graph
from cgmq_fx.passes.raise_aten import RaiseAten
from cgmq_fx.passes.restore_modules import RestoreModules
from cgmq_fx.passes.restored import attributes_restored
from cgmq_fx.passes.scalar_draws import ScalarDraws
from cgmq_fx.passes.shape_guard import (
    InexpressibleGuardError,
    ShapeGuard,
    conditions_of,
    static_shape,
    takes_one_sample,
)
from cgmq_fx.passes.trace import at_user_line, check_names, fast_path_off, graph_module, two_samples
from cgmq_fx.passes.training_mode import TRAINING_MODE


@dataclass(frozen=True)
class Exported:
    """What the front end made of a model.

    Attributes:
        graph_module: the graph, over the modules of the model.
        is_dynamic: the graph takes a batch of any size, one sample too; else it is right for the
            batches that its guard names.
    """

    graph_module: fx.GraphModule
    is_dynamic: bool


def trace_exported(
    model: nn.Module,
    inputs: Sequence[Any],
    batch_axis: int | None = 0,
    reserved: Sequence[str] = (),
    leaves: Collection[str] = (),
) -> Exported:
    """Export `model` into a graph module that holds the same submodules, parameters and buffers.

    Args:
        model: the module, shared with the result, which may add guards and constants to it.
        inputs: one value for each argument of the model's forward, of which shapes and dtypes
            matter. What is not a tensor is taken as it is, and guarded.
        batch_axis: the axis of the inputs that counts samples, left open where the model allows. A
            batch of one is exported as two, so that it decides no branch.
        reserved: names that later passes will give to submodules.
        leaves: paths of submodules that stay closed.

    Raises:
        UnsupportedModelError: the model cannot be exported; the message has the user's file and
            line and the ways out.
    """
    check_names(model, (*reserved, PARTS))
    modes = {module: module.training for module in model.modules()}
    failures: list[Exception] = []
    try:
        for attempt, open_axis in _attempts(inputs, batch_axis):
            try:
                exported = _exported(model, attempt, open_axis, leaves)
                takes_one = exported.is_dynamic and open_axis is not None
                given = inputs if takes_one or open_axis is None else attempt
                compare_export(
                    ModelCall(model, given), exported.graph_module, open_axis if takes_one else None
                )
            except InexpressibleGuardError as error:
                failures.append(error)
            except UnsupportedModelError:
                raise
            except Exception as error:  # torch.export raises whatever the model does
                failures.append(error)
            else:
                return exported
    finally:
        for module, mode in modes.items():
            module.training = mode
    last = failures[-1]
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be exported{at_user_line(last)}: "
        f"{type(last).__name__}: {_first_lines(last)}\nWays out: decide the branch by a concrete "
        f"argument in example_inputs; switch off what skips layers at random (a layer drop of 0); "
        f"or prepare the part of the model that can be exported."
    ) from last


def _attempts(
    inputs: Sequence[Any], batch_axis: int | None
) -> Iterator[tuple[Sequence[Any], int | None]]:
    """Yield inputs and the axis to leave open, the most general way first."""
    if batch_axis is not None:
        yield two_samples(inputs, batch_axis) or inputs, batch_axis
    yield inputs, None


def _exported(
    model: nn.Module, inputs: Sequence[Any], open_axis: int | None, leaves: Collection[str]
) -> Exported:
    mode, call, parts = model.training, ModelCall(model, inputs), nn.Module()
    training = _in_mode(call, parts, open_axis, leaves, training=True)
    evaluation = _in_mode(call, parts, open_axis, leaves, training=False)
    gm = training.graph_module
    alike = is_same_structure(training.output, evaluation.output)
    align_modes(gm.graph, evaluation.graph_module.graph, TRAINING_MODE, same_output=alike)
    guard = _guard(training, evaluation, parts)
    _set_output(training, evaluation, parts, alike=alike)
    if not any(node.target == TRAINING_MODE for node in gm.graph.nodes):
        gm.delete_submodule(TRAINING_MODE)
    gm.train(mode)
    gm.recompile()
    Pipeline([RaiseAten()]).run(gm)
    is_dynamic = guard is None or (
        open_axis is not None and takes_one_sample(guard, call.tensors, open_axis)
    )
    return Exported(gm, is_dynamic)


@dataclass(frozen=True)
class _Mode:
    """The export of one mode.

    Attributes:
        graph_module: its graph; the output is the list of the tensors that the model returns.
        tensors: the nodes of the input tensors.
        examples: these tensors as the program sees them, with symbolic sizes.
        output: what the model returns, with slots for tensors.
        conditions: what the program assumes of sizes, in the terms of `ShapeGuard`.
    """

    graph_module: fx.GraphModule
    tensors: tuple[fx.Node, ...]
    examples: tuple[Tensor, ...]
    output: Any
    conditions: tuple[str, ...]


def _in_mode(
    call: ModelCall,
    parts: nn.Module,
    open_axis: int | None,
    leaves: Collection[str],
    *,
    training: bool,
) -> _Mode:
    call.model.train(training)
    closed = ClosedLayers(call.model, leaves)
    program = _export(call, closed, open_axis)
    graph, tensors = program_graph(program, call, parts)
    root = copy.copy(call.model)
    own = {TRAINING_MODE: TrainingMode(), PARTS: parts}
    root.__dict__["_modules"] = {**call.model._modules, **own}
    gm = graph_module(root, graph)
    Pipeline([RestoreModules(tuple(closed.calls))]).run(gm)
    for node in gm.graph.find_nodes(op="call_module"):
        if node.target in leaves:
            KEPT_CLOSED.set(node, True)
    conditions = [] if open_axis is None else conditions_of(_guards(program))
    return _Mode(gm, tensors, _examples(program), call.returned.structure, tuple(conditions))


def _guards(program: ExportedProgram) -> list[str]:
    guards = getattr(program, "_guards_code", None)
    if guards is None:
        raise InexpressibleGuardError("this version of torch does not tell what it assumed")
    return list(guards)


def _export(call: ModelCall, closed: ClosedLayers, open_axis: int | None) -> ExportedProgram:
    def is_open_axis(tensor: Tensor) -> bool:
        return open_axis is not None and tensor.dim() > open_axis and tensor.shape[open_axis] > 1

    shapes = tuple(
        {open_axis: Dim.AUTO} if is_open_axis(tensor) else None for tensor in call.tensors
    )
    tensors = tuple(with_data(tensor) for tensor in call.tensors)
    with (
        attributes_restored(call.model),
        fast_path_off(),
        closed.recorded(),
        ScalarDraws(),
        _quiet(),
    ):
        return torch.export.export(call, tensors, dynamic_shapes=(shapes,), strict=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from warning, logging and printing: what concerns the user is raised."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.__trace")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), _without_partial_graphs():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_partial_graphs() -> Iterator[None]:
    """Leave out of what is written to stderr the graph that export prints where it fails."""
    written, left_out = io.StringIO(), ""
    try:
        with redirect_stderr(written):
            yield
    except Exception as error:
        left_out = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        text = written.getvalue()
        sys.stderr.write(text.replace(left_out, "") if left_out else text)


def _examples(program: ExportedProgram) -> tuple[Tensor, ...]:
    specs = program.graph_signature.input_specs
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    return tuple(
        node.meta["val"]
        for node, spec in zip(placeholders, specs, strict=True)
        if spec.kind is InputKind.USER_INPUT
    )


def _guard(training: _Mode, evaluation: _Mode, parts: nn.Module) -> ShapeGuard | None:
    """Refuse shapes for which either mode would take another path."""
    if not training.tensors:
        return None
    shapes = [
        tuple(b if a is None else a for a, b in zip(*pair, strict=True))
        for pair in zip(
            map(static_shape, training.examples),
            map(static_shape, evaluation.examples),
            strict=True,
        )
    ]
    conditions = dict.fromkeys((*training.conditions, *evaluation.conditions))
    names = [
        str(node.target) if node.op == "placeholder" else node.name for node in training.tensors
    ]
    guard = ShapeGuard(names, shapes, tuple(conditions))
    parts.add_module("check_shapes", guard)
    graph = training.graph_module.graph
    with graph.inserting_after(max(training.tensors)):
        graph.call_module(f"{PARTS}.check_shapes", training.tensors)
    return guard


def _set_output(training: _Mode, evaluation: _Mode, parts: nn.Module, *, alike: bool) -> None:
    """Give the graph the output of the model in place of the tensors in it."""
    graph = training.graph_module.graph
    output = graph.output_node()
    tensors: Any = output.args[0]
    with graph.inserting_before(output):
        if alike:
            output.args = (add_output(graph, parts, training.output, tensors),)
            return
        ours, theirs = tensors
        picked = (
            mode_node(graph, TRAINING_MODE),
            add_output(graph, parts, training.output, ours),
            add_output(graph, parts, evaluation.output, theirs),
        )
        output.args = (graph.call_function(select_mode, picked),)


def _first_lines(error: Exception) -> str:
    """Return the start of what export says, without the places in its own and our code."""
    noise = ("Caused by:", "For more information")
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return "\n".join([line for line in lines if not line.startswith(noise)][:3])
