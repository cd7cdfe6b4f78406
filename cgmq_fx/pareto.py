"""`pareto`: one run down a list of budgets, and a lowered module for each."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from cgmq_fx.errors import BudgetError, UsageError
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.units import format_amount

Tune = Callable[[PreparedModule], LoweredModule | None]
Evaluate = Callable[[LoweredModule], float]


@dataclass(frozen=True)
class ParetoPoint:
    """What came of one budget.

    Attributes:
        budget: as it was given.
        fixed: the lowered module, within it.
        totals: the cost of each resource, in its unit.
        shares: the same as a share of the float model's.
        metric: what `evaluate` said of it; None without.
    """

    budget: object
    fixed: LoweredModule
    totals: Mapping[str, Fraction]
    shares: Mapping[str, float]
    metric: float | None


@dataclass(frozen=True)
class Pareto:
    """The points of a run, from the largest budget to the smallest.

    Attributes:
        points: one for each budget.
        units: of the resources, by name.
    """

    points: tuple[ParetoPoint, ...]
    units: Mapping[str, str]

    def curve(self, resource: str | None = None) -> tuple[list[float], list[float | None]]:
        """Return what to plot: the share of a resource and the metric, point by point.

        Args:
            resource: its name; None: the first of the budgets.

        Raises:
            UsageError: there is no such resource.
        """
        names = list(self.units)
        name = names[0] if resource is None else resource
        if name not in names:
            raise UsageError(f"no resource is called {name!r}; there are {', '.join(names)}")
        return [point.shares[name] for point in self.points], [p.metric for p in self.points]

    def front(self) -> tuple[ParetoPoint, ...]:
        """Return the points than which no cheaper one has as good a metric.

        All of them where there is no metric. Cheaper is at most as much of every resource.
        """
        return tuple(
            point
            for point in self.points
            if not any(_is_better(other, point) for other in self.points)
        )

    def to_csv(self) -> str:
        """Return a line for each point: budget, metric, then total and share by resource."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        costs = [f"{name} ({unit})" for name, unit in self.units.items()]
        writer.writerow(["budget", "metric", *costs, *(f"{name} share" for name in self.units)])
        for point in self.points:
            totals = [float(point.totals[name]) for name in self.units]
            metric = "" if point.metric is None else point.metric
            shares = [point.shares[name] for name in self.units]
            writer.writerow([point.budget, metric, *totals, *shares])
        return stream.getvalue()

    def __str__(self) -> str:
        rows = [["budget", *self.units, "metric"]]
        for point in self.points:
            costs = [
                f"{format_amount(point.totals[name], unit)} ({100 * point.shares[name]:.3f} %)"
                for name, unit in self.units.items()
            ]
            metric = "" if point.metric is None else f"{point.metric:.4f}"
            rows.append([str(point.budget), *costs, metric])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def pareto(
    model: nn.Module,
    budgets: Sequence[object],
    tune: Tune,
    *,
    evaluate: Evaluate | None = None,
    **options: Any,
) -> Pareto:
    """Return a lowered module for each of several budgets, each within its own.

    All budgets are checked before anything runs. They are then walked down, the largest first:
    where `tune` trains, each begins with the weights, ranges and bit-widths of the one before, so
    that all of them together take about as long as a few single runs.

    Args:
        model: the trained float model, left untouched.
        budgets: as `cgmq_fx.prepare` takes them, each with the same resources.
        tune: trains or calibrates a prepared model, for instance
            ``lambda prepared: cgmq_fx.fit(prepared, loader, loss_fn, epochs=3).fixed``. What it
            returns is taken; where that is None, the model it was given is lowered.
        evaluate: ``evaluate(fixed)``, a number, higher is better.
        **options: of `cgmq_fx.prepare`; `example_inputs` has to be among them.

    Raises:
        BudgetError: a budget is infeasible; the message names it.
        UsageError: there is no budget, or they bound different resources.
        CgmqError: as `cgmq_fx.prepare` and `cgmq_fx.lower`.
    """
    prepared = _prepared(model, budgets, options)
    order = sorted(range(len(budgets)), key=lambda place: -_size(prepared[place]))
    points: list[ParetoPoint] = []
    before: PreparedModule | None = None
    for place in order:
        present = prepared[place]
        if before is not None and int(before.plan.steps) > 0:
            present.load_state_dict(before.state_dict())
            present.plan.steps.zero_()
        made = tune(present)
        fixed = lower(present) if made is None else made
        points.append(_point(budgets[place], present, fixed, evaluate))
        before = present
    accounting = prepared[0].plan.accounting
    units = {name: accounting.resources[name].unit for name in accounting.limits}
    return Pareto(tuple(points), units)


def _prepared(
    model: nn.Module, budgets: Sequence[object], options: Mapping[str, Any]
) -> list[PreparedModule]:
    """Return the model prepared for each budget."""
    if isinstance(budgets, str) or not budgets:
        raise UsageError(
            f"pareto: budgets={budgets!r} must be a list of at least one budget, such as "
            f"['3%', '1%']"
        )
    if options.get("example_inputs") is None:
        raise UsageError(
            "pareto checks all budgets before it runs anything, for which it needs shapes; give "
            "example_inputs=(x,)"
        )
    made = []
    for budget in budgets:
        try:
            made.append(prepare(model, budget, **options))
        except BudgetError as error:
            error.args = (f"pareto, budget {budget!r}: {error}",)
            raise
    bounded = {tuple(sorted(item.plan.accounting.limits)) for item in made}
    if len(bounded) > 1:
        raise UsageError(
            f"pareto: the budgets bound different resources, {sorted(bounded)}; bound the same in "
            f"each"
        )
    return made


def _size(prepared: PreparedModule) -> Fraction:
    """Return the sum of its budgets, each as a share of the float model's cost."""
    accounting = prepared.plan.accounting
    shares = (
        limit / (accounting.resources[name].reference or 1)
        for name, limit in accounting.limits.items()
    )
    return sum(shares, start=Fraction(0))


def _point(
    budget: object, prepared: PreparedModule, fixed: LoweredModule, evaluate: Evaluate | None
) -> ParetoPoint:
    accounting = prepared.plan.accounting
    totals = accounting.totals([fixed.bit_widths[name] for name in accounting.site_names])
    over = {n: t for n, t in totals.items() if n in accounting.limits and t > accounting.limits[n]}
    if over:
        raise BudgetError(
            f"pareto, budget {budget!r}: tune returned a module that exceeds it in "
            f"{', '.join(over)}; return what was made of the model that it was given"
        )
    shares = {
        name: float(totals[name] / accounting.resources[name].reference)
        if accounting.resources[name].reference
        else 0.0
        for name in accounting.limits
    }
    metric = None if evaluate is None else float(evaluate(fixed))
    return ParetoPoint(budget, fixed, totals, shares, metric)


def _is_better(other: ParetoPoint, point: ParetoPoint) -> bool:
    if other.metric is None or point.metric is None or other is point:
        return False
    is_as_cheap = all(other.shares[name] <= share for name, share in point.shares.items())
    is_as_good = other.metric >= point.metric
    return (
        is_as_cheap and is_as_good and (other.shares, other.metric) != (point.shares, point.metric)
    )
