"""The variables that formulas and predicates may use, by operation class.

Every operation has ``macs``, ``output_elements``, ``input_elements``, ``weights`` (numbers),
``name``, ``op`` and ``target`` (texts). What a class adds stands in `CLASS_ATTRIBUTES`. A formula
may also use the two bit-widths of the operation: ``weight_bits`` and ``activation_bits``, or for
the classes of `cgmq_fx.cost.operation.PAIR_CLASSES` ``lhs_bits`` and ``rhs_bits``.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from cgmq_fx.cost.expression import Kind, Value
from cgmq_fx.cost.operation import OP_CLASSES, PAIR_CLASSES, Operands, Operation
from cgmq_fx.errors import CostTableError

COMMON_ATTRIBUTES: Mapping[str, Kind] = MappingProxyType(
    {
        "macs": "number",
        "output_elements": "number",
        "input_elements": "number",
        "weights": "number",
        "name": "text",
        "op": "text",
        "target": "text",
    }
)


def _convolution(spatial_dims: int) -> dict[str, Kind]:
    per_axis = ("kernel", "stride", "dilation")
    return {
        "in_channels": "number",
        "out_channels": "number",
        "groups": "number",
        "kernel_size": "number",
        "spatial_dims": "number",
        "bias": "bool",
        **{f"{word}_{axis}": "number" for word in per_axis for axis in range(spatial_dims)},
    }


#: Attributes of each operation class beyond the common ones. ``kernel_size`` is the product of
#: ``kernel_0``, ``kernel_1``, ...; a matmul is ``batch`` products of (m, k) by (k, n); ``part`` of
#: an attention is "qk" (queries by keys) or "pv" (weights by values); ``groups`` of a linear layer
#: is 1, so that one predicate serves convolutions and linear layers.
CLASS_ATTRIBUTES: Mapping[str, Mapping[str, Kind]] = MappingProxyType(
    {
        **{f"conv{n}d": _convolution(n) for n in (1, 2, 3)},
        **{f"conv_transpose{n}d": _convolution(n) for n in (1, 2, 3)},
        "linear": {
            "in_features": "number",
            "out_features": "number",
            "groups": "number",
            "bias": "bool",
        },
        "matmul": {"batch": "number", "m": "number", "n": "number", "k": "number"},
        "attention": {
            "batch": "number",
            "heads": "number",
            "m": "number",
            "n": "number",
            "k": "number",
            "part": "text",
        },
    }
)
_DEFAULTS: Mapping[str, Mapping[str, int]] = MappingProxyType({"linear": {"groups": 1}})

WEIGHT_BITS = ("weight_bits", "activation_bits")
PAIR_BITS = ("lhs_bits", "rhs_bits")
ALL_BITS = frozenset((*WEIGHT_BITS, *PAIR_BITS))


_ANY = "any.target"


def class_variables(ops: Iterable[str]) -> dict[str, Kind]:
    """Return the attributes that every one of `ops` (classes, or FX targets) has.

    An FX target may be of any class, so it has what any class has.
    """
    kinds = [
        _attributes_of(op) for op in dict.fromkeys(_ANY if is_target(op) else op for op in ops)
    ]
    shared = {name for name in kinds[0] if all(name in other for other in kinds[1:])}
    return {name: kind for name, kind in kinds[0].items() if name in shared}


def _attributes_of(op: str) -> dict[str, Kind]:
    own: dict[str, Kind] = dict(COMMON_ATTRIBUTES)
    for name in OP_CLASSES if is_target(op) else (op,):
        own.update(CLASS_ATTRIBUTES.get(name, {}))
    return own


def bit_names(ops: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the bit-widths that a formula for all of `ops` may use."""
    shared: set[str] = {*WEIGHT_BITS, *PAIR_BITS}
    for op in ops:
        if not is_target(op):
            shared &= set(PAIR_BITS if op in PAIR_CLASSES else WEIGHT_BITS)
    return tuple(name for name in (*WEIGHT_BITS, *PAIR_BITS) if name in shared)


def is_target(op: str) -> bool:
    """Tell an FX target (it has a dot) from an operation class."""
    return "." in op


def operation_variables(operation: Operation) -> dict[str, Value | int]:
    """Return the variables of `operation`, without its bit-widths."""
    return {
        **_DEFAULTS.get(operation.op, {}),
        **operation.attributes,
        "macs": operation.macs,
        "output_elements": operation.output_elements,
        "input_elements": operation.input_elements,
        "weights": operation.weights,
        "name": operation.name,
        "op": operation.op,
        "target": operation.target,
    }


def require(variables: Mapping[str, object], needed: Iterable[str], operation: Operation) -> None:
    """Check that `operation` has every attribute in `needed`.

    Raises:
        CostTableError: it lacks some; the message lists them.
    """
    missing = sorted(name for name in needed if name not in variables)
    if missing:
        raise CostTableError(
            f"operation {operation.name!r} ({operation.op}, {operation.target}) has no attribute "
            f"{', '.join(map(repr, missing))}; it has {', '.join(sorted(variables))}"
        )


def bit_variables(operands: Operands, bits: tuple[int, int]) -> dict[str, int]:
    """Return both names of each of two bit-widths, given in the order of ``OPERAND_NAMES``.

    The weight of an operation is its right-hand operand, so a row for convolutions also prices one
    whose weight is computed, and a row for matrix products one whose operand is a parameter.
    """
    first, second = bits
    weight, activation = (second, first) if operands == "pair" else (first, second)
    return {
        "weight_bits": weight,
        "activation_bits": activation,
        "lhs_bits": activation,
        "rhs_bits": weight,
    }
