"""`check_prepare`: what `cgmq_fx.prepare` promises, held on one model."""

import copy
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from cgmq_fx.accounting import Accounting
from cgmq_fx.budget import Limit
from cgmq_fx.errors import BudgetError
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule, one_sample
from cgmq_fx.testing.accounting_laws import (
    check_coverage,
    check_sharing,
    check_ties,
    check_totals,
)
from cgmq_fx.testing.case import Case
from cgmq_fx.testing.check_lowering import check_lowering
from cgmq_fx.testing.compare import output_faults, persistent, positional_inputs, split_inputs
from cgmq_fx.testing.counting import FloatCount, count_float
from cgmq_fx.testing.law_error import require
from cgmq_fx.testing.prepare_laws import check_numbers, check_signature, check_state
from cgmq_fx.testing.snapshot import Snapshot

#: Bounds on bit operations and on stored weights that every choice of bit-widths meets.
NO_LIMIT: Mapping[str, str] = {"bops": "100%", "weight_memory": "100%"}
#: By how much less than the floor is asked for, as a share of it.
_HAIR = Fraction(1, 10**6)


def check_prepare(
    model: nn.Module | Case,
    inputs: Any = None,
    budget: object = NO_LIMIT,
    *,
    seed: int = 0,
    **prepare_options: Any,
) -> PreparedModule:
    """Prepare a model, hold the result to its laws, and return it.

    The laws: the model stays untouched; the prepared one has its signature, settings and state,
    loads its checkpoints, and computes the same numbers at 32 bits, bit for bit, in evaluation and
    in training; what computes is in the ledger, priced by as many MACs as two counters find; totals
    are the sums of their rows, and what a computation of its own gives; each tensor has one
    quantizer, and each quantizer one tensor; the floor of a budget is accepted and less is
    refused; lowered at random bit-widths within the budgets it passes `check_lowering`.

    A budget that is refused as infeasible is not a fault. The refusal's suggestion must be feasible
    then, and the laws are checked with it.

    Args:
        model: the float model, of which copies are used, or a case with its inputs.
        inputs: a tensor, the positional inputs of one call, or a mapping of its keyword inputs; not
            for a case.
        budget: as for `prepare`.
        seed: of the random bit-widths.
        prepare_options: other arguments of `prepare`.

    Raises:
        CgmqError: what `prepare` raises, apart from infeasible budgets.
        LawError: a law is broken.
    """
    case = model if isinstance(model, Case) else Case.of(model, *split_inputs(inputs))
    prepare_options.setdefault("batch_axis", case.batch_axis)
    bench = _Bench(case, prepare_options, seed)
    prepared = bench.prepare_within(budget)
    bench.check_accounting(prepared)
    bench.require("floor", bench.floor_faults(prepared))
    bench.check_random_widths(prepared)
    return prepared


@dataclass(frozen=True)
class _Bench:
    """A case, and how it is prepared."""

    case: Case
    options: Mapping[str, Any]
    seed: int

    def require(self, law: str, faults: Iterator[str]) -> None:
        """Raise where there are faults."""
        require(law, f"prepare(..., {_shown(self.options)})", faults, self.case.source)

    def inputs(self) -> tuple[Any, ...]:
        """Return one value for each parameter of forward, fresh."""
        return positional_inputs(self.case.model(), *self.case.inputs(), **self.case.kwargs())

    def prepare(self, model: nn.Module, budget: object) -> PreparedModule:
        """Prepare `model` under `budget`."""
        return prepare(model, budget, example_inputs=self.inputs(), **self.options)

    def prepare_within(self, budget: object) -> PreparedModule:
        """Prepare, under the budget that a refusal suggests if need be, and check laws 1 to 3."""
        model, given = self.case.model(), self.inputs()
        before, kept = Snapshot.of(model), copy.deepcopy(given)
        options = {**self.options, "example_inputs": given}
        try:
            prepared = prepare(model, budget, **options)
        except BudgetError as error:
            if not error.suggestion:
                raise
            self.require("untouched", before.faults(model))
            budget = _raised(budget, error)
            try:
                prepared = prepare(model, budget, **options)
            except BudgetError as again:
                self.require("suggestion", iter([f"{budget} is refused too: {again}"]))
        self.require("untouched", before.faults(model))
        self.require("untouched", output_faults(kept, given))
        self.require("signature", check_signature(model, prepared))
        self.require("state", check_state(model, copy.deepcopy(prepared)))
        self.require("numbers", persistent(lambda: self.number_faults(prepared)))
        return prepared

    def number_faults(self, prepared: PreparedModule) -> Iterator[str]:
        """Compare a copy with the float model."""
        given, twin = self.inputs(), copy.deepcopy(prepared)
        yield from check_numbers(
            self.case.model(), twin, given, given, backward=False, telling=False
        )

    @cached_property
    def counted(self) -> tuple[FloatCount, tuple[Any, ...]]:
        """What the float model does, and the inputs for which: one sample, where it takes one."""
        given = self.inputs()
        sample = one_sample(given, self.options["batch_axis"])
        try:
            return count_float(self.case.model(), sample), sample
        except (RuntimeError, TypeError, ValueError, IndexError):
            # A model that needs its whole batch is priced for it.
            return count_float(self.case.model(), given), given

    def check_accounting(self, prepared: PreparedModule) -> None:
        """Check laws 4 to 6."""
        counted, sample = self.counted
        twin = copy.deepcopy(prepared)
        self.require("coverage", check_coverage(twin, sample))
        self.require("macs", _mac_faults(prepared, counted))
        self.require("totals", check_totals(twin, counted, self.seed))
        self.require("ties", check_ties(twin))
        self.require("sharing", check_sharing(twin))

    def floor_faults(self, prepared: PreparedModule) -> Iterator[str]:
        """Ask for the floor of one of the budgets, and for a hair less."""
        accounting = prepared.plan.accounting
        name = random.Random(self.seed).choice(sorted(accounting.limits))
        unit_of = {key: resource.unit for key, resource in accounting.resources.items()}
        totals = accounting.totals(
            accounting.cheapest_bits(name, [site.allowed for site in accounting.sites])
        )
        others = {
            other: max(totals[other], accounting.resources[other].reference, Fraction(1))
            for other in accounting.limits
            if other != name
        }
        if totals[name] > 0:
            wide = {other: Limit(value=most, unit=unit_of[other]) for other, most in others.items()}
            limit = Limit(value=totals[name], unit=unit_of[name])
            yield from self._asked(name, totals[name], limit, wide)

    def _asked(
        self, name: str, floor: Fraction, limit: Limit, others: Mapping[str, Limit]
    ) -> Iterator[str]:
        try:
            self.prepare(self.case.model(), {**others, name: limit})
        except BudgetError as error:
            yield f"{name} = {floor}, its floor, is refused: {error}"
        less = Limit(value=floor * (1 - _HAIR), unit=limit.unit)
        try:
            self.prepare(self.case.model(), {**others, name: less})
        except BudgetError as error:
            if error.floors.get(name) != floor:
                yield f"the refusal has the floor {error.floors.get(name)} for {name}, not {floor}"
        else:
            yield f"{name} a hair below its floor {floor} is accepted"

    def check_random_widths(self, prepared: PreparedModule) -> None:
        """Lower at random bit-widths within the budgets."""
        bits = random_bits_within(prepared.plan.accounting, random.Random(self.seed))
        if bits is not None:
            check_lowering(prepared, self.inputs(), bits=bits, source=self.case.source)


def random_bits_within(accounting: Accounting, draw: random.Random) -> list[int] | None:
    """Return random bit-widths that meet every budget, or None where lowering did not find any."""
    bits = [draw.choice(site.allowed) for site in accounting.sites]
    while not accounting.is_satisfied(bits):
        high = [at for at, site in enumerate(accounting.sites) if bits[at] > site.allowed[0]]
        if not high:
            ceiling = [site.allowed[-1] for site in accounting.sites]
            found = accounting.reachable_bits(accounting.limits, ceiling)
            return None if found is None else list(found)
        at = draw.choice(high)
        bits[at] = max(width for width in accounting.sites[at].allowed if width < bits[at])
    return bits


def _raised(budget: object, error: BudgetError) -> object:
    given = dict(budget) if isinstance(budget, Mapping) else {}
    return {**given, **error.suggestion}


def _mac_faults(prepared: PreparedModule, counted: FloatCount) -> Iterator[str]:
    macs = sum(entry.macs for entry in prepared.plan.accounting.ledger)
    if macs != counted.macs:
        yield f"the ledger has {macs} MACs, a run of the float model does {counted.macs}"


def _shown(options: Mapping[str, Any]) -> str:
    plain = {
        name: value if pytree.tree_all(_is_plain, value) else type(value).__name__
        for name, value in options.items()
    }
    return ", ".join(f"{name}={value!r}" for name, value in plain.items())


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)
