"""Hypothesis strategies for budgets and choices of bit-widths."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from cgmq_fx.accounting import Accounting
from cgmq_fx.budget import Budget
from cgmq_fx.errors import UsageError
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.units import UNITS, amount_at_least, number_at_least

# Between the floor (0) and the reference cost (1): where in there a budget lies.
_PLACES = st.fractions(0, 1, max_denominator=64)
_DIGITS = 6
_NAMES = ("bops", "weight_memory", "latency", "energy")


def budgets(
    prepared: PreparedModule | None = None, *, feasible: bool | None = None
) -> st.SearchStrategy[Any]:
    """Draw valid budgets in every form: shares, amounts with a unit, mappings, `Budget` objects.

    >>> from hypothesis import find
    >>> find(budgets(), lambda budget: isinstance(budget, str))
    '100%'

    Args:
        prepared: the network to be bounded, priced; with it the resources are its own, a budget can
            be passed to `prepare` with the same cost table, and lies at or below the reference.
        feasible: with `prepared`: True, some allowed bit-widths meet it; False, none do; None,
            either.

    Raises:
        UsageError: `feasible` without `prepared`, or a network whose costs do not fit: not priced
            yet, or costing nothing where an infeasible budget is asked for.
    """
    if prepared is None:
        if feasible is not None:
            raise UsageError(f"feasible={feasible} needs the network it is meant for: prepared=")
        return _any_budget()
    accounting = _accounting(prepared)
    default = next(iter(prepared.plan.settings.tables))
    names = [name for name, found in accounting.resources.items() if found.reference > 0]
    dear = [name for name in names if _floor(accounting, name) > 0]
    if not names or (feasible is False and not dear):
        raise UsageError(
            "the network costs nothing at its lowest bit-widths, so no budget is "
            f"{'infeasible' if names else 'a share of its cost'}; take one with priced layers"
        )
    ways = []
    if feasible is not False:
        ways.append(_feasible(accounting, names))
    if feasible is not True and dear:
        ways.append(_infeasible(accounting, names, dear))
    return st.one_of(ways).flatmap(lambda limits: _form(limits, accounting, default))


def bit_width_assignments(prepared: PreparedModule) -> st.SearchStrategy[dict[str, int]]:
    """Draw one allowed bit-width for every quantizer, by site; shrinks to the widest.

    ``prepared.set_bit_widths(list(drawn.values()))`` sets them.

    Raises:
        UsageError: the network is not priced yet.
    """
    sites = _accounting(prepared).sites
    # Not st.fixed_dictionaries: it does not keep the order of the sites.
    choices = st.tuples(*(st.sampled_from(site.allowed[::-1]) for site in sites))
    return choices.map(lambda bits: dict(zip((site.name for site in sites), bits, strict=True)))


def _accounting(prepared: PreparedModule) -> Accounting:
    if not prepared.plan.is_priced:
        raise UsageError(
            "the network is not priced yet; give prepare its example_inputs, or run one batch"
        )
    return prepared.plan.accounting


def _floor(accounting: Accounting, name: str) -> Fraction:
    return accounting.resources[name].floor([site.allowed for site in accounting.sites])


@st.composite
def _feasible(draw: st.DrawFn, accounting: Accounting, names: Sequence[str]) -> dict[str, Fraction]:
    """Draw bounds, in the resources' units, that one choice of bit-widths meets together."""
    chosen = st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)
    bounded: list[str] = draw(chosen)
    bits = next(accounting.candidate_bits((), ()))
    if draw(st.booleans()):
        bits = tuple(draw(st.sampled_from(site.allowed)) for site in accounting.sites)
    totals = accounting.totals(bits)
    return {name: _between(draw, accounting, name, totals[name]) for name in bounded}


def _between(draw: st.DrawFn, accounting: Accounting, name: str, least: Fraction) -> Fraction:
    """Draw a bound from `least` up to the reference, never zero."""
    reference = accounting.resources[name].reference
    bound = least + max(reference - least, Fraction(0)) * (1 - draw(_PLACES))
    return bound or reference


@st.composite
def _infeasible(
    draw: st.DrawFn, accounting: Accounting, names: Sequence[str], dear: Sequence[str]
) -> dict[str, Fraction]:
    """Draw bounds of which at least one lies below the floor of its resource."""
    missed = draw(st.sampled_from(dear))
    others = [name for name in names if name != missed]
    share = draw(st.fractions(Fraction(1, 64), Fraction(63, 64), max_denominator=64))
    bounds = {missed: _floor(accounting, missed) * share}
    if bool(others) and draw(st.booleans()):
        other = draw(st.sampled_from(others))
        bounds[other] = _between(draw, accounting, other, _floor(accounting, other))
    return bounds


@st.composite
def _form(
    draw: st.DrawFn, limits: dict[str, Fraction], accounting: Accounting, default: str
) -> Any:
    """Draw how bounds are written; never lower than they are, by less than one part in 10^5."""
    written: dict[str, Any] = {}
    for name, bound in limits.items():
        resource = accounting.resources[name]
        share = bound / resource.reference
        forms: list[Any] = [amount_at_least(bound, resource.unit, _DIGITS)]
        text = number_at_least(share, _DIGITS)
        if Fraction(text) <= 1:
            forms = [f"{number_at_least(share * 100, _DIGITS)}%", *forms, text, float(text)]
        written[name] = draw(st.sampled_from(forms))
    return _wrapped(draw, written, default)


def _wrapped(draw: st.DrawFn, written: dict[str, Any], default: str) -> Any:
    """Draw whether to give limits bare, as a mapping or as a `Budget`."""
    forms: list[Any] = [written, Budget(written)]
    if list(written) == [default]:
        forms = [written[default], *forms, Budget(written[default])]
    return draw(st.sampled_from(forms))


@st.composite
def _any_budget(draw: st.DrawFn) -> Any:
    """Draw a budget that can be read; what it bounds is up to the cost tables of the call."""
    chosen = st.lists(st.sampled_from(_NAMES), min_size=1, max_size=3, unique=True)
    names: list[str] = draw(chosen)
    written = {name: draw(_limits()) for name in names}
    return _wrapped(draw, written, names[0])


@st.composite
def _limits(draw: st.DrawFn) -> Any:
    share = 1 - draw(st.fractions(0, Fraction(999, 1000), max_denominator=1000))
    text = number_at_least(share, _DIGITS)
    amount = f"{draw(st.integers(1, 999))} {draw(st.sampled_from(sorted(UNITS)))}"
    percent = f"{number_at_least(share * 100, 3)}%"
    return draw(st.sampled_from((percent, float(text), text, share, amount)))
