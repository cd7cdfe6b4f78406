"""Which bytes of a ``.pte`` file are which tensor of the module, and how they lie there.

XNNPACK wants the axes of a weight in another order than PyTorch. A `Place` says how a tensor of the
file comes of one of the module: ``tensor.reshape(view).transpose(axes)``.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cgmq_fx.container import MAX_AXES, MAX_NAME, FileFault, are_counts, is_tensor_name, read_json
from cgmq_fx.pools import Array

_ORDERS: Mapping[int, Sequence[tuple[int, ...]]] = {
    2: ((1, 0),),
    3: ((0, 2, 1), (1, 2, 0)),
    4: ((0, 2, 3, 1), (1, 2, 3, 0)),
}
#: Of transposed convolutions with groups, whose first axis is split.
_SPLIT_ORDERS: Mapping[int, tuple[int, ...]] = {3: (0, 2, 3, 1), 4: (0, 2, 3, 4, 1)}


@dataclass(frozen=True)
class Place:
    """Where the numbers of a tensor stand.

    Attributes:
        name: of the tensor.
        key: of the bytes in the file, a colon, and the type that they are read as; or
            ``constants.<index>``, of the program.
        view: the shape that the tensor is seen in.
        axes: the order of those axes in the file.
    """

    name: str
    key: str
    view: tuple[int, ...]
    axes: tuple[int, ...]

    def in_file(self, tensor: Array) -> Array:
        """Return a tensor, or what broadcasts over its view, as the file has it."""
        return tensor.transpose(self.axes)

    def in_module(self, stored: Array, shape: Sequence[int]) -> Array:
        """Return numbers of the file in the shape of the module's tensor."""
        turned = stored.reshape([self.view[axis] for axis in self.axes])
        return turned.transpose(np.argsort(self.axes)).reshape(tuple(shape))


def orders(shape: Sequence[int], groups: Iterable[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the views of a tensor, and the orders of their axes, that a file may have it in."""
    rank, sizes = len(shape), list(shape)
    yield sizes, list(range(rank))
    for axes in _ORDERS.get(rank, ()):
        yield sizes, list(axes)
    if rank in _SPLIT_ORDERS:
        for count in groups:
            if count > 1 and sizes[0] % count == 0:
                yield [count, sizes[0] // count, *sizes[1:]], list(_SPLIT_ORDERS[rank])


def to_text(places: Iterable[Place]) -> bytes:
    """Return places as JSON."""
    rows = [[item.name, item.key, list(item.view), list(item.axes)] for item in places]
    return json.dumps(rows, separators=(",", ":")).encode()


def from_text(text: bytes, fault: FileFault) -> list[Place]:
    """Return the places that a JSON text holds.

    Raises:
        FileFormatError: it is malformed.
    """
    raw = read_json(text, "list of places", fault)
    if not isinstance(raw, list):
        raise fault("has no list of the places of its tensors")
    return [_place(item, fault) for item in raw]


def _place(item: Any, fault: FileFault) -> Place:
    row: list[Any] = item if isinstance(item, list) and len(item) == 4 else [None] * 4
    name, key, view, axes = row
    is_sound = (
        is_tensor_name(name)
        and isinstance(key, str)
        and are_counts(view, MAX_AXES)
        and isinstance(axes, list)
        and all(type(axis) is int for axis in axes)
        and sorted(axes) == list(range(len(view)))
    )
    if not is_sound:
        raise fault(f"has a place of a tensor that is none: {str(name)[:MAX_NAME]!r}")
    return Place(name, key, tuple(view), tuple(axes))


def fits(place: Place, shape: Sequence[int]) -> bool:
    """Tell whether a place can be that of a tensor of this shape."""
    return math.prod(place.view) == math.prod(shape)
