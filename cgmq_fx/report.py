"""`report`: what a prepared or lowered model costs, operation by operation, against its budgets."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Literal

from rich.console import RenderableType
from torch import nn

from cgmq_fx.account import BUILT_IN, WEIGHT_MEMORY
from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.operation import OPERAND_NAMES, BoundOperation
from cgmq_fx.cost.peak_memory import PeakMemory
from cgmq_fx.cost.totals import FLOAT_BITS, Resource
from cgmq_fx.errors import UsageError
from cgmq_fx.plan import Plan, Settings
from cgmq_fx.report_contents import ReportContents, ReportRow, ResourceSummary, TensorRow
from cgmq_fx.report_files import to_csv, to_json
from cgmq_fx.report_text import brief, renderable, to_text
from cgmq_fx.unit_bits import UnitBits


@dataclass(frozen=True, repr=False)
class Report(ReportContents):
    """What a model costs; ``str(report)`` is the table that a person reads.

    Every number is exact: the costs of the rows add up to the totals without rounding.
    """

    def __str__(self) -> str:
        return to_text(self)

    def __rich__(self) -> RenderableType:
        return renderable(self)

    def __repr__(self) -> str:
        return f"Report({brief(self)})"

    def to_json(self) -> str:
        """Return the report as JSON.

        Amounts are exact: an integer, or a text ``"n/d"``. A key that ends in ``_float`` holds the
        nearest floating-point number of its neighbour.
        """
        return to_json(self)

    def to_csv(self) -> str:
        """Return the rows as CSV: operations, then stored tensors.

        A column ``cost_<resource>`` is exact and adds up to the total of that resource.
        """
        return to_csv(self)


def report(module: nn.Module) -> Report:
    """Return what `module` costs at its present bit-widths.

    Args:
        module: what `prepare` or `lower` returned.

    Raises:
        TrainingError: no shapes are known yet, so that nothing has a cost.
        UsageError: the module is neither prepared nor lowered.
    """
    plan = getattr(module, "plan", None)
    bit_widths = getattr(module, "bit_widths", None)
    if not isinstance(plan, Plan) or not isinstance(bit_widths, Mapping):
        raise UsageError(
            f"{type(module).__name__} is neither prepared nor lowered and has no costs to report; "
            "give report what cgmq_fx.prepare or cgmq_fx.lower returned"
        )
    accounting = plan.accounting
    reporter = _Reporter(accounting, [bit_widths[name] for name in accounting.site_names])
    return Report(
        type(module).__name__,
        reporter.rows(),
        reporter.tensors(),
        tuple(reporter.summary(name, plan.settings) for name in reporter.resources),
    )


class _Reporter:
    """Reads an accounting at one choice of bit-widths, given in the order of its sites."""

    def __init__(self, accounting: Accounting, bits: list[int]) -> None:
        self.accounting = accounting
        self.bits = bits
        # Those with a budget first: they are what the reader came for.
        names = dict.fromkeys([*accounting.limits, *accounting.resources])
        self.resources = {name: accounting.resources[name] for name in names}
        self.index = accounting.mixed_index(bits)
        self.costs = {name: item.costs(self.index) for name, item in self.resources.items()}

    def rows(self) -> tuple[ReportRow, ...]:
        """Return a row for each operation."""
        return tuple(self._row(position) for position in range(len(self.accounting.operations)))

    def _row(self, position: int) -> ReportRow:
        bound, entry = self.accounting.operations[position], self.accounting.ledger[position]
        priced = {name: item for name, item in self.resources.items() if name not in BUILT_IN}
        cost = {name: self.costs[name][position] for name in priced}
        operation = bound.operation
        return ReportRow(
            name=operation.name,
            op=operation.op,
            target=operation.target,
            macs=operation.macs,
            **self._operand_bits(bound),
            cost=cost,
            budget_share=self._budget_share(cost),
            status=entry.status,
            reason=entry.reason,
            unpriced_in=tuple(
                name
                for name, resource in priced.items()
                if operation.macs and resource.rows[position] is None
            ),
        )

    def _operand_bits(self, bound: BoundOperation) -> dict[str, int | None]:
        found: dict[str, int | None] = dict.fromkeys(chain(*OPERAND_NAMES.values()))
        names = OPERAND_NAMES[bound.operation.operands]
        for name, source in zip(names, bound.sources, strict=True):
            found[name] = source.bits if source.site is None else self.bits[source.site]
        if bound.operation.op == "embedding":
            found["activation_bits"] = None  # it reads an index
        return found

    def _budget_share(self, cost: Mapping[str, Fraction]) -> dict[str, Fraction]:
        limits = self.accounting.limits
        # A bound of nothing is a share of nothing: no row costs anything then.
        return {
            name: cost[name] / limit if limit else Fraction(0)
            for name, limit in limits.items()
            if name in cost
        }

    def tensors(self) -> tuple[TensorRow, ...]:
        """Return a row for each tensor that some resource counts: stored, or live at the peak."""
        return tuple(
            self._tensor(name, place)
            for name in self.resources
            if name in BUILT_IN
            for place, cost in enumerate(self.costs[name])
            if cost
        )

    def _tensor(self, name: str, place: int) -> TensorRow:
        resource, amount = self.resources[name], self.costs[name][place]
        term, cost = resource.terms[place], {name: amount}
        site = term.sites[0]
        bits = FLOAT_BITS if site is None else self.bits[site]
        role: Literal["weight", "activation"] = "weight"
        if isinstance(resource, PeakMemory):
            role = "activation"
            bits = bits if site is not None else resource.buffers[place].bits
        share = self._budget_share(cost)
        if site is not None and isinstance(bits, UnitBits):
            elements = self.accounting.sites[site].elements
        else:
            elements = int(amount * 8 / bits)
        return TensorRow(term.name, elements, bits, cost, share, role)

    def summary(self, name: str, settings: Settings) -> ResourceSummary:
        """Return the total of a resource against its budget."""
        resource = self.resources[name]
        limit = settings.limits.get(name)
        return ResourceSummary(
            name,
            resource.unit,
            resource.total(self.index),
            resource.reference,
            self.accounting.limits.get(name),
            "" if limit is None else str(limit),
            _convention(resource, settings),
        )


def _convention(resource: Resource, settings: Settings) -> tuple[str, ...]:
    if resource.name == WEIGHT_MEMORY:
        return (
            "every parameter that inference reads counts once, packed at its own bit-width",
            f"100 % is all of them at {FLOAT_BITS} bits",
        )
    if isinstance(resource, PeakMemory):
        return (
            "the largest set of activations that are live at one step, in the order of the graph; "
            "ties: the first such step",
            "a tensor that all operations read through one quantizer is held as its codes, others "
            f"with {FLOAT_BITS} bits",
            "views and what computes element by element reuse the memory of their operand",
            f"100 % is the peak with {FLOAT_BITS} bits for all",
        )
    table = settings.tables[resource.name]
    sample = "for the inputs as given" if settings.batch_axis is None else "for one sample"
    arriving = (
        "have a learned bit-width"
        if settings.input_bits is None
        else f"arrive with {settings.input_bits} bits"
    )
    reference = table.reference
    return (
        table.source or "the table names no source",
        f"costs are {sample}; the model's inputs {arriving}; its outputs (logits) stay float",
        f"100 % is weights at {reference.weight} bits and activations at {reference.activation}",
    )
