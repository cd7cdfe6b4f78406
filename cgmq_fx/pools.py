"""Scales and zero_points of a program, put into the pools of a packed file."""

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from cgmq_fx.container import StoredTensor
from cgmq_fx.manifest import POOL, Place, StoredGrid

Array = npt.NDArray[np.generic]
#: Types of numpy by those of files.
NUMPY_TYPES: Mapping[str, str] = {
    "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "F32": "<f4", "F64": "<f8", "F16": "<f2",
}  # fmt: skip


def array_of(tensor: StoredTensor) -> Array:
    """Return the numbers of a tensor whose type numpy has, in its shape."""
    return np.frombuffer(tensor.data.tobytes(), NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape)


def fill_pools(
    grids: Iterable[tuple[StoredGrid, Array, Array]], tensors: dict[str, StoredTensor]
) -> Iterator[str]:
    """Add the pools to `tensors`; yield what does not fit the manifest's places in them.

    Args:
        grids: each with its scale and its zero_point, 0 where it has none.
        tensors: by name; changed in place.
    """
    parts: dict[str, list[tuple[Place, Array]]] = {}
    for grid, scale, zero_point in grids:
        for place, found in ((grid.scale, scale), (grid.zero_point, zero_point)):
            own = _shaped(found, place)
            if own is None:
                yield f"{grid.name!r} has scales or zero_points of another shape or value"
            elif place is not None:
                parts.setdefault(place.dtype, []).append((place, own))
    for dtype, placed in parts.items():
        placed.sort(key=lambda item: item[0].at)
        at = 0
        for place, _ in placed:
            if place.at != at:
                yield f"the pool of {dtype} has gaps, or places that overlap, at {at:,}"
                return
            at = place.stop
        data = b"".join(own.tobytes() for _, own in placed)
        name = f"{POOL}.{dtype}"
        tensors[name] = StoredTensor(name, dtype, (at,), np.frombuffer(data, np.uint8))


def _shaped(found: Array, place: Place | None) -> Array | None:
    """Return numbers of a program as they stand at a place of a pool; None where they cannot.

    One number may stand in the program once for each channel.
    """
    if place is None:
        return None if found.size == 0 or found.any() else found
    count = math.prod(place.shape)
    if place.dtype not in NUMPY_TYPES or not found.size or not count:
        return None
    if count == 1 and not (found == found.reshape(-1)[0]).all():
        return None
    own = found.reshape(-1)[:1] if count == 1 else found.reshape(-1)
    with np.errstate(all="ignore"):
        cast = own.astype(NUMPY_TYPES[place.dtype])
    return cast if cast.size == count and np.array_equal(cast, own) else None
