"""Exact totals of a network's cost, evaluated at once for all operations.

Costs are kept as whole numbers of the table's resolution (the common denominator of its prices), so
a total is a sum of integers: one gather and one sum over a ``torch.int64`` tensor, without
rounding.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from cgmq_fx.cost.floor import Lowest, lowest_total
from cgmq_fx.cost.mixture import WidthIndex, has_mixture
from cgmq_fx.cost.operation import BoundOperation, Operation
from cgmq_fx.cost.pricing import price_operations
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.terms import Term, no_price
from cgmq_fx.errors import CostTableError, UsageError

#: Sums that could pass this are computed with Python's unbounded integers instead of int64.
MAX_INT64_SUM = 2**62
_NO_PRICE = -1
#: Bit-width of parameters that are not quantized.
FLOAT_BITS = 32


class Resource(Protocol):
    """A cost that a budget may bound, as a function of the bit-widths of all sites.

    Widths are given as indices into `widths`, a sequence of length `num_sites`. Amounts are exact,
    in `unit`, or "scaled": whole numbers of 1 / `scale` of it.
    """

    @property
    def name(self) -> str:
        """What budgets call it."""

    @property
    def unit(self) -> str:
        """Unit of its amounts."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The bit-widths that a site may have, rising."""

    @property
    def num_sites(self) -> int:
        """Number of learned bit-widths."""

    @property
    def reference(self) -> Fraction:
        """The amount that "100 %" means."""

    @property
    def supported(self) -> tuple[tuple[int, ...], ...]:
        """For each site the bit-widths that the hardware has."""

    @property
    def scale(self) -> int:
        """Amounts are whole numbers of 1 / `scale` of the unit."""

    @property
    def terms(self) -> tuple[Term, ...]:
        """What the total is made of: operations or tensors, by the widths of their sites."""

    @property
    def rows(self) -> tuple[Row | None, ...]:
        """The row that prices each operation; none where no table prices operations."""

    def total(self, width_index: Sequence[WidthIndex]) -> Fraction:
        """Return the amount of the whole network."""

    def total_scaled(self, width_index: Sequence[int]) -> int:
        """Return the scaled amount of the whole network."""

    def bound_scaled(self, bound: Fraction) -> int:
        """Return the largest scaled total that is within `bound`."""

    def costs(self, width_index: Sequence[WidthIndex]) -> list[Fraction]:
        """Return the part that each of `terms` has in the total; they add up to it exactly."""

    def delta_scaled(self, site: int, to: int, width_index: Sequence[int]) -> int:
        """Return by how much the scaled total changes when one site changes."""

    def relief(self, site: int, to: int, width_index: Sequence[int], limit: int) -> int:
        """Return how much nearer a scaled total above `limit` comes to it when one site changes.

        Also where the total does not change, since other sites must change as well.
        """

    def lowest(self, allowed: Sequence[tuple[int, ...]]) -> Lowest:
        """Return the smallest total, and the widths that reach it."""

    def delta(self, site: int, to: int, width_index: Sequence[int]) -> Fraction:
        """Return by how much the total changes when `site` takes the width of index `to`."""

    def floor(self, allowed: Sequence[tuple[int, ...]]) -> Fraction:
        """Return the smallest total that the allowed bit-widths of each site reach."""


class SumResource:
    """A resource that is a sum over operations (or tensors), each with at most two bit-widths.

    Attributes:
        name: what budgets call it.
        unit: unit of its amounts.
        widths: the bit-widths that a site may have, rising.
        num_sites: number of learned bit-widths.
        terms: the addends, in the order of `costs`.
        scale: amounts are whole numbers of 1 / `scale` of the unit.
        reference: the amount that "100 %" means.
        supported: for each site the bit-widths that the hardware has.
        operations: the operations that the terms price; none for `weight_memory`.
        rows: the row that prices each of `operations`, or None.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        widths: tuple[int, ...],
        num_sites: int,
        terms: Sequence[Term],
        scale: int,
        reference: Fraction,
        *,
        supported: Sequence[tuple[int, ...]] | None = None,
        operations: Sequence[Operation] = (),
        rows: Sequence[Row | None] = (),
    ) -> None:
        _check_widths(widths)
        self.name = name
        self.unit = unit
        self.widths = widths
        self.num_sites = num_sites
        self.terms = tuple(terms)
        self.scale = scale
        self.reference = reference
        self.supported = tuple(supported) if supported is not None else (widths,) * num_sites
        self.operations = tuple(operations)
        self.rows = tuple(rows)
        self._touching: list[list[Term]] = [[] for _ in range(num_sites)]
        for term in self.terms:
            for site in {site for site in term.sites if site is not None}:
                self._touching[site].append(term)
        self._build_gather()

    def _build_gather(self) -> None:
        """Lay all costs end to end; a term's cost stands at offset + index * stride + ..."""
        moving = [term for term in self.terms if term.sites != (None, None)]
        self._moving = tuple(moving)
        fixed = [term for term in self.terms if term.sites == (None, None)]
        self._fixed = sum(term.cost(()) for term in fixed)
        self._fits_int64 = sum(term.most for term in self.terms) < MAX_INT64_SUM
        if not self._fits_int64:
            return
        cells = [[cost for row in term.costs for cost in row] for term in moving]
        lengths = torch.tensor([len(costs) for costs in cells], dtype=torch.int64)
        self._offset = lengths.cumsum(0) - lengths
        self._flat = torch.tensor(
            [_NO_PRICE if cost is None else cost for costs in cells for cost in costs],
            dtype=torch.int64,
        )
        self._partial = any(cost is None for costs in cells for cost in costs)
        sites = [[0 if site is None else site for site in term.sites] for term in moving]
        strides = [
            [0 if term.sites[0] is None else len(term.costs[0]), 0 if term.sites[1] is None else 1]
            for term in moving
        ]
        self._site = torch.tensor(sites, dtype=torch.int64).reshape(-1, 2).T.contiguous()
        self._stride = torch.tensor(strides, dtype=torch.int64).reshape(-1, 2).T.contiguous()

    def _gather(self, width_index: Tensor) -> Tensor:
        """Return the scaled cost of each moving term, shape ``(len(self._moving),)``."""
        index = width_index.to("cpu", torch.int64)
        at = index[self._site[0]].mul_(self._stride[0])
        at.addcmul_(index[self._site[1]], self._stride[1]).add_(self._offset)
        costs = self._flat[at]
        if self._partial and bool((costs == _NO_PRICE).any()):
            missing = (costs == _NO_PRICE).nonzero().flatten().tolist()
            raise CostTableError(no_price([self._moving[i].name for i in missing]))
        return costs

    def _check_index(self, width_index: Tensor | Sequence[WidthIndex]) -> None:
        if len(width_index) != self.num_sites:
            raise UsageError(
                f"resource {self.name!r} has {self.num_sites} sites, widths were given for "
                f"{len(width_index)}"
            )

    def total_scaled(self, width_index: Tensor | Sequence[int]) -> int:
        """Return the total as a whole number of 1 / `scale` of the unit."""
        self._check_index(width_index)
        if not self._fits_int64:
            at = width_index.tolist() if isinstance(width_index, Tensor) else width_index
            return sum(term.cost(at) for term in self.terms)
        if not self._moving:
            return self._fixed
        return self._fixed + int(self._gather(torch.as_tensor(width_index)).sum())

    def total(self, width_index: Tensor | Sequence[WidthIndex]) -> Fraction:
        """Return the amount of the whole network, for one sample."""
        if has_mixture(width_index):
            return sum(self.costs(width_index), Fraction(0))
        return Fraction(self.total_scaled(width_index), self.scale)  # type: ignore[arg-type]

    def costs(self, width_index: Tensor | Sequence[WidthIndex]) -> list[Fraction]:
        """Return the amount of each term; they add up to `total` exactly."""
        self._check_index(width_index)
        at = width_index.tolist() if isinstance(width_index, Tensor) else width_index
        return [term.cost_of(at) / self.scale for term in self.terms]

    def bound_scaled(self, bound: Fraction) -> int:
        """Return the largest scaled total that is within `bound`."""
        return bound.numerator * self.scale // bound.denominator

    def delta_scaled(self, site: int, to: int, width_index: Sequence[int]) -> int:
        """Return by how much the scaled total changes when `site` takes the width of index `to`.

        Args:
            site: the one site that changes.
            to: index of its new width.
            width_index: index of the present width of every site; a list, since single elements are
                read.
        """
        changed = _Changed(width_index, site, to)
        return sum(term.cost(changed) - term.cost(width_index) for term in self._touching[site])

    def relief(self, site: int, to: int, width_index: Sequence[int], limit: int) -> int:
        """Return what a move saves; in a sum that is all that brings it nearer to `limit`."""
        return -self.delta_scaled(site, to, width_index)

    def delta(self, site: int, to: int, width_index: Sequence[int]) -> Fraction:
        """Return by how much the total changes when `site` takes the width of index `to`."""
        return Fraction(self.delta_scaled(site, to, width_index), self.scale)

    def lowest(self, allowed: Sequence[tuple[int, ...]]) -> Lowest:
        """Return the smallest total, and the widths that reach it.

        Args:
            allowed: the allowed bit-widths of each site (bits, not indices).

        Raises:
            UsageError: a site has none, or one that is not among `widths`.
            CostTableError: the hardware does not have some of them.
        """
        self._check_index([0] * len(allowed))
        indices = [tuple(sorted(map(self._index_of, choices))) for choices in allowed]
        empty = [site for site, choices in enumerate(indices) if not choices]
        if empty:
            raise UsageError(f"sites {empty} have no allowed bit-width; allow at least one each")
        return lowest_total(self.terms, indices)

    def floor(self, allowed: Sequence[tuple[int, ...]]) -> Fraction:
        """Return the smallest total that the allowed bit-widths reach; see `cgmq_fx.cost.floor`."""
        return Fraction(self.lowest(allowed).scaled, self.scale)

    def _index_of(self, width: int) -> int:
        if width not in self.widths:
            raise UsageError(f"bit-width {width} is not among {list(self.widths)}")
        return self.widths.index(width)

    @property
    def unpriced(self) -> tuple[Operation, ...]:
        """Operations that have MACs and cost nothing, since no row prices them."""
        pairs = zip(self.operations, self.rows, strict=True)
        return tuple(operation for operation, row in pairs if row is None and operation.macs > 0)

    @property
    def without_row(self) -> tuple[Operation, ...]:
        """Operations without MACs that no row prices."""
        pairs = zip(self.operations, self.rows, strict=True)
        return tuple(operation for operation, row in pairs if row is None and operation.macs == 0)


class _Changed(Sequence[int]):
    """A sequence of widths with one of them replaced, without copying it."""

    def __init__(self, base: Sequence[int], site: int, to: int) -> None:
        self.base, self.site, self.to = base, site, to

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return self.to if index == self.site else self.base[index]

    def __len__(self) -> int:
        return len(self.base)


def _check_widths(widths: tuple[int, ...]) -> None:
    if not widths or list(widths) != sorted(set(widths)) or widths[0] < 0:
        raise UsageError(f"bit-widths must be whole, rising and none twice, found {list(widths)}")


def price(
    bound_operations: Sequence[BoundOperation],
    table: CostTable,
    num_sites: int,
    widths: tuple[int, ...],
) -> SumResource:
    """Return the cost of a network by `table` as a function of its bit-widths.

    Args:
        bound_operations: operations and where their bit-widths come from; fixed bit-widths need not
            be among `widths`.
        table: the prices.
        num_sites: number of learned bit-widths.
        widths: the bit-widths that a site may have, rising.

    Raises:
        CostTableError: the table cannot price all operations; the message lists those.
    """
    _check_widths(widths)
    pricing = price_operations(bound_operations, table, num_sites, widths)
    return SumResource(
        table.name,
        table.unit,
        widths,
        num_sites,
        pricing.terms,
        pricing.scale,
        pricing.reference,
        supported=[tuple(widths[i] for i in choices) for choices in pricing.supported],
        operations=pricing.operations,
        rows=pricing.rows,
    )


def weight_memory(
    sites: Sequence[int],
    numels: Sequence[int],
    fixed_bits: int,
    num_sites: int,
    widths: tuple[int, ...],
    names: Sequence[str] | None = None,
    map_bits: Sequence[int] | None = None,
) -> SumResource:
    """Return the memory of all parameters, in bytes: each tensor once, packed at its own width.

    Args:
        sites: site of each quantized weight tensor; a tied weight stands here once.
        numels: elements of each of them.
        fixed_bits: bits of all other parameters together, at `FLOAT_BITS` each.
        num_sites: number of learned bit-widths.
        widths: the bit-widths that a site may have, rising.
        names: names of the tensors, for reports.
        map_bits: for each of them what saying the widths of its elements takes, where they differ.
    """
    labels = names if names is not None else [f"site {site}" for site in sites]
    maps = [0] * len(sites) if map_bits is None else map_bits
    terms = [
        Term(name, (site, None), tuple((numel * width,) for width in widths), map_cost=bits)
        for name, site, numel, bits in zip(labels, sites, numels, maps, strict=True)
    ]
    terms.append(Term("other parameters", (None, None), ((fixed_bits,),)))
    reference = Fraction(FLOAT_BITS * sum(numels) + fixed_bits, 8)
    return SumResource("weight_memory", "byte", widths, num_sites, terms, 8, reference)
