"""What the trainers' logs show of a prepared model."""

from cgmq_fx.prepared import PreparedModule


def figures(prepared: PreparedModule, *, bit_widths: bool) -> dict[str, float]:
    """Return by name each cost as a share of its budget and, where asked for, each bit-width."""
    plan = prepared.plan
    found: dict[str, float] = {}
    if plan.is_priced:
        totals = plan.accounting.totals(list(prepared.bit_widths.values()))
        for resource, limit in plan.accounting.limits.items():
            share = float(totals[resource] / limit) if limit else float(totals[resource] > 0)
            found[f"cgmq/{resource}_of_budget"] = share
    if bit_widths:
        found |= {f"cgmq/bits/{site}": float(bits) for site, bits in prepared.bit_widths.items()}
    return found
