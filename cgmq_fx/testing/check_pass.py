"""`check_pass`: the laws of a graph pass, ours or not."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cgmq_fx.errors import PassError, UsageError
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.passes.base import GraphPass, Numerics
from cgmq_fx.passes.pipeline import run_pass
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.testing.case import Case
from cgmq_fx.testing.compare import (
    REASSOCIATION,
    output_faults,
    persistent,
    run,
    tensor_fault,
    tensors_of,
)
from cgmq_fx.testing.law_error import require
from cgmq_fx.testing.pass_laws import (
    AnyPass,
    Applied,
    Literals,
    apply,
    duplicate_faults,
    name_of,
    placeholders,
    settings_faults,
    signature_faults,
    state_faults,
    well_formed_faults,
)
from cgmq_fx.testing.picture import Picture, annotation_faults, annotations, is_frozen

_TOLERANCE = {Numerics.EXACT: 0.0, Numerics.REASSOCIATED: REASSOCIATION}


def check_pass(
    pass_: AnyPass,
    case: Case | tuple[fx.GraphModule, Any] | fx.GraphModule,
    *,
    numerics: Numerics | None = None,
    inputs: Any = None,
    before: Sequence[GraphPass] = (),
    training: bool | None = None,
) -> None:
    """Hold a graph pass to its laws on one case.

    The laws: the result runs, passes lint, and its code is that of its graph; placeholders and
    output structure stay; a flag, where the pass reports one, says whether something changed; a
    second run changes nothing; the numbers are as promised; tensors that stay are the same, tied as
    they were, none stored twice; modules and calls that stay keep their hyperparameters and literal
    arguments; deep copies and what they were made of do not change each other; what the pass
    annotates (`GraphPass.provides`) cannot be changed in place.

    Args:
        pass_: a `GraphPass`, or a function that takes a graph module and returns it, another one,
            None, whether it changed something, ``(graph_module, changed)`` or a `PassResult`.
        case: what `cgmq_fx.testing.graph_modules` draws, or ``(graph_module, inputs)``.
        numerics: the promise. By default what a `GraphPass` says of itself; of a function,
            `Numerics.REASSOCIATED`.
        inputs: other inputs than those of the case.
        before: passes to run first, such as the analyses that `pass_` requires.
        training: run the pass on a module in training mode, and hold the numbers there too, with
            gradients and statistics, beside those in evaluation. By default where the promise is
            `Numerics.EXACT`.

    Raises:
        LawError: a law is broken.
        UsageError: `case` or what the pass returned is none.
    """
    found = _as_case(case, inputs)
    own = pass_.numerics if isinstance(pass_, GraphPass) else Numerics.REASSOCIATED
    promise = own if numerics is None else numerics
    trains = promise is Numerics.EXACT if training is None else training
    modes = (False, True) if trains else (False,)
    bench = _Bench(pass_, found, promise, modes, tuple(before), inputs)
    _check_run(bench)
    _check_copy(bench)


def _as_case(case: Any, inputs: Any) -> Case:
    if isinstance(case, Case):
        return case
    if isinstance(case, fx.GraphModule) and inputs is not None:
        return Case.of(case, inputs)
    if isinstance(case, tuple) and len(case) == 2 and isinstance(case[0], fx.GraphModule):
        return Case.of(*case)
    raise UsageError(
        f"case is {type(case).__name__}; give a Case, (graph_module, inputs), or a GraphModule "
        f"with inputs=..."
    )


@dataclass(frozen=True)
class _Bench:
    """A pass, what it promises, and where it is tried."""

    pass_: AnyPass
    case: Case
    numerics: Numerics
    modes: tuple[bool, ...]
    before: tuple[GraphPass, ...]
    own_inputs: Any

    def graph(self) -> fx.GraphModule:
        """Return the graph module afresh, with everything done that the pass requires."""
        gm = self.case.graph_module().train(self.modes[-1])
        for pass_ in self.before:
            run_pass(pass_, gm)
        return gm

    def apply(self, gm: fx.GraphModule) -> Applied:
        """Run the pass; a broken contract that its runner sees is a fault like any other."""
        try:
            return apply(self.pass_, gm)
        except PassError as error:
            self.require("contract", iter([str(error)]))
            raise

    def restore(self, gm: fx.GraphModule) -> None:
        """Run the analyses again that the pass needs and invalidated."""
        for pass_ in self.before:
            if pass_.provides:
                run_pass(pass_, gm)

    def require(self, law: str, faults: Iterator[str]) -> None:
        """Raise where there are faults."""
        require(law, name_of(self.pass_), faults, self.case.source)

    def run(self, gm: fx.GraphModule, known: frozenset[str], *, training: bool) -> "_Outcome":
        """Run a copy; quantizers that are not `known` were inserted and are exact at 32 bits."""
        twin = copy.deepcopy(gm)
        for name, module in twin.named_modules():
            if isinstance(module, Quantizer) and name not in known:
                module.set_bit_width(FLOAT_WIDTH)
        given = self.case.inputs() if self.own_inputs is None else _tuple(self.own_inputs)
        outputs, after = run(twin, given, self.case.kwargs(), training=training, gradients=training)
        failed = _backward(outputs) if training else ""
        return _Outcome(outputs, after, twin, failed)

    def run_result(self, gm: fx.GraphModule, known: frozenset[str]) -> list["_Outcome"]:
        """Run what a pass made in every mode; that it fails is a fault of the pass."""
        try:
            return [self.run(gm, known, training=mode) for mode in self.modes]
        except Exception as error:  # whatever a broken module raises
            self.require("runs", iter([f"the result fails: {type(error).__name__}: {error}"]))
            raise


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


@dataclass(frozen=True)
class _Outcome:
    """What a run gave.

    Attributes:
        outputs: of the module.
        inputs: what became of them.
        module: with its gradients and statistics afterwards.
        failed: why there are no gradients, as where the model overwrites what they need.
    """

    outputs: Any
    inputs: Any
    module: fx.GraphModule
    failed: str

    def faults(self, other: "_Outcome", tolerance: float) -> Iterator[str]:
        """Yield what is different in `other`."""
        yield from output_faults(self.outputs, other.outputs, tolerance)
        for fault in output_faults(self.inputs, other.inputs, tolerance):
            yield f"in what became of the inputs: {fault}"
        if other.failed and not self.failed:
            yield f"the backward pass fails: {other.failed}"
        now = dict(other.module.named_parameters())
        for name, parameter in self.module.named_parameters():
            if name in now and not self.failed:
                text = tensor_fault(parameter.grad, now[name].grad, tolerance)
                yield from [f"the gradient of '{name}' {text}"] if text else []
        buffers = dict(other.module.named_buffers())
        for name, buffer in self.module.named_buffers():
            if name in buffers:
                text = tensor_fault(buffer, buffers[name], tolerance)
                yield from [f"the buffer '{name}', afterwards, {text}"] if text else []


def _backward(outputs: Any) -> str:
    """Run a backward pass; return why it failed, or ""."""
    tensors = tensors_of(outputs)
    losses = [t.float().square().sum() for t in tensors if t.requires_grad and not t.is_complex()]
    try:
        if losses:
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return str(error)
    return ""


def _check_run(bench: _Bench) -> None:
    gm = bench.graph()
    twin = copy.deepcopy(gm)
    known = frozenset(name for name, m in gm.named_modules() if isinstance(m, Quantizer))
    was, twin_was, notes = Picture.of(gm), Picture.of(twin), annotations(twin)
    literals, inputs = Literals.in_(gm.graph), placeholders(gm.graph)
    wanted = bench.run(gm, known, training=False)

    applied = bench.apply(gm)

    after, now = applied.gm, Picture.of(applied.gm)
    bench.require("well-formed", well_formed_faults(after))
    if placeholders(after.graph) != inputs:
        bench.require("signature", signature_faults(inputs, after.graph, None, None))
    bench.require("truthful flag", _flag_faults(applied, was, now))
    bench.require("settings", settings_faults(was, now))
    bench.require("literals", literals.faults(after.graph))
    read = {
        str(node.target) for node in after.graph.nodes if node.op in ("get_attr", "call_module")
    }
    bench.require("state", state_faults(was, now, read, bench.numerics))
    bench.require("stored once", duplicate_faults(was, now))
    found = bench.run_result(after, known)
    outputs = (wanted.outputs, found[0].outputs)
    bench.require("signature", signature_faults(inputs, after.graph, *outputs))
    bench.require("numerics", persistent(lambda: _number_faults(bench, twin, after, known)))
    bench.require("deep copies", _copy_faults(twin, twin_was, notes))
    bench.require("frozen annotations", _thaw_faults(bench.pass_, after))
    _check_second_run(bench, after, now, known)


def _flag_faults(applied: Applied, was: Picture, now: Picture) -> Iterator[str]:
    changes = list(was.changes(now))
    if applied.flag is True and not changes:
        yield "it says that it changed the graph, and nothing is different"
    elif applied.flag is False and changes:
        yield from (f"it says that it changed nothing: {change}" for change in changes)


def _number_faults(
    bench: _Bench, before: fx.GraphModule, after: fx.GraphModule, known: frozenset[str]
) -> Iterator[str]:
    if bench.numerics is Numerics.CHANGES:
        return
    for mode in bench.modes:
        old, new = (bench.run(gm, known, training=mode) for gm in (before, after))
        where = "in training" if mode else "in evaluation"
        faults = old.faults(new, _TOLERANCE[bench.numerics])
        yield from (f"{where}: {fault}" for fault in faults)


def _copy_faults(
    twin: fx.GraphModule, was: Picture, notes: dict[str, dict[str, object]]
) -> Iterator[str]:
    for change in (*was.changes(Picture.of(twin)), *annotation_faults(notes, annotations(twin))):
        yield f"run on one graph module, it changed a deep copy of it: {change}"


def _thaw_faults(pass_: AnyPass, gm: fx.GraphModule) -> Iterator[str]:
    for key in getattr(pass_, "provides", ()):
        for node in gm.graph.nodes:
            value = key.find(node)
            if not is_frozen(value):
                yield (
                    f"'{node.format_node()}': meta['{key.key}'] is {value!r}, which can be changed "
                    f"in place, and deep copies of the graph share it; write a frozen value"
                )


def _check_second_run(
    bench: _Bench, gm: fx.GraphModule, once: Picture, known: frozenset[str]
) -> None:
    if once.nodes and bench.before:
        bench.restore(gm)
    twin = copy.deepcopy(gm)
    twin_was, notes = Picture.of(twin), annotations(twin)
    results = bench.run_result(gm, known)
    again = bench.apply(gm)
    bench.require("idempotent", _again_faults(again, once))
    bench.require("well-formed", well_formed_faults(again.gm))
    if again.gm is not gm and bench.numerics is not Numerics.CHANGES:
        for result, found in zip(results, bench.run_result(again.gm, known), strict=True):
            bench.require("idempotent", result.faults(found, 0.0))
    bench.require("deep copies", _copy_faults(twin, twin_was, notes))


def _again_faults(again: Applied, once: Picture) -> Iterator[str]:
    if again.flag is True:
        yield "run again right away, it says that it changed the graph"
    for change in once.changes(Picture.of(again.gm)):
        yield f"run again right away, it changes the graph: {change}"


def _check_copy(bench: _Bench) -> None:
    """Run the pass on a deep copy: what that was made of must stay, and both results be alike."""
    gm = bench.graph()
    was, notes = Picture.of(gm), annotations(gm)
    twin = copy.deepcopy(gm)
    on_copy = Picture.of(bench.apply(twin).gm)
    bench.require("deep copies", _source_faults(gm, was, notes))
    on_itself = Picture.of(bench.apply(gm).gm)
    changes = on_copy.changes(on_itself)
    bench.require(
        "deep copies", (f"on a deep copy the result is another one: {change}" for change in changes)
    )


def _source_faults(
    gm: fx.GraphModule, was: Picture, notes: dict[str, dict[str, object]]
) -> Iterator[str]:
    for change in (*was.changes(Picture.of(gm)), *annotation_faults(notes, annotations(gm))):
        yield f"run on a deep copy, it changed the graph module that this was made of: {change}"
