"""The quantizers of a ``.pte`` file: what its program and its bytes say, held to the manifest."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np

from cgmq_fx.container import ITEM_BYTES, FileFault, StoredTensor
from cgmq_fx.errors import UsageError
from cgmq_fx.manifest import OWN, POOL, Manifest, StoredGrid, StoredWeight
from cgmq_fx.manifest import Place as PoolPlace
from cgmq_fx.packed_file import CODES, packed_codes
from cgmq_fx.packing import MAX_WIDTH, MIN_WIDTH
from cgmq_fx.pools import NUMPY_TYPES, Array, array_of
from cgmq_fx.pte_activations import ActivationReader
from cgmq_fx.pte_places import Place, fits
from cgmq_fx.pte_reader import PteFile
from cgmq_fx.xnnpack_reader import FLOAT, QCINT8, QCINT32, QINT8, XnnValue, read_xnnpack

#: Type of the elements of each type of XNNPACK.
_ITEMS = {FLOAT: "F32", QINT8: "I8", QCINT8: "I8", QCINT32: "I32"}
_MOST_CODES = 1 << 20
_FINENESS = tuple(1 << power for power in range(8))


class PteGrids:
    """Brings the tensors of a file into the form of a packed file.

    Args:
        file: what it holds.
        fault: makes the errors.

    Attributes:
        graphs: of the parts for XNNPACK.
        constants: by key, the tensors of the program and of its parts, without those of the format.
        read_as: by key, the tensors of XNNPACK that read these bytes as numbers of one type.
        tensors: by name, complete where `faults` yields nothing.

    Raises:
        FileFormatError: a part for XNNPACK is malformed.
    """

    def __init__(self, file: PteFile, fault: FileFault) -> None:
        self.file = file
        self.graphs = [read_xnnpack(data, fault) for data in file.delegates]
        self.read_as: dict[str, list[XnnValue]] = {}
        for graph in self.graphs:
            for value in graph.values.values():
                for key in (value.key, value.scale_key):
                    if key and key not in file.named:
                        raise fault("has a tensor for XNNPACK whose numbers it has not")
                if value.key:
                    key = f"{value.key}:{_ITEMS[value.kind]}"
                    self.read_as.setdefault(key, []).append(value)
        self.scale_keys = {
            value.scale_key for held in self.read_as.values() for value in held if value.scale_key
        }
        self.constants = {item.name: item for item in file.constants.values()}
        for key, held in self.read_as.items():
            self.constants[key] = self._constant(key, held, fault)
        self._stored = {value.key for held in self.read_as.values() for value in held}
        self.tensors: dict[str, StoredTensor] = {}

    def _constant(self, key: str, held: Sequence[XnnValue], fault: FileFault) -> StoredTensor:
        data = np.frombuffer(self.file.named[held[0].key], np.uint8)
        for value in held:
            if math.prod(value.shape) * ITEM_BYTES[_ITEMS[value.kind]] != data.size:
                raise fault(f"has a tensor {list(value.shape)} for XNNPACK in {data.size:,} bytes")
        return StoredTensor(key, _ITEMS[held[0].kind], held[0].shape, data)

    def faults(self, manifest: Manifest, places: Sequence[Place]) -> Iterator[str]:
        """Yield what contradicts the manifest; each step relies on those before it."""
        weights = {weight.name: weight for weight in manifest.weights}
        activations = ActivationReader(manifest, self.file, self.graphs, self.numbers)
        claims: dict[str, list[Place]] = {}
        for place in places:
            claims.setdefault(place.key, []).append(place)

        named: dict[str, list[Place]] = {}
        for place in places:
            named.setdefault(place.name, []).append(place)
        of_weights = (
            self._weight_faults(weight, named.get(name, ())) for name, weight in weights.items()
        )
        steps: Sequence[Iterable[str]] = (
            self._pool_faults(manifest),
            self._claim_faults(claims, activations),
            chain.from_iterable(of_weights),
            self._reading_faults(weights, claims),
            activations.faults(),
            self._other_faults(manifest, [p for p in places if p.name not in weights]),
        )
        for step in steps:
            found = list(step)
            yield from found
            if found:
                return

    # -- numbers of grids ------------------------------------------------------------------------

    def _pool_faults(self, manifest: Manifest) -> Iterator[str]:
        for key, held in self.file.named.items():
            dtype = key.removeprefix(f"{POOL}.")
            if dtype != key and dtype in NUMPY_TYPES:
                size = ITEM_BYTES.get(dtype, 1)
                data = np.frombuffer(held, np.uint8)
                self.tensors[key] = StoredTensor(key, dtype, (data.size // size,), data)
                if data.size % size:
                    yield f"{key!r} has {data.size:,} bytes"
        for grid in manifest.grids:
            for place in (grid.scale, grid.zero_point):
                held_pool = self.tensors.get(f"{POOL}.{place.dtype}") if place is not None else None
                if place is not None and (held_pool is None or place.stop > held_pool.elements):
                    yield f"{grid.name!r} has numbers at {place}, which is no place in a pool"
            if not MIN_WIDTH <= grid.bits <= MAX_WIDTH:
                yield f"{grid.name!r} has {grid.bits} bits, not {MIN_WIDTH} to {MAX_WIDTH}"

    def numbers(self, grid: StoredGrid) -> tuple[Array, Array]:
        """Return scale and zero_point of a grid, 0 where it has none."""
        zero_point = grid.zero_point
        zeros = np.zeros((), np.int64) if zero_point is None else self._numbers_at(zero_point)
        return self._numbers_at(grid.scale), zeros

    def _numbers_at(self, place: PoolPlace) -> Array:
        pool = array_of(self.tensors[f"{POOL}.{place.dtype}"])
        return pool[place.at : place.stop].reshape(place.shape)

    # -- who has which bytes ---------------------------------------------------------------------

    def _claim_faults(
        self, claims: Mapping[str, Sequence[Place]], activations: ActivationReader
    ) -> Iterator[str]:
        own = {key for key in self.file.named if key.startswith(OWN)}
        known = self._stored | self.scale_keys
        for key in sorted(set(self.file.named) - own - known):
            yield f"nothing reads the bytes {key!r}"
        for key in sorted(known & own):
            yield f"the bytes {key!r} are those of the format"
        for key in sorted(set(self.constants) - set(claims) - activations.constants):
            yield f"no tensor of the manifest has the bytes {key!r}"
        for key, held in claims.items():
            item = self.constants.get(key)
            if item is None:
                yield f"{held[0].name!r} has the bytes {key!r}, which are none of a tensor"
                continue
            for place in held:
                if not fits(place, item.shape):
                    yield f"{place.name!r} has the shape {list(place.view)} in the file"

    def _reading_faults(
        self, weights: Mapping[str, StoredWeight], claims: Mapping[str, Sequence[Place]]
    ) -> Iterator[str]:
        """Yield tensors of XNNPACK whose integers are read on the grid of no weight."""
        for key, held in self.read_as.items():
            for value in held:
                owners = [p for p in claims.get(key, ()) if p.name in weights]
                if value.kind == QCINT8 and not any(
                    self._fineness(weights[place.name], place, value) for place in owners
                ):
                    yield f"the integers {key!r} are read on a grid that no weight has"

    # -- weights ---------------------------------------------------------------------------------

    def _weight_faults(self, weight: StoredWeight, places: Sequence[Place]) -> Iterator[str]:
        """Yield what is wrong with a weight; add its packed codes to `tensors`."""
        forms: list[Array] = []
        for place in places:
            if not fits(place, weight.shape):
                yield f"{weight.name!r} of shape {list(weight.shape)} has {list(place.view)}"
                continue
            item, read = self.constants[place.key], self.read_as.get(place.key, ())
            stored = place.in_module(array_of(item), weight.shape)
            finer = {self._fineness(weight, place, value) for value in read} - {0}
            if len(finer) == 1:
                (step,) = finer
                if (stored % step).any():
                    yield f"{weight.name!r} has integers between its codes"
                forms.append(stored.astype(np.int32) // step)
            elif item.dtype == "F32":
                found = self._codes_of(weight, stored)
                if found is None:
                    yield (
                        f"the manifest gives {weight.name!r} {weight.bits} bits, and its values "
                        f"do not lie on that grid"
                    )
                else:
                    forms.append(found)
        if not forms:
            yield f"the program does not have the weight {weight.name!r}"
            return
        if any(not np.array_equal(forms[0], other) for other in forms[1:]):
            yield f"{weight.name!r} stands there twice, with other numbers"
        try:
            packed = packed_codes(weight, forms[0])
        except UsageError as error:
            yield f"{weight.name!r}: {error}"
            return
        name = weight.name + CODES
        self.tensors[name] = StoredTensor(name, "U8", packed.shape, packed)

    def _fineness(self, weight: StoredWeight, place: Place, value: XnnValue) -> int:
        """Return how many of XNNPACK's codes are one of a weight; 0 where the grid is another.

        It is a power of two, by which a scale is divided exactly.
        """
        if value.kind != QCINT8:
            return 0
        held = self.file.named[value.scale_key]
        scale, zero_point = self.numbers(weight)
        if len(held) % 4 or not len(held) or zero_point.any():
            return 0
        found = np.frombuffer(held, "<f4")
        if scale.size > 1 and (scale.size != found.size or not _is_along(weight, place, value)):
            return 0
        wanted = np.broadcast_to(scale.reshape(-1).astype(np.float32), found.shape)
        return next((k for k in _FINENESS if np.array_equal(found * np.float32(k), wanted)), 0)

    def _codes_of(self, weight: StoredWeight, values: Array) -> Array | None:
        """Return the codes of real values; None where they do not lie on the grid."""
        scale, zero_point = self.numbers(weight)
        if weight.channel_axis is not None and scale.ndim == 1:
            shape = [1] * len(weight.shape)
            shape[weight.channel_axis % max(1, len(shape))] = -1
            scale = scale.reshape(shape)
        try:
            with np.errstate(all="ignore"):
                steps = np.rint(values.astype(np.float64) / scale.astype(np.float64))
                steps = np.where(np.isfinite(steps), steps, 0)
                again = steps.astype(np.float32) * scale.astype(np.float32)
                codes = steps + zero_point
        except ValueError:  # the shapes do not broadcast
            return None
        is_same = again.shape == codes.shape == values.shape and np.array_equal(again, values)
        found: Array = codes.astype(np.int32)
        return found if is_same and np.abs(codes).max(initial=0) < _MOST_CODES else None

    # -- other tensors ---------------------------------------------------------------------------

    def _other_faults(self, manifest: Manifest, places: Sequence[Place]) -> Iterator[str]:
        """Take the other tensors; yield those that the manifest does not know."""
        known = {*manifest.parameters, *manifest.buffers}
        for place in places:
            item = self.constants[place.key]
            if place.name not in known:
                yield f"the manifest does not know the tensor {place.name!r}"
            elif place.name in self.tensors:
                yield f"the tensor {place.name!r} stands there twice"
            else:
                self.tensors[place.name] = StoredTensor(
                    place.name, item.dtype, item.shape, item.data
                )


def _is_along(weight: StoredWeight, place: Place, value: XnnValue) -> bool:
    """Tell whether XNNPACK's scales run along the channel axis of a weight."""
    if weight.channel_axis is None or place.view != tuple(weight.shape):
        return False
    at = place.axes.index(weight.channel_axis % len(place.view))
    step = math.prod(place.view[axis] for axis in place.axes[at + 1 :])
    return math.prod(value.shape[value.channel_axis + 1 :]) == step
