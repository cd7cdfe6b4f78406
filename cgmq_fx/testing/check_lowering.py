"""`check_lowering`: a lowered module computes what the prepared one does, within the budgets."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from cgmq_fx.frozen import FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.passes.freeze_bit_widths import FreezeBitWidths
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.specialize_evaluation import SpecializeEvaluation
from cgmq_fx.passes.trace import fast_path_off
from cgmq_fx.prepared import PreparedModule, one_sample
from cgmq_fx.report import report
from cgmq_fx.testing.compare import (
    REASSOCIATION,
    Inputs,
    output_faults,
    persistent,
    positional_inputs,
    run,
    split_inputs,
    tensor_fault,
    tensors_of,
)
from cgmq_fx.testing.integer_laws import integer_faults
from cgmq_fx.testing.law_error import require
from cgmq_fx.testing.recompute import memory_bytes, products_of

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def check_lowering(
    prepared: PreparedModule,
    inputs: Inputs,
    *,
    bits: Mapping[str, int] | Sequence[int] | None = None,
    source: str = "",
) -> LoweredModule:
    """Lower a copy of a prepared model, hold the result to its laws, and return it.

    The laws: freezing the bit-widths changes no bit of any output; folding batch norms changes each
    tensor by no more than reordered float operations do, and each code by at most one; bit-widths,
    totals and the report say what the module holds, and a count of its own agrees; no budget is
    exceeded; its state dict loads; copies compute the same; sums of products of codes are exact,
    and what is computed in float is within a bound of them; `prepared` stays as it was.

    Args:
        prepared: what `cgmq_fx.prepare` returned; it is left as it is.
        inputs: a tensor, the positional inputs of one call, or a mapping of its keyword inputs.
        bits: bit-widths to lower at, by site or in the order of ``prepared.bit_widths``; the
            present ones by default.
        source: the case as Python, for messages.

    Raises:
        LawError: a law is broken.
        BudgetError: no bit-widths meet the budgets.
    """
    args, kwargs = split_inputs(inputs)
    given = positional_inputs(prepared, *args, **kwargs)
    subject = f"lower({type(prepared).__name__})"
    kept = {name: value.clone() for name, value in prepared.state_dict().items()}
    twin = _ready(prepared, given, bits)
    frozen = copy.deepcopy(twin)
    fixed = lower(twin, allow_untrained=True)
    within = fixed.bit_widths == twin.bit_widths
    checks: dict[str, Iterator[str]] = {
        "prepared stays": _state_faults(kept, prepared),
        "bit-widths": _width_faults(twin, fixed),
        "budget": _budget_faults(fixed, given),
        "state": _own_state_faults(fixed),
        "copies": _copy_faults(fixed, given),
    }
    if within:
        Pipeline((SpecializeEvaluation(), FreezeBitWidths())).run(frozen)
        checks |= {
            "freezing is exact": persistent(lambda: _exact_faults(twin, frozen, given)),
            "folding is rounding": persistent(lambda: _folding_faults(frozen, fixed, given)),
        }
    checks["integers"] = integer_faults(fixed, copy.deepcopy(given))
    for law, faults in checks.items():
        require(law, f"{subject} at {fixed.bit_widths}", faults, source)
    return fixed


def _ready(
    prepared: PreparedModule,
    inputs: tuple[Any, ...],
    bits: Mapping[str, int] | Sequence[int] | None,
) -> PreparedModule:
    """Return a copy in evaluation mode at the wanted widths, whose ranges are fitted."""
    twin = copy.deepcopy(prepared).eval()
    run(twin, inputs, training=False)
    if bits is not None:
        by_site = (
            bits if isinstance(bits, Mapping) else dict(zip(twin.bit_widths, bits, strict=True))
        )
        twin.set_bit_widths([by_site.get(site, width) for site, width in twin.bit_widths.items()])
        run(twin, inputs, training=False)
    return twin


def _state_faults(kept: Mapping[str, Tensor], prepared: PreparedModule) -> Iterator[str]:
    for name, value in prepared.state_dict().items():
        if not torch.equal(kept[name], value):
            yield f"lower changed '{name}' of the prepared model"


# -- numbers ---------------------------------------------------------------------------------------


def _exact_faults(one: nn.Module, two: nn.Module, inputs: tuple[Any, ...]) -> Iterator[str]:
    # torch.matmul takes another kernel, with other roundings, where an operand needs a gradient.
    copies = [copy.deepcopy(module).requires_grad_(False) for module in (one, two)]
    yield from output_faults(*(run(module, inputs, training=False)[0] for module in copies))


def _folding_faults(
    frozen: fx.GraphModule, fixed: LoweredModule, inputs: tuple[Any, ...]
) -> Iterator[str]:
    """Run both graphs, node by node; after each quantizer go on with the codes of the first.

    So every tensor is compared where both read the same codes: a value at a rounding boundary that
    falls to the next code is seen as that, and does not spread.
    """
    if not any(isinstance(module, _NORMS) for module in frozen.modules()):
        yield from _exact_faults(frozen, fixed, inputs)
        return
    with torch.no_grad(), fast_path_off():
        leader = _Recorder(frozen)
        wanted = leader.run(*copy.deepcopy(inputs))
        follower = _Follower(fixed, leader.codes)
        found = follower.run(*copy.deepcopy(inputs))
    yield from follower.faults
    yield from output_faults(wanted, found, REASSOCIATION)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what its quantizers of activations return, by site and call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.codes: dict[str, tuple[Tensor, Tensor]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Keep input and output of a frozen quantizer."""
        given = args[0].clone() if args and isinstance(args[0], Tensor) else None
        result = super().call_module(target, args, kwargs)
        module = self.module.get_submodule(target)
        if isinstance(module, FrozenQuantizer) and given is not None:
            self.codes[_call(target, self.codes)] = given, result.clone()
        return result


class _Follower(fx.Interpreter):
    """Runs a folded graph on the codes that another run had, and tells where its own differ."""

    def __init__(self, gm: fx.GraphModule, codes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.codes = codes
        self.seen: dict[str, bool] = {}
        self.faults: list[str] = []

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Compare input and output of a frozen quantizer, and go on with the other run's."""
        given = args[0] if args else None
        result = super().call_module(target, args, kwargs)
        module = self.module.get_submodule(target)
        if not isinstance(module, FrozenQuantizer) or not isinstance(given, Tensor):
            return result
        call = _call(target, self.seen)
        self.seen[call] = True
        before, wanted = self.codes[call]
        text = tensor_fault(before, given, REASSOCIATION)
        if text:
            self.faults.append(f"the input of '{call}' {text}")
        steps = ((result - wanted) / module.scale.max()).abs()
        if wanted.is_floating_point() and wanted.numel() and float(steps.max()) > 1.5:
            self.faults.append(f"the codes of '{call}' differ by {float(steps.max()):.3g} steps")
        return wanted.clone()


def _call(target: str, seen: Mapping[str, object]) -> str:
    """Return the name of a call of a quantizer, which may stand at several places."""
    count = 1
    while f"{target}#{count}" in seen:
        count += 1
    return f"{target}#{count}"


# -- widths and budgets ----------------------------------------------------------------------------


def _width_faults(twin: PreparedModule, fixed: LoweredModule) -> Iterator[str]:
    accounting = twin.plan.accounting
    bits = [twin.bit_widths[name] for name in accounting.site_names]
    satisfied = accounting.is_satisfied(bits)
    for site, width in twin.bit_widths.items():
        found = fixed.bit_widths[site]
        if (satisfied and found != width) or found > width:
            yield f"the site '{site}' was at {width} bits and is at {found}"
    for path, module in fixed.named_modules():
        if isinstance(module, FrozenModule):
            levels = module.quant_max - module.quant_min + 1
            if levels > 2**module.bit_width:
                yield f"'{path}' has {levels} levels at {module.bit_width} bits"
            if isinstance(module, FrozenWeight):
                yield from _code_faults(path, module)


def _code_faults(path: str, module: FrozenWeight) -> Iterator[str]:
    codes, held = module.codes, module.packed.numel() * module.packed.element_size()
    if held != -(-codes.numel() * module.bit_width // 8):
        yield f"'{path}' holds {codes.numel()} codes in {held} bytes, {module}"
    if codes.numel():
        low, high = (int(end) for end in codes.aminmax())
        if low < module.quant_min or high > module.quant_max:
            yield f"'{path}' holds codes from {low} to {high}, {module}"


def _budget_faults(fixed: LoweredModule, inputs: tuple[Any, ...]) -> Iterator[str]:
    plan = fixed.plan
    accounting = plan.accounting
    totals = accounting.totals([fixed.bit_widths[name] for name in accounting.site_names])
    for name, limit in accounting.limits.items():
        if totals[name] > limit:
            yield f"{name} is {totals[name]}, the budget {limit}"
    for summary in report(fixed).resources:
        if summary.total != totals[summary.name]:
            yield f"the report has {summary.name} {summary.total}, the plan {totals[summary.name]}"
    if "bops" in totals:
        yield from _product_faults(fixed, inputs, totals["bops"])
    if "weight_memory" in totals:
        yield from _memory_faults(fixed, totals["weight_memory"])


def _product_faults(
    fixed: LoweredModule, inputs: tuple[Any, ...], total: Fraction
) -> Iterator[str]:
    sample = one_sample(inputs, fixed.plan.settings.batch_axis)
    try:
        products = products_of(fixed, copy.deepcopy(sample))
    except AssertionError as error:  # codes or levels that do not fit their bits
        yield str(error)
        return
    counted = sum(product.bops for product in products)
    if counted != total:
        listed = ", ".join(f"{p.name} {p.macs} MACs {p.bits}" for p in products)
        yield f"bops is {total}, a run of the module has {counted}: {listed}"


def _memory_faults(fixed: LoweredModule, total: Fraction) -> Iterator[str]:
    held = memory_bytes(fixed)
    if held > total:
        yield f"weight_memory is {total} byte, the module holds {held} byte"


# -- the module itself -----------------------------------------------------------------------------


def _own_state_faults(fixed: LoweredModule) -> Iterator[str]:
    if any(parameter.requires_grad for parameter in fixed.parameters()):
        yield "some parameter still requires a gradient"
    if any(module.training for module in fixed.modules()):
        yield "some module is in training mode"
    strange = [name for name in fixed.state_dict() if name.startswith("quantizers.")]
    if strange:
        yield f"it still holds {strange[:5]}"
    twin = copy.deepcopy(fixed)
    for buffer in twin.buffers():
        buffer.zero_()
    try:
        twin.load_state_dict(fixed.state_dict(), strict=True)
    except RuntimeError as error:
        yield f"its own state dict does not load: {error}"
        return
    for name, value in fixed.state_dict().items():
        if not torch.equal(twin.state_dict()[name], value):
            yield f"'{name}' is another one after loading it"


def _copy_faults(fixed: LoweredModule, inputs: tuple[Any, ...]) -> Iterator[str]:
    twin = copy.deepcopy(fixed)
    yield from persistent(lambda: _exact_faults(fixed, twin, inputs))
    wanted, _ = run(fixed, inputs, training=False)
    if twin.bit_widths != fixed.bit_widths:
        yield f"a copy has the bit-widths {twin.bit_widths}, not {fixed.bit_widths}"
    if any(tensor.requires_grad for tensor in tensors_of(wanted)):
        yield "an output requires a gradient"
