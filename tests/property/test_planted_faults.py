"""The kit finds planted faults: each within `MOST` drawn cases, none of which fails without it.

`pytest -s` prints how many cases each fault needed.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from cgmq_fx.account import _Accountant
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.gates import MAX_INTEGER_WIDTH
from cgmq_fx.passes import annotate_work, candidates, fold_batch_norm, insert_quantizers
from cgmq_fx.passes.fold_batch_norm import FoldBatchNorm
from cgmq_fx.passes.functionalize import Functionalize
from cgmq_fx.quantizer_spec import integer_grid
from cgmq_fx.testing import Case, LawError, check_pass, check_prepare, graph_modules, models

MOST = 200
PRODUCTS = ("conv1d", "conv2d", "conv3d", "linear", "matmul", "attention", "bilinear", "opaque")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
ADDS_PRICED = CostTable(
    "adder",
    "cycle",
    (
        Row(op=(*PRODUCTS, *TRANSPOSED), per="mac", cost=1),
        Row(op="add", per="output_element", cost={"formula": "max(lhs_bits, rhs_bits)"}),
    ),
    unpriced="zero",
)


class FoundError(Exception):
    """Ends a search."""


@dataclass(frozen=True)
class Search:
    """The cases that were tried until one failed, and how that failed; None where none did."""

    cases: tuple[Case, ...]
    error: LawError | None


def search(cases: st.SearchStrategy[Case], check: Callable[[Case], object]) -> Search:
    """Try drawn cases, the same at every call, until one breaks a law."""
    tried: list[Case] = []
    found: list[LawError] = []

    @settings(
        max_examples=MOST,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(cases)
    def try_one(case: Case) -> None:
        if not found:
            tried.append(case)
            try:
                check(case)
            except LawError as error:
                found.append(error)
        if found:
            raise FoundError

    try:
        try_one()
    except FoundError:
        return Search(tuple(tried), found[0])
    return Search(tuple(tried), None)


# -- wrong passes ----------------------------------------------------------------------------------


def replaced(
    gm: fx.GraphModule, kind: type[nn.Module], make: Callable[[Any], nn.Module]
) -> fx.GraphModule:
    """Put a fresh module, made of the old one, in the place of each module of a kind."""
    for path, module in list(gm.named_modules()):
        if isinstance(module, kind):
            fresh = make(module).train(module.training)
            fresh.load_state_dict(module.state_dict())
            gm.set_submodule(path, fresh)
    return gm


def norms_anew(gm: fx.GraphModule, **options: Any) -> fx.GraphModule:
    return replaced(
        gm,
        nn.modules.batchnorm._BatchNorm,
        lambda old: type(old)(
            old.num_features,
            momentum=old.momentum,
            affine=old.affine,
            track_running_stats=old.track_running_stats,
            **(options or {"eps": old.eps}),
        ),
    )


def norms_with_the_default_eps(gm: fx.GraphModule) -> fx.GraphModule:
    return norms_anew(gm, eps=1e-5)


def dropouts_anew(gm: fx.GraphModule) -> fx.GraphModule:
    return replaced(gm, nn.Dropout, lambda old: nn.Dropout(old.p, inplace=old.inplace))


def dropouts_with_the_default_p(gm: fx.GraphModule) -> fx.GraphModule:
    return replaced(gm, nn.Dropout, lambda old: nn.Dropout(inplace=old.inplace))


def dead_code_removed(gm: fx.GraphModule) -> None:
    for node in reversed(gm.graph.nodes):
        if node.op == "get_attr" and not node.users:
            gm.graph.erase_node(node)
    gm.recompile()


def last_input_baked_in(gm: fx.GraphModule) -> None:
    """Take the last input for a constant, as a pass that specialises to an example does."""
    inputs = gm.graph.find_nodes(op="placeholder")
    if len(inputs) > 1:
        gm.register_buffer("example", torch.zeros(1))
        with gm.graph.inserting_after(inputs[-1]):
            inputs[-1].replace_all_uses_with(gm.graph.get_attr("example"))
        gm.graph.erase_node(inputs[-1])
    dead_code_removed(gm)


def history_in_a_tuple(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        node.meta["history"] = (*node.meta.get("history", ()), "seen")


def history_in_a_list(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        node.meta.setdefault("history", []).append("seen")


# -- faults in cgmq_fx -----------------------------------------------------------------------------


def always_changed(patch: pytest.MonkeyPatch) -> None:
    honest = Functionalize.run
    patch.setattr(Functionalize, "run", lambda self, gm: honest(self, gm) or True)


def priced_on_the_output(patch: pytest.MonkeyPatch) -> None:
    honest = annotate_work._conv

    def wrong(node: Any, info: Any, operands: Any, output: Any) -> Any:
        macs, attributes = honest(node, info, operands, output)
        if info.op in TRANSPOSED:
            macs = macs * output.numel // operands[1].numel
        return macs, attributes

    patch.setattr(annotate_work, "_conv", wrong)


def counted_at_each_use(patch: pytest.MonkeyPatch) -> None:
    honest = _Accountant._weight_memory

    def wrong(self: Any) -> Any:
        resource = honest(self)
        readers = {
            str(node.target).rpartition(".")[2]: len(node.users)
            for node in self.gm.graph.nodes
            if candidates.is_quantizer(self.gm, node)
        }
        terms = [term for term in resource.terms for _ in range(readers.get(term.name, 1))]
        return type(resource)(
            *(resource.name, resource.unit, resource.widths, resource.num_sites, terms),
            *(resource.scale, resource.reference),
        )

    patch.setattr(_Accountant, "_weight_memory", wrong)


def one_branch_in_float(patch: pytest.MonkeyPatch) -> None:
    honest = candidates._float_operands

    def wrong(gm: Any, node: Any) -> Iterator[Any]:
        for ref, tensor in honest(gm, node):
            if node.target is not operator.add or ref.index == 0:
                yield ref, tensor

    patch.setattr(candidates, "_float_operands", wrong)


def quantized_at_the_first_call(patch: pytest.MonkeyPatch) -> None:
    honest = insert_quantizers._insert

    def wrong(gm: Any, site: str, groups: list[list[Any]]) -> None:
        first = groups[0][0]
        honest(gm, site, [[first]] if first.read.ref.is_weight else groups)

    patch.setattr(insert_quantizers, "_insert", wrong)


def groups_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    honest = fold_batch_norm._Layer.along_weight

    def wrong(self: Any, factor: torch.Tensor) -> torch.Tensor:
        if self.channel_axis == 0 or self.groups == 1:
            return honest(self, factor)
        return honest(self, factor.reshape(-1, self.groups).t().reshape(-1))

    patch.setattr(fold_batch_norm._Layer, "along_weight", wrong)


def two_activations_as_one(patch: pytest.MonkeyPatch) -> None:
    honest = candidates._site_names

    def wrong(gm: Any, reads: Any) -> Any:
        names = honest(gm, reads)
        computed = [read for read in reads if read.ref and read.tensor.op.startswith("call")]
        owners = list(dict.fromkeys(candidates._owner(gm, read) for read in computed))
        if len(owners) > 1:
            names[owners[1]] = names[owners[0]]
        return names

    patch.setattr(candidates, "_site_names", wrong)


def one_bit_more(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "cgmq_fx.quantizer.integer_grid",
        lambda scheme, bits: integer_grid(scheme, min(bits + 1, MAX_INTEGER_WIDTH)),
    )


def nothing(patch: pytest.MonkeyPatch) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """A fault, and how the kit looks for it.

    Attributes:
        plant: puts it into cgmq_fx.
        check: what is checked on each case.
        honest: the same without the fault, where that is in the pass.
        cases: what is drawn.
    """

    plant: Callable[[pytest.MonkeyPatch], None]
    check: Callable[[Case], object]
    honest: Callable[[Case], object]
    cases: Callable[[], st.SearchStrategy[Case]] = models


def in_pass(wrong: Any, honest: Any) -> Fault:
    return Fault(
        nothing,
        lambda case: check_pass(wrong, case),
        lambda case: check_pass(honest, case),
        graph_modules,
    )


def in_library(plant: Any, check: Callable[[Case], object], *traits: str) -> Fault:
    return Fault(plant, check, check, lambda: models(require=traits))


def with_adds_priced(case: Case) -> object:
    return check_prepare(case, budget="100%", cost_table=ADDS_PRICED)


FAULTS = {
    "batch norm eps overwritten": in_pass(norms_with_the_default_eps, norms_anew),
    "dropout p overwritten": in_pass(dropouts_with_the_default_p, dropouts_anew),
    "transposed convolution priced on its output": in_library(
        priced_on_the_output, check_prepare, "transposed"
    ),
    "a tied weight counted twice": in_library(counted_at_each_use, check_prepare, "tied"),
    "one branch of an add left float": in_library(one_branch_in_float, with_adds_priced),
    "a reused module quantized once": in_library(
        quantized_at_the_first_call, check_prepare, "reused"
    ),
    "the changed flag always True": in_library(
        always_changed, lambda case: check_pass(Functionalize(), case)
    ),
    "a placeholder dropped": in_pass(last_input_baked_in, dead_code_removed),
    "grouped convolution transposed wrongly in folding": in_library(
        groups_in_the_wrong_order,
        lambda case: check_pass(FoldBatchNorm(), case),
        *("transposed", "grouped", "conv_bn"),
    ),
    "ranges shared that should not be": in_library(two_activations_as_one, check_prepare),
    "meta mutated in a deep copy": in_pass(history_in_a_list, history_in_a_tuple),
    "a bit-width off by one": in_library(one_bit_more, check_prepare),
}


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        yield


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, record_property):
    fault = FAULTS[name]
    with planted(fault):
        found = search(fault.cases(), fault.check)
    assert found.error is not None, f"not found in {len(found.cases)} cases"
    for case in found.cases:
        fault.honest(case)
    record_property("cases", len(found.cases))
    print(f"\n{name}: found in case {len(found.cases)}, by the law '{found.error.law}'", end="")
