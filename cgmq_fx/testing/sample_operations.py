"""Operations of every class, to ask a cost table for prices."""

import itertools
from collections.abc import Iterable, Iterator

from cgmq_fx.cost.attributes import is_target
from cgmq_fx.cost.operation import PAIR_CLASSES, Attribute, Operands, Operation

_WITHOUT_OPERANDS = frozenset({"opaque", "rnn", "bilinear", "other"})


def sample_operations(ops: Iterable[str]) -> Iterator[Operation]:
    """Yield operations of the classes, or with the FX targets, that are named in `ops`."""
    for op in ops:
        kinds = ("conv2d", "linear", "matmul", "add") if is_target(op) else (op,)
        for kind in kinds:
            target = op if is_target(op) else f"sample.{kind}"
            yield from (_operation(kind, target, attributes) for attributes in _attributes(kind))


def _operation(op: str, target: str, attributes: dict[str, Attribute]) -> Operation:
    operands: Operands = "pair" if op in PAIR_CLASSES else "weight"
    if op in _WITHOUT_OPERANDS:
        operands = "none"
    weights = 72 if operands == "weight" else 0
    return Operation(f"{op} {attributes}", op, target, operands, 1_152, 96, 64, weights, attributes)


def _attributes(op: str) -> list[dict[str, Attribute]]:
    if op.startswith("conv"):
        dims = int(op[-2])
        return [
            _convolution(dims, *shape)
            for shape in itertools.product((1, 3), (1, 2), ((8, 16, 1), (8, 8, 8), (8, 16, 4)))
        ]
    if op == "linear":
        return [
            {"in_features": inner, "out_features": outer, "bias": bias}
            for inner, outer, bias in ((8, 16, True), (512, 10, False))
        ]
    if op == "attention":
        shape: dict[str, Attribute] = {"batch": 2, "heads": 2, "m": 5, "n": 5, "k": 8}
        return [{**shape, "part": part} for part in ("qk", "pv")]
    if op == "matmul":
        return [{"batch": batch, "m": 5, "n": 6, "k": 8} for batch in (1, 4)]
    return [{}]


def _convolution(
    dims: int, kernel: int, stride: int, channels: tuple[int, int, int]
) -> dict[str, Attribute]:
    ins, outs, groups = channels
    found: dict[str, Attribute] = {
        "in_channels": ins,
        "out_channels": outs,
        "groups": groups,
        "kernel_size": kernel**dims,
        "spatial_dims": dims,
        "bias": True,
    }
    per_axis = (("kernel", kernel), ("stride", stride), ("dilation", 1))
    return found | {f"{word}_{axis}": extent for word, extent in per_axis for axis in range(dims)}
