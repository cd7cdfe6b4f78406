"""What a ledger says, as frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Pricing = Literal["priced", "unpriced", "free"]


@dataclass(frozen=True)
class Work:
    """An amount of work, and its share of the model's.

    Attributes:
        operations: how many there are.
        macs: their multiply-accumulates, for one sample.
        weights: elements of the weights that they read; a tied weight counts at each use.
        activations: elements of the activations that they read.
        macs_share: part of the model's multiply-accumulates.
        weights_share: part of the weight elements that all operations read.
        activations_share: part of the activation elements that all operations read.
    """

    operations: int
    macs: int
    weights: int
    activations: int
    macs_share: Fraction
    weights_share: Fraction
    activations_share: Fraction


@dataclass(frozen=True)
class LedgerGroup:
    """Operations that one row prices, or that have no price for one reason.

    Attributes:
        pricing: ``priced``; ``unpriced``: they have multiply-accumulates and no row, and the table
            says that such cost nothing; ``free``: they have neither.
        row: the row, with its place; empty where there is none.
        per: what the row counts; empty where there is none.
        source: where its numbers come from.
        error: relative uncertainties that it states, lowest and highest; None where it states none.
        reason: why there is no price; empty where there is one.
        kinds: how many operations there are of each class.
        work: of all of them.
        names: their places in the model.
    """

    pricing: Pricing
    row: str
    per: str
    source: str
    error: tuple[Fraction, Fraction] | None
    reason: str
    kinds: Mapping[str, int]
    work: Work
    names: tuple[str, ...]


@dataclass(frozen=True)
class TableLedger:
    """What one table prices.

    Attributes:
        name: of the table.
        unit: of its costs.
        bounded: whether a budget bounds it.
        groups: every operation of the model in one of them, those with most work first.
    """

    name: str
    unit: str
    bounded: bool
    groups: tuple[LedgerGroup, ...]

    def share(self, pricing: Pricing) -> Fraction:
        """Return the part of the model's multiply-accumulates that has `pricing`."""
        found = (group.work.macs_share for group in self.groups if group.pricing == pricing)
        return sum(found, Fraction(0))


@dataclass(frozen=True)
class StoredTensors:
    """What `weight_memory` counts.

    Attributes:
        kind: of these tensors.
        reason: why they have the bit-width that they have.
        tensors: how many; None where they are not counted one by one.
        elements: of all of them together.
        share: part of all stored elements.
    """

    kind: str
    reason: str
    tensors: int | None
    elements: int
    share: Fraction


@dataclass(frozen=True)
class FloatGroup:
    """Operations that compute in floating point for one reason.

    Attributes:
        reason: why.
        kinds: how many operations there are of each class.
        work: of all of them.
        names: their places in the model.
    """

    reason: str
    kinds: Mapping[str, int]
    work: Work
    names: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class LedgerContents:
    """What is priced, by which row, at which source and error; what is free or float, and why.

    Attributes:
        model: name of the model's class.
        work: of the whole model.
        quantized: the work of the operations all of whose operands are quantized.
        floats: operations in floating point by reason.
        tables: what each table prices, those with a budget first.
        stored: what `weight_memory` counts, where it has a budget.
    """

    model: str
    work: Work
    quantized: Work
    floats: tuple[FloatGroup, ...]
    tables: tuple[TableLedger, ...]
    stored: tuple[StoredTensors, ...]
