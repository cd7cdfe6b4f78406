"""Typed keys for what analysis passes write on graph nodes.

This is the only file that spells a `node.meta` key. Values are frozen: a deep copy of a graph
shares them, and a change in one copy must never show in another. `node.meta` is a cache that
re-tracing and pickling lose; what must last lives in the modules of the graph.
"""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import fx

from cgmq_fx.cost.operation import Operands, Operation
from cgmq_fx.errors import PassError
from cgmq_fx.overrides import Chosen

T = TypeVar("T")


@dataclass(frozen=True)
class MetaKey(Generic[T]):
    """One kind of annotation: its key in `node.meta` and the pass that writes it."""

    key: str
    written_by: str

    def set(self, node: fx.Node, value: T) -> None:
        """Write `value` on `node`."""
        node.meta[self.key] = value

    def get(self, node: fx.Node) -> T:
        """Return what is written on `node`.

        Raises:
            PassError: nothing is; the message names the pass to run first.
        """
        if self.key not in node.meta:
            raise PassError(
                f"node '{node.format_node()}' has no '{self.key}'; run {self.written_by} first"
            )
        value: T = node.meta[self.key]
        return value

    def find(self, node: fx.Node) -> T | None:
        """Return what is written on `node`, or None."""
        return node.meta.get(self.key)

    def has(self, node: fx.Node) -> bool:
        """Tell whether something is written on `node`."""
        return self.key in node.meta

    def clear(self, node: fx.Node) -> None:
        """Remove what is written on `node`, if anything."""
        node.meta.pop(self.key, None)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of the tensor that a node produces, for one sample."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


#: A `TensorInfo`, a tuple of values for a container, or None for anything that is not a tensor.
Value = TensorInfo | tuple["Value", ...] | None


@dataclass(frozen=True)
class OperandRef:
    """Where an operation takes an operand from, and whether it is a weight.

    Attributes:
        index: position in `node.args`.
        keyword: name in `node.kwargs`; the operand is read from there when it is present.
        is_weight: the operand does not depend on the inputs of the model.
        element: position in the list that stands there, None where no list does.
    """

    index: int
    keyword: str
    is_weight: bool
    element: int | None = None


@dataclass(frozen=True)
class OpInfo:
    """What kind of operation a node is, as cost tables and reports name it.

    Attributes:
        op: operation class, such as ``conv2d``.
        target: the FX target in full.
        operands: the kind of bit-widths the operation has.
        refs: its quantizable operands, in the order of its bit-widths. Where `operands` is
            ``none``, operands that no price depends on, but that memory may hold as codes.
        reason: why the operation has no quantizable operand, for the coverage ledger.
    """

    op: str
    target: str
    operands: Operands
    refs: tuple[OperandRef, ...]
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """One operand that tables want quantized, and what the caller chose for it.

    Attributes:
        ref: its place; None for the weights between the two products of attention.
        site: name of the quantizer that its tensor has or would have.
        skipped_by: what messages call the selectors that leave it float.
        overrides: the overrides that selectors bring to it.
        follows: it is read through a quantizer only if others read the same weight through one.
    """

    ref: OperandRef | None
    site: str
    skipped_by: tuple[str, ...] = ()
    overrides: tuple[Chosen, ...] = ()
    follows: bool = False


@dataclass(frozen=True)
class SiteRef:
    """One operand that reads a quantizer.

    Attributes:
        ref: its place in the consumer; None for the weights between the products of attention.
        site: the quantizer's name.
        chosen: what the caller's overrides say of the quantizer, if anything.
    """

    ref: OperandRef | None
    site: str
    chosen: Chosen | None = None


@dataclass(frozen=True)
class Skipped:
    """An operand that the caller keeps in float, for the coverage ledger.

    Attributes:
        by: what messages call the selectors.
        name: what the operand is, such as ``weight``.
    """

    by: tuple[str, ...]
    name: str


@dataclass(frozen=True)
class ExportedTensor:
    """What export knows of a tensor in a program, whatever the batch.

    Attributes:
        rank: number of axes.
        dtype: type of its elements.
        device: where it was.
    """

    rank: int
    dtype: torch.dtype
    device: torch.device


OP_INFO: MetaKey[OpInfo] = MetaKey("cgmq_fx.op_info", "annotate-operations")
IS_CONSTANT: MetaKey[bool] = MetaKey("cgmq_fx.is_constant", "annotate-operations")
IS_NONNEGATIVE: MetaKey[bool] = MetaKey("cgmq_fx.is_nonnegative", "annotate-nonnegative")
VALUE: MetaKey[Value] = MetaKey("cgmq_fx.value", "annotate-shapes")
COUNTED_MACS: MetaKey[int] = MetaKey("cgmq_fx.counted_macs", "annotate-shapes")
WORK: MetaKey[tuple[Operation, ...]] = MetaKey("cgmq_fx.work", "annotate-work")
CHOICES: MetaKey[tuple[Choice, ...]] = MetaKey("cgmq_fx.choices", "select-operands")
SITES: MetaKey[tuple[SiteRef, ...]] = MetaKey("cgmq_fx.sites", "share-quantizers")
PRICES: MetaKey[tuple[tuple[str, str], ...]] = MetaKey("cgmq_fx.prices", "price-operations")
KEPT_CLOSED: MetaKey[bool] = MetaKey("cgmq_fx.kept_closed", "trace")
MODULE_PATH: MetaKey[str] = MetaKey("cgmq_fx.module_path", "trace")
#: Operands that the caller keeps in float. It outlasts the insertion of quantizers: the ledger,
#: which is made when shapes are known, says so.
SKIPPED: MetaKey[tuple[Skipped, ...]] = MetaKey("cgmq_fx.skipped", "select-operands")
EXPORTED: MetaKey[ExportedTensor] = MetaKey("cgmq_fx.exported", "trace-exported")

#: What analyses say of the operations of a graph: void once calls are added, replaced or removed.
#: `VALUE` is not among it: tensors keep their shapes where nodes that stay keep what they compute.
OPERATION_KEYS: frozenset[MetaKey[Any]] = frozenset(
    {OP_INFO, IS_CONSTANT, IS_NONNEGATIVE, COUNTED_MACS, WORK, CHOICES, SITES, PRICES}
)
