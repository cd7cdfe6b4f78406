"""What a cost table sees of one operation: integers and names, nothing of torch.fx."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Attribute = int | bool | str

#: Which bit-widths an operation has. ``weight``: ``weight_bits`` and ``activation_bits``;
#: ``pair`` (two activations): ``lhs_bits`` and ``rhs_bits``; ``activation`` (one activation that
#: stands on a grid): ``activation_bits``; ``none``: no quantizable operand.
Operands = Literal["weight", "pair", "activation", "none"]

OPERAND_NAMES: Mapping[Operands, tuple[str, ...]] = MappingProxyType(
    {
        "weight": ("weight_bits", "activation_bits"),
        "pair": ("lhs_bits", "rhs_bits"),
        "activation": ("activation_bits",),
        "none": (),
    }
)


#: Width of an operand that is 0 everywhere: what reads it computes nothing, on any hardware.
PRUNED_BITS = 0

#: Every operation class, the names that a row's ``op`` may have.
OP_CLASSES: tuple[str, ...] = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
    "bilinear",
    "matmul",
    "attention",
    "embedding",
    "rnn",
    "opaque",
    "add",
    "sub",
    "mul",
    "div",
    "cat",
    "max_pool",
    "avg_pool",
    "activation",
    "softmax",
    "batch_norm",
    "layer_norm",
    "group_norm",
    "instance_norm",
    "rms_norm",
    "dropout",
    "interpolate",
    "reduce",
    "elementwise",
    "reshape",
    "other",
)

#: Operation classes whose one operand, an activation, is quantized where a table prices it by bits.
AVERAGING_CLASSES: frozenset[str] = frozenset({"avg_pool", "reduce"})

#: Operation classes whose two operands are both activations.
PAIR_CLASSES: frozenset[str] = frozenset({"matmul", "attention", "add", "sub", "mul", "div", "cat"})


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a network, for one sample.

    Attributes:
        name: unique place in the network, for reports and errors, such as ``layer1.0.conv1``.
        op: operation class of cgmq_fx, such as ``conv2d`` or ``matmul``.
        target: the FX target in full, such as ``torch.nn.functional.conv2d``.
        operands: which bit-widths the operation has.
        macs: multiply-accumulate operations.
        output_elements: elements of the output tensor.
        input_elements: elements of the activation input(s).
        weights: elements of the weight operand, 0 where there is none.
        attributes: what ``where`` predicates may ask for, such as ``groups``.
    """

    name: str
    op: str
    target: str
    operands: Operands
    macs: int
    output_elements: int
    input_elements: int
    weights: int = 0
    attributes: Mapping[str, Attribute] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class BitSource:
    """Where an operand's bit-width comes from: a learned site, or a fixed number of bits.

    Exactly one of the two fields is set.
    """

    site: int | None = None
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class BoundOperation:
    """An operation and the sources of its bit-widths, in the order of `OPERAND_NAMES`.

    An operation without quantizable operands has no sources and runs at the table's reference.
    """

    operation: Operation
    sources: tuple[BitSource, ...]


def as_pair(bits: Sequence[int]) -> tuple[int, int]:
    """Return two bit-widths for those of an operation; one operand alone gives both.

    >>> as_pair((4, 8)), as_pair((8,))
    ((4, 8), (8, 8))
    """
    return bits[0], bits[-1]
