"""`lower`: a trained prepared model in, a fixed mixed-precision module within every budget out."""

import copy
from collections.abc import Mapping

from torch import nn

from cgmq_fx.accounting import Accounting
from cgmq_fx.choose_bits import lower_to_budget
from cgmq_fx.errors import BudgetError, TrainingError, UsageError
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.fold_batch_norm import FoldBatchNorm
from cgmq_fx.passes.freeze_bit_widths import FreezeBitWidths, reads_floats, settle_ranges
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.specialize_evaluation import SpecializeEvaluation
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.units import format_amount
from cgmq_fx.wrapped import check_sharding, gathered, unwrapped

PASSES = (SpecializeEvaluation(), FreezeBitWidths(), FoldBatchNorm())


def lower(prepared: PreparedModule, *, allow_untrained: bool = False) -> LoweredModule:
    """Return a copy of `prepared` with fixed bit-widths, integer weights and folded batch norms.

    It computes what ``prepared.eval()`` does, up to the float rounding of folded batch norms.
    Where the present bit-widths exceed a budget, because training stopped early, those that the
    loss needs least are lowered first. `prepared` stays as it is and can be trained on.

    Args:
        prepared: what `cgmq_fx.prepare` returned, trained under a guide or calibrated, also where
            `DistributedDataParallel` or `torch.compile` wraps it. After ``fully_shard(prepared)``
            every rank has to call `lower`, and each gets the whole module.
        allow_untrained: lower a model that was neither trained under a guide nor calibrated.

    Raises:
        BudgetError: no bit-widths within every budget were found.
        TrainingError: it was not trained, or has not seen a batch since it was made or loaded.
        UsageError: `prepared` is not a prepared model.
    """
    prepared = _prepared(prepared)
    accounting = prepared.plan.accounting
    twin = copy.deepcopy(gathered(prepared)).eval()
    settle_ranges(twin)
    name = type(prepared).__name__
    _check_is_trained(twin, name, allow_untrained)
    if not accounting.is_satisfied(list(twin.bit_widths.values())):
        lower_to_budget(twin)
        _check_budgets(accounting, twin.bit_widths)
    settle_ranges(twin)
    _check_ranges(twin, name)
    Pipeline(PASSES).run(twin)
    fixed = LoweredModule(twin, twin.graph, class_name=name)
    fixed.requires_grad_(requires_grad=False)
    _check_budgets(accounting, fixed.bit_widths)
    return fixed


def _prepared(given: object) -> PreparedModule:
    name = type(given).__name__
    if isinstance(given, LoweredModule):
        raise UsageError(
            f"{name} is lowered already, to {given.bit_widths}; use it as it is, or give lower "
            f"the prepared model that it was made from"
        )
    prepared = unwrapped(given)
    if isinstance(prepared, PreparedModule):
        check_sharding(prepared, "lower")
        return prepared
    kind = "a float model" if isinstance(given, nn.Module) else "not a model"
    raise UsageError(
        f"lower got {name}, {kind}; it takes what cgmq_fx.prepare(model, budget) returned"
    )


def _check_is_trained(prepared: PreparedModule, name: str, allow_untrained: bool) -> None:
    faults = []
    steps = int(prepared.plan.steps)
    if steps == 0 and prepared.plan.calibrated_on == 0 and not allow_untrained:
        faults.append(
            f"it was trained for {steps} steps under a guide; train it with "
            f"cgmq_fx.attach(prepared, optimizer) or cgmq_fx.fit, calibrate it with "
            f"cgmq_fx.calibrate(prepared, loader), or lower it as it is with "
            f"lower(prepared, allow_untrained=True)"
        )
    blind = [site for site, item in _quantizers(prepared).items() if not item.is_calibrated]
    if blind:
        faults.append(
            f"its quantizers {blind} never saw a tensor, so that their ranges are unknown; run at "
            f"least one batch through it"
        )
    if faults:
        raise TrainingError(f"{name} cannot be lowered: {'; and '.join(faults)}")


def _check_ranges(twin: PreparedModule, name: str) -> None:
    blind = [site for site, item in _quantizers(twin).items() if item.refit_pending]
    if blind:
        raise TrainingError(
            f"{name} cannot be lowered: the bit-widths of {blind} changed since the "
            f"model was loaded, and no batch was seen to fit their ranges on; run a batch through "
            f"it first"
        )


def _quantizers(prepared: PreparedModule) -> dict[str, Quantizer]:
    """Return by site the quantizers of floating-point tensors."""
    found: dict[str, Quantizer] = {}
    for node in prepared.graph.nodes:
        if is_quantizer(prepared, node) and reads_floats(node):
            site = str(node.target).rpartition(".")[2]
            found[site] = prepared.quantizers[site]
    return found


def _check_budgets(accounting: Accounting, bit_widths: Mapping[str, int]) -> None:
    over = accounting.violations([bit_widths[site] for site in accounting.site_names])
    if over:
        listed = "; ".join(
            f"{name} by {format_amount(excess, accounting.resources[name].unit, 6)} above "
            f"{format_amount(accounting.limits[name], accounting.resources[name].unit, 6)}"
            for name, excess in sorted(over.items())
        )
        raise BudgetError(
            f"the bit-widths {dict(bit_widths)} exceed the budget {listed}; train on with "
            f"cgmq_fx.attach, or raise the budget in cgmq_fx.prepare"
        )
