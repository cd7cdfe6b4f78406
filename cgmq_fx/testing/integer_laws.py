"""Laws of products on integer codes: exact sums, and how far floats may be from them."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cgmq_fx.frozen import FrozenModule
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.integer_products import (
    PRODUCT_CLASSES,
    Accumulation,
    Product,
    Steps,
    accumulate,
    terms_of,
)
from cgmq_fx.integer_reference import IntegerInterpreter, values_of
from cgmq_fx.lowered import LoweredModule

# Roundings besides one for each addition: of both factors and of the attention scale (1 each), of a
# product, of what is added and of adding it, and of the reference's result; and one to spare.
_ROUNDINGS = 8


def integer_faults(
    fixed: LoweredModule, inputs: tuple[Any, ...], run: "ProductComparison | None" = None
) -> Iterator[str]:
    """Yield where the products of one run are not those of integers.

    Sums of integers are the same in float kernels as in int64, bit for bit, and no larger than was
    said; what the module computes in float is within `rounding_bound` of them; every operation with
    codes on both sides has its sum; and all scales are positive.

    Args:
        fixed: the lowered module.
        inputs: of one call, all by position.
        run: a new comparison of the module, for what it counts besides.
    """
    for path, module in fixed.named_modules():
        if isinstance(module, FrozenModule) and not bool((module.scale > 0).all()):
            yield f"'{path}' has a scale that is not positive"
    run = run or ProductComparison(fixed)
    with torch.no_grad():
        run.run(*inputs)
    yield from run.faults
    yield from _missing(fixed, run.names)


def rounding_bound(product: Product, factors: tuple[Steps, Steps], found: Accumulation) -> Tensor:
    """Return how far float arithmetic may take each element of an operation from the exact one.

    With n roundings in a row, each by a share u at most, a term ends within ``n u / (1 - n u)`` of
    itself, whatever the order of the sum (Higham, Accuracy and Stability of Numerical Algorithms,
    lemma 3.1); the bound is that share of the sum of the sizes of all terms. Kernels that do not
    sum products (Winograd, FFT) or round the factors (TF32) may be further off.
    """
    limits = torch.finfo(factors[0].value.dtype)
    count = terms_of(product, *factors) + _ROUNDINGS
    share = count * limits.eps / 2
    sizes = product.of(*(item.steps.abs().to(torch.float64) for item in factors))
    sizes = sizes * found.scale.abs() * abs(product.factor)
    added = product.added(sizes)
    if added is not None:
        sizes = sizes + added.abs()
    if share >= 1:
        return torch.full_like(sizes, torch.inf)
    return sizes * share / (1 - share) + count * limits.tiny


class ProductComparison(IntegerInterpreter):
    """Computes every product three times: in int64, in float kernels, and as the module does.

    Attributes:
        kernels_used: how many products ran in each type of float kernels.
        compared: sums of integers that were computed in both kinds of kernels.
        mismatches: those that differed.
        largest_bound: what no partial sum of any product can exceed.
        names: of the operations.
        faults: what broke a law.
    """

    def __init__(self, fixed: LoweredModule) -> None:
        super().__init__(fixed, "int64")
        self.kernels_used: Counter[torch.dtype] = Counter()
        self.compared = self.mismatches = self.largest_bound = 0
        self.names: set[str] = set()
        self.faults: list[str] = []

    def accumulated(
        self, name: str, product: Product, factors: tuple[Steps, Steps], found: Accumulation
    ) -> None:
        """Compare the three."""
        floats = accumulate(product, *factors, "float")
        assert floats is not None
        kind = floats.values.dtype
        wrong = int((found.values != floats.values.to(torch.int64)).sum())
        self.names.add(name)
        self.kernels_used[kind] += 1
        self.compared += found.values.numel()
        self.mismatches += wrong
        self.largest_bound = max(self.largest_bound, found.bound)
        if wrong:
            self.faults.append(f"{wrong} sums of '{name}' in {kind} are not the integers")
        if not torch.equal(found.result, floats.result):
            self.faults.append(f"'{name}' returns other numbers on {kind} kernels")
        if found.values.numel():
            self.faults += _distance_faults(name, product, factors, found)


def _distance_faults(
    name: str, product: Product, factors: tuple[Steps, Steps], found: Accumulation
) -> Iterator[str]:
    largest = int(found.values.abs().max())
    if largest > found.bound:
        yield f"a sum of '{name}' is {largest}, above its bound {found.bound}"
    plain = product.function(*values_of(product.args), **values_of(product.kwargs))
    gap = (plain.to(torch.float64) - found.result.to(torch.float64)).abs()
    excess = gap / rounding_bound(product, factors, found)
    if bool((excess > 1).any()):
        yield f"'{name}' in float is off by {float(excess.max()):.3g} times what roundings allow"


def _missing(fixed: LoweredModule, seen: set[str]) -> Iterator[str]:
    accounting = fixed.plan.accounting
    width_of = [fixed.bit_widths[name] for name in accounting.site_names]
    for bound in accounting.operations:
        name = bound.operation.name
        widths = [
            FLOAT_WIDTH if source.site is None else width_of[source.site]
            for source in bound.sources
        ]
        multiplies = bound.operation.op in PRODUCT_CLASSES | {"attention"}
        if multiplies and max(widths, default=FLOAT_WIDTH) < FLOAT_WIDTH and name not in seen:
            yield f"'{name}' has codes on both sides and no sum of integers"
    for name in seen - {bound.operation.name for bound in accounting.operations}:
        yield f"a sum has the name '{name}', which no operation has"
