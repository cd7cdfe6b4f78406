"""Every pass keeps its contract on every small model."""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from cgmq_fx.cost.load import get_table
from cgmq_fx.errors import PassError
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.passes.annotate_nonnegative import AnnotateNonnegative
from cgmq_fx.passes.annotate_operations import AnnotateOperations
from cgmq_fx.passes.annotate_shapes import AnnotateShapes
from cgmq_fx.passes.annotate_work import AnnotateWork
from cgmq_fx.passes.base import GraphPass, Numerics
from cgmq_fx.passes.fold_batch_norm import FoldBatchNorm
from cgmq_fx.passes.freeze_bit_widths import FreezeBitWidths
from cgmq_fx.passes.functionalize import Functionalize
from cgmq_fx.passes.insert_quantizers import InsertQuantizers
from cgmq_fx.passes.pipeline import Pipeline, run_pass
from cgmq_fx.passes.price_operations import PriceOperations
from cgmq_fx.passes.share_quantizers import ShareQuantizers
from cgmq_fx.passes.specialize_evaluation import SpecializeEvaluation
from cgmq_fx.passes.trace import trace
from cgmq_fx.quantizers import Quantizer
from graph_zoo import ZOO, ZooCase, case
from source_tree import module_files

BOPS = get_table("bops")
OPS = frozenset(op for row in BOPS.rows for op in row.op)
ANNOTATIONS: tuple[Callable[[tuple[Any, ...]], GraphPass], ...] = (
    lambda _: AnnotateOperations(),
    lambda _: AnnotateNonnegative(),
    AnnotateShapes,
)
SHARE = (*ANNOTATIONS, lambda _: ShareQuantizers(OPS))
WORK = (*ANNOTATIONS, lambda _: AnnotateWork())


@dataclass(frozen=True)
class Subject:
    """A pass, made for the inputs of a model, and what has to run before it.

    `modes` are those, training or not, in which it promises its numerics.
    """

    make: Callable[[tuple[Any, ...]], GraphPass]
    before: tuple[Callable[[tuple[Any, ...]], GraphPass], ...] = ()
    modes: tuple[bool, ...] = (True, False)


OPENED = (lambda _: Functionalize(),)
PREPARED = (*OPENED, *SHARE, lambda _: InsertQuantizers(input_bits=None))
SUBJECTS: Mapping[type[GraphPass], Subject] = {
    Functionalize: Subject(lambda _: Functionalize()),
    AnnotateOperations: Subject(ANNOTATIONS[0], OPENED),
    AnnotateNonnegative: Subject(ANNOTATIONS[1], (*OPENED, *ANNOTATIONS[:1])),
    AnnotateShapes: Subject(AnnotateShapes, (*OPENED, *ANNOTATIONS[:2])),
    AnnotateWork: Subject(WORK[-1], (*OPENED, *ANNOTATIONS)),
    ShareQuantizers: Subject(SHARE[-1], (*OPENED, *ANNOTATIONS)),
    InsertQuantizers: Subject(lambda _: InsertQuantizers(), (*OPENED, *SHARE)),
    PriceOperations: Subject(lambda _: PriceOperations((BOPS,)), (*OPENED, *WORK)),
    SpecializeEvaluation: Subject(lambda _: SpecializeEvaluation(), PREPARED, modes=(False,)),
    FreezeBitWidths: Subject(lambda _: FreezeBitWidths(), PREPARED, modes=(False,)),
    FoldBatchNorm: Subject(lambda _: FoldBatchNorm(), modes=(False,)),
}
CELLS = pytest.mark.parametrize("kind", SUBJECTS, ids=lambda kind: kind.name)
GRAPHS = pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)


@dataclass(frozen=True)
class Bench:
    """A graph on which everything has run that the pass needs."""

    gm: fx.GraphModule
    inputs: tuple[Any, ...]
    subject: Subject

    @property
    def pass_(self) -> GraphPass:
        return self.subject.make(self.inputs)

    def restore(self) -> None:
        """Run the analyses again that the pass needs and invalidated."""
        if not self.pass_.requires:
            return
        analyses = [make for make in self.subject.before if make not in OPENED]
        Pipeline([make(self.inputs) for make in analyses]).run(self.gm)


def bench(kind: type[GraphPass], zoo_case: ZooCase) -> Bench:
    model, inputs = zoo_case.build()
    gm = trace(model, inputs, zoo_case.batch_axis)
    subject = SUBJECTS[kind]
    gm.train(subject.modes[0])
    Pipeline([make(inputs) for make in subject.before]).run(gm)
    return Bench(gm, inputs, subject)


def fingerprint(gm: fx.GraphModule) -> list[str]:
    """What a person calls the graph and its modules; node names and meta do not count."""
    place = {node: f"%{index}" for index, node in enumerate(gm.graph.nodes)}
    nodes = [
        f"{node.op} {node.target} {fx.node.map_arg((node.args, node.kwargs), place.__getitem__)}"
        for node in gm.graph.nodes
    ]
    modules = [f"{name}: {type(module).__name__}" for name, module in gm.named_modules() if name]
    return [*nodes, *modules, *gm.state_dict()]


def annotations(gm: fx.GraphModule) -> list[dict[str, Any]]:
    return [{k: v for k, v in n.meta.items() if k.startswith("cgmq_fx.")} for n in gm.graph.nodes]


def outputs(gm: fx.GraphModule, inputs: tuple[Any, ...], *, training: bool) -> Any:
    """What a copy of `gm` computes with fixed random numbers, every learned width at 32 bits."""
    twin, own = copy.deepcopy((gm, inputs))
    for module in twin.modules():
        if isinstance(module, Quantizer):
            module.set_bit_width(FLOAT_WIDTH)
    twin.train(training)
    torch.manual_seed(5)
    return twin(*own)


def assert_promise_kept(numerics: Numerics, before: Any, after: Any) -> None:
    assert pytree.tree_structure(before) == pytree.tree_structure(after)
    if numerics is Numerics.CHANGES:
        return
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
    tolerance = 0.0 if numerics is Numerics.EXACT else 1e-4
    for old, new in pairs:
        torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance, equal_nan=True)


def check(kind: type[GraphPass], zoo_case: ZooCase) -> None:
    """Run the pass and look for every breach of its contract."""
    place = bench(kind, zoo_case)
    gm, pass_ = place.gm, place.pass_
    copied = copy.deepcopy(gm)
    text, copied_text, notes = fingerprint(gm), fingerprint(copied), annotations(gm)
    placeholders = [(n.target, n.args) for n in gm.graph.nodes if n.op == "placeholder"]
    before = [outputs(gm, place.inputs, training=mode) for mode in place.subject.modes]
    modes = [module.training for module in gm.modules()]

    changed = run_pass(pass_, gm)

    gm.graph.lint()
    assert changed == (fingerprint(gm) != text), "the flag does not tell what happened"
    assert [(n.target, n.args) for n in gm.graph.nodes if n.op == "placeholder"] == placeholders
    after = [outputs(gm, place.inputs, training=mode) for mode in place.subject.modes]
    for old, new in zip(before, after, strict=True):
        assert_promise_kept(pass_.numerics, old, new)
    assert fingerprint(copied) == copied_text
    assert annotations(copied) == notes
    assert changed or [module.training for module in gm.modules()] == modes
    if changed:
        place.restore()
    once = fingerprint(gm)
    assert run_pass(place.pass_, gm) is False, "a second run says it changed something"
    assert fingerprint(gm) == once


@CELLS
@GRAPHS
def test_contract(kind, zoo_case):
    check(kind, zoo_case)


def passes_in_the_folder() -> set[type[GraphPass]]:
    names = [name for name in module_files() if name.startswith("cgmq_fx.passes.")]
    return {
        value
        for module in map(importlib.import_module, names)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, GraphPass) and value is not GraphPass
    }


def test_every_pass_is_checked():
    assert passes_in_the_folder() == set(SUBJECTS)


@pytest.mark.parametrize("kind", passes_in_the_folder(), ids=lambda kind: kind.name)
def test_a_pass_lives_in_the_file_of_its_name(kind):
    assert kind.__module__ == f"cgmq_fx.passes.{kind.name.replace('-', '_')}"


def lying(self: Functionalize, gm: fx.GraphModule) -> bool:
    return not HONEST(self, gm)


def dropping(self: Functionalize, gm: fx.GraphModule) -> bool:
    node = next(node for node in gm.graph.nodes if node.op == "placeholder")
    with gm.graph.inserting_after(node):
        node.replace_all_uses_with(gm.graph.call_function(torch.zeros, (2, 6)))
    gm.graph.erase_node(node)
    return True


def rescaling(self: Functionalize, gm: fx.GraphModule) -> bool:
    if gm.graph.find_nodes(op="call_function", target=torch.neg):
        return False
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(torch.neg, output.args),)
    return True


def restless(self: Functionalize, gm: fx.GraphModule) -> bool:
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(torch.clone, output.args),)
    return True


def restructuring(self: Functionalize, gm: fx.GraphModule) -> bool:
    output = gm.graph.output_node()
    if isinstance(output.args[0], tuple):
        return False
    output.args = ((output.args[0],),)
    return True


HONEST = Functionalize.run
PLANTED = {
    lying: "the flag does not tell",
    dropping: "changed the placeholders",
    rescaling: "Tensor-likes are not equal",
    restless: "a second run says it changed",
    restructuring: "tree_structure",
}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    monkeypatch.setattr(Functionalize, "run", fault)
    with pytest.raises((AssertionError, PassError), match=PLANTED[fault]):
        check(Functionalize, case("plain"))


def test_a_value_that_copies_share_is_seen():
    """Meta is shared by deep copies, so a pass that changed a value in place would show in both."""
    place = bench(AnnotateWork, case("plain"))
    run_pass(place.pass_, place.gm)
    copied = copy.deepcopy(place.gm)
    for node, twin in zip(place.gm.graph.nodes, copied.graph.nodes, strict=True):
        for key, value in annotations_of(node).items():
            assert hash_or_frozen(value), f"{key} of {node.name} can be changed in place"
            assert twin.meta[key] is value or twin.meta[key] == value


def annotations_of(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key.startswith("cgmq_fx.")}


def hash_or_frozen(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(hash_or_frozen, value))
    parameters = getattr(type(value), "__dataclass_params__", None)
    return value is None or isinstance(value, int | str) or (parameters and parameters.frozen)
