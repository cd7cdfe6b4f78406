"""Every pass keeps its contract on every small model."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx

from cgmq_fx.cost.load import get_table
from cgmq_fx.passes.annotate_nonnegative import AnnotateNonnegative
from cgmq_fx.passes.annotate_operations import AnnotateOperations
from cgmq_fx.passes.annotate_shapes import AnnotateShapes
from cgmq_fx.passes.annotate_work import AnnotateWork
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.candidates import Wanted
from cgmq_fx.passes.close_batch_norm import CloseBatchNorm
from cgmq_fx.passes.drop_rectifiers import DropRectifiers
from cgmq_fx.passes.fold_batch_norm import FoldBatchNorm
from cgmq_fx.passes.freeze_bit_widths import FreezeBitWidths
from cgmq_fx.passes.functionalize import Functionalize
from cgmq_fx.passes.fuse_rectifiers import FuseRectifiers
from cgmq_fx.passes.insert_quantizers import InsertQuantizers
from cgmq_fx.passes.meta import WORK
from cgmq_fx.passes.price_operations import PriceOperations
from cgmq_fx.passes.raise_aten import RaiseAten
from cgmq_fx.passes.repeat_quantizers import RepeatQuantizers
from cgmq_fx.passes.restore_modules import RestoreModules
from cgmq_fx.passes.select_operands import SelectOperands
from cgmq_fx.passes.share_quantizers import ShareQuantizers
from cgmq_fx.passes.specialize_evaluation import SpecializeEvaluation
from cgmq_fx.passes.standard_quantization import StandardQuantization
from cgmq_fx.passes.trace import trace
from cgmq_fx.passes.xnnpack_quantization import XnnpackQuantization
from cgmq_fx.testing import LawError, check_pass
from graph_zoo import ZOO, ZooCase, case
from source_tree import module_files

BOPS = get_table("bops")
OPS = frozenset(op for row in BOPS.rows for op in row.op)
Make = Callable[[tuple[Any, ...]], GraphPass]
ANNOTATIONS: tuple[Make, ...] = (
    lambda _: AnnotateOperations(),
    lambda _: AnnotateNonnegative(),
    AnnotateShapes,
)
SELECT = (*ANNOTATIONS, lambda _: SelectOperands(Wanted(OPS)))
SHARE = (*SELECT, lambda _: ShareQuantizers(frozenset({"add", "cat"})))
WORKING = (*ANNOTATIONS, lambda _: AnnotateWork())


@dataclass(frozen=True)
class Subject:
    """A pass, made for the inputs of a model, and what has to run before it.

    `training` says whether it promises its numerics in training mode too; None: where it is exact.
    """

    make: Make
    before: tuple[Make, ...] = ()
    training: bool | None = None


OPENED: tuple[Make, ...] = (lambda _: Functionalize(),)
PREPARED = (*OPENED, *SHARE, lambda _: InsertQuantizers(input_bits=None))
FROZEN = (*PREPARED, lambda _: SpecializeEvaluation(), lambda _: FreezeBitWidths())
SUBJECTS: Mapping[type[GraphPass], Subject] = {
    RestoreModules: Subject(lambda _: RestoreModules()),
    RaiseAten: Subject(lambda _: RaiseAten()),
    CloseBatchNorm: Subject(lambda _: CloseBatchNorm()),
    Functionalize: Subject(lambda _: Functionalize()),
    AnnotateOperations: Subject(ANNOTATIONS[0], OPENED),
    AnnotateNonnegative: Subject(ANNOTATIONS[1], (*OPENED, *ANNOTATIONS[:1])),
    AnnotateShapes: Subject(AnnotateShapes, (*OPENED, *ANNOTATIONS[:2])),
    AnnotateWork: Subject(WORKING[-1], (*OPENED, *ANNOTATIONS)),
    SelectOperands: Subject(SELECT[-1], (*OPENED, *ANNOTATIONS)),
    ShareQuantizers: Subject(SHARE[-1], (*OPENED, *SELECT)),
    InsertQuantizers: Subject(lambda _: InsertQuantizers(), (*OPENED, *SHARE)),
    FuseRectifiers: Subject(lambda _: FuseRectifiers(), PREPARED),
    PriceOperations: Subject(lambda _: PriceOperations((BOPS,)), (*OPENED, *WORKING)),
    SpecializeEvaluation: Subject(lambda _: SpecializeEvaluation(), PREPARED, training=False),
    FreezeBitWidths: Subject(lambda _: FreezeBitWidths(), PREPARED, training=False),
    FoldBatchNorm: Subject(lambda _: FoldBatchNorm()),
    RepeatQuantizers: Subject(lambda _: RepeatQuantizers(), FROZEN, training=False),
    DropRectifiers: Subject(lambda _: DropRectifiers(), FROZEN, training=False),
    XnnpackQuantization: Subject(lambda _: XnnpackQuantization(), FROZEN, training=False),
    StandardQuantization: Subject(lambda _: StandardQuantization(), FROZEN, training=False),
}
CELLS = pytest.mark.parametrize("kind", SUBJECTS, ids=lambda kind: kind.name)
GRAPHS = pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)


def check(kind: type[GraphPass], zoo_case: ZooCase) -> None:
    """Hold a pass to its laws on one model."""
    model, inputs = zoo_case.build()
    subject = SUBJECTS[kind]
    check_pass(
        subject.make(inputs),
        (trace(model, inputs, zoo_case.batch_axis), inputs),
        before=[make(inputs) for make in subject.before],
        training=subject.training,
    )


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


@pytest.mark.parametrize(
    "kind", sorted(passes_in_the_folder(), key=lambda kind: kind.name), ids=lambda kind: kind.name
)
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
    lying: "well-formed|truthful flag",
    dropping: "contract",
    rescaling: "numerics",
    restless: "idempotent",
    restructuring: "signature",
}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_seen(fault, monkeypatch):
    monkeypatch.setattr(Functionalize, "run", fault)
    with pytest.raises(LawError, match=f"breaks the law '({PLANTED[fault]})'"):
        check(Functionalize, case("plain"))


def test_an_annotation_that_copies_could_change_is_seen(monkeypatch):
    honest = AnnotateWork.run

    def thawed(self: AnnotateWork, gm: fx.GraphModule) -> bool:
        honest(self, gm)
        for node in gm.graph.nodes:
            WORK.set(node, list(WORK.get(node)))
        return False

    monkeypatch.setattr(AnnotateWork, "run", thawed)
    with pytest.raises(LawError, match=r"'frozen annotations'(?s:.)*meta\['cgmq_fx.work'\] is \["):
        check(AnnotateWork, case("plain"))
