"""Packed files, opened: the container and its manifest, checked against each other."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cgmq_fx.container import Container, FileFault, StoredTensor, is_tensor_name, open_container
from cgmq_fx.errors import FileFormatError, UsageError
from cgmq_fx.manifest import MANIFEST, OWN, POOL, Manifest, Place, StoredWeight
from cgmq_fx.manifest_json import from_bytes
from cgmq_fx.packing import pack, pack_units, packed_bytes, unpack, unpack_units
from cgmq_fx.stored_file import (
    StoredFile,
    code_faults,
    grid_faults,
    name_faults,
    number_faults,
    refuse,
    unit_faults,
)
from cgmq_fx.unit_bits import UnitBits, map_bits

#: Suffixes of the names of the tensors that hold the codes of a weight, and the bit-widths of these
#: where they differ.
CODES, UNITS = ".codes", ".bit_widths"
_MAX_LISTED = 10
_NUMPY: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class PackedFile:
    """A packed file whose tensors are those that its manifest describes.

    Attributes:
        container: the tensors.
        manifest: what the file says of them.
    """

    container: Container
    manifest: Manifest

    def codes(self, weight: StoredWeight) -> npt.NDArray[np.int32]:
        """Return the codes of a weight, in its shape."""
        data = self.container.tensors[weight.name + CODES].data
        if weight.unit_widths:
            widths = np.broadcast_to(self.units(weight), weight.shape)
            return unpack_units(data, widths, weight.shape, signed=weight.signed)
        return unpack(data, weight.bits, weight.shape, signed=weight.signed)

    def units(self, weight: StoredWeight) -> npt.NDArray[np.uint8]:
        """Return the bit-width of each unit of a weight whose units differ, in `unit_shape`.

        Raises:
            UsageError: the tensor with the bit-widths is not what such units take.
        """
        if weight.unit_bits:
            return np.array(weight.unit_bits, np.uint8).reshape(weight.unit_shape)
        data = self.container.tensors[weight.name + UNITS].data
        bits = map_bits(1, weight.unit_widths)
        places = unpack(data, bits, weight.unit_shape, signed=False)
        if places.size and int(places.max()) >= len(weight.unit_widths):
            raise UsageError(
                f"a unit has the bit-width number {int(places.max())} of {len(weight.unit_widths)}"
            )
        return np.array(weight.unit_widths, np.uint8)[places]

    def place(self, place: Place) -> StoredTensor:
        """Return the numbers at a place of a pool, as a tensor of their own."""
        pool = self.container.tensors[f"{POOL}.{place.dtype}"]
        size = pool.data.size // max(1, pool.elements)
        data = pool.data[place.at * size : place.stop * size]
        return StoredTensor(pool.name, pool.dtype, place.shape, data)

    @property
    def stored(self) -> StoredFile:
        """What `cgmq_fx.verify` reads of it."""
        held = (self.container.tensors[name].elements for name in self.manifest.parameters)
        units = {
            weight.name: UnitBits(self.units(weight).tobytes())
            for weight in self.manifest.weights
            if weight.unit_widths
        }
        return StoredFile(self.container.path, self.manifest, sum(held), units=units)


def open_packed(path: str | os.PathLike[str]) -> PackedFile:
    """Open a file that `export` wrote and check it; nothing in it is run.

    Time is in proportion to the size of the file, and memory to its largest weight.

    Raises:
        FileFormatError: it cannot be read, is damaged, or its manifest and tensors contradict each
            other; the message lists what does.
    """
    container = open_container(path)
    fault = FileFault(container.path)
    held = container.tensors.get(MANIFEST)
    if held is None or held.dtype != "U8" or len(held.shape) != 1:
        raise fault(f"has no manifest, a tensor {MANIFEST!r} of bytes")
    packed = PackedFile(container, from_bytes(held.data.tobytes(), fault))
    check_packed(packed, fault)
    return packed


def check_packed(packed: PackedFile, fault: FileFault) -> None:
    """Check that tensors and manifest fit each other.

    Raises:
        FileFormatError: they do not; the message lists what does not.
    """
    # Each step may rely on those before it.
    for faults in (_layout_faults, _grid_faults, _content_faults, _code_faults):
        refuse(fault, faults(packed))


def packed_codes(weight: StoredWeight, codes: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Return the codes of a weight, in its shape, as a packed file has them.

    Raises:
        UsageError: they do not fit their bit-widths, or these are not those of its channels.
    """
    if not weight.unit_widths:
        return pack(codes, weight.bits, signed=weight.signed)
    faults = list(unit_faults(weight))
    if faults or not weight.unit_bits:
        raise UsageError("; ".join(faults) or "its bit-widths of elements are not in the manifest")
    units = np.array(weight.unit_bits, np.uint8).reshape(weight.unit_shape)
    return pack_units(codes, np.broadcast_to(units, weight.shape), signed=weight.signed)


def content_digest(tensors: Iterable[StoredTensor]) -> str:
    """Return the SHA-256 of all tensors but the manifest, by name.

    Of each, in the order of the names, it takes the JSON list of name, type and shape, a line feed,
    and the bytes.
    """
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda item: item.name):
        if tensor.name != MANIFEST:
            head = json.dumps([tensor.name, tensor.dtype, list(tensor.shape)])
            digest.update(f"{head}\n".encode())
            digest.update(tensor.data.data)
    return digest.hexdigest()


# -- what must fit ---------------------------------------------------------------------------------


def _layout_faults(packed: PackedFile) -> Iterator[str]:
    """Yield where the manifest and the container disagree on which tensors there are."""
    manifest, tensors = packed.manifest, packed.container.tensors
    pools = {f"{POOL}.{place.dtype}" for place in _places(manifest)}
    codes = [weight.name + CODES for weight in manifest.weights]
    codes += [weight.name + UNITS for weight in manifest.weights if weight.has_unit_tensor]
    named = [*codes, *manifest.parameters, *manifest.buffers, *pools]
    if len(set(named)) < len(named):
        yield "the manifest names a tensor twice"
    grids = [grid.name for grid in manifest.grids]
    for name in (*manifest.parameters, *manifest.buffers, *grids):
        if name.startswith(OWN):
            yield f"the name {name!r} is that of a tensor of the format"
    for name in sorted(set(named) - set(tensors)):
        yield f"the tensor {name!r} is missing"
    for name in sorted(set(tensors) - {*named, MANIFEST}):
        yield f"the manifest does not know the tensor {name!r}"
    yield from name_faults(manifest)


def _places(manifest: Manifest) -> Iterator[Place]:
    for grid in manifest.grids:
        yield grid.scale
        if grid.zero_point is not None:
            yield grid.zero_point


def _grid_faults(packed: PackedFile) -> Iterator[str]:
    """Yield what is wrong with the quantizers, without a look at their numbers."""
    manifest, tensors = packed.manifest, packed.container.tensors
    yield from grid_faults(manifest)
    for grid in manifest.grids:
        for place in (grid.scale, grid.zero_point):
            if place is not None and (
                place.dtype not in _NUMPY or place.stop > tensors[f"{POOL}.{place.dtype}"].elements
            ):
                yield f"{grid.name!r} has numbers at {place}, which is no place in a pool"
    for weight in manifest.weights:
        held = tensors[weight.name + CODES]
        if weight.unit_widths:
            yield from unit_faults(weight)
            yield from _unit_layout_faults(weight, held, tensors.get(weight.name + UNITS))
            continue
        needed = packed_bytes(weight.elements, weight.bits)
        if held.dtype != "U8" or held.shape != (needed,):
            yield (
                f"{weight.name!r} of shape {list(weight.shape)} takes {needed:,} bytes at "
                f"{weight.bits} bits, and its codes have {held.data.size:,} ({held.dtype} of "
                f"shape {list(held.shape)})"
            )


def _unit_layout_faults(
    weight: StoredWeight, codes: StoredTensor, units: StoredTensor | None
) -> Iterator[str]:
    needed = packed_bytes(math.prod(weight.unit_shape), map_bits(1, weight.unit_widths))
    if units is not None and (units.dtype != "U8" or units.shape != (needed,)):
        yield (
            f"{weight.name!r} has {units.data.size:,} bytes of bit-widths ({units.dtype}), and "
            f"units of shape {list(weight.unit_shape)} take {needed:,}"
        )
    if codes.dtype != "U8" or len(codes.shape) != 1:
        yield f"{weight.name!r} has codes of type {codes.dtype} and shape {list(codes.shape)}"


def _content_faults(packed: PackedFile) -> Iterator[str]:
    found = content_digest(packed.container.tensors.values())
    if found != packed.manifest.sha256:
        yield f"the SHA-256 of its tensors is {found}, not {packed.manifest.sha256[:64]!r}"


def _code_faults(packed: PackedFile) -> Iterator[str]:
    """Yield codes that do not fit their grid, and numbers of grids that are none."""
    for grid in packed.manifest.grids:
        zero_point = None if grid.zero_point is None else numbers(packed.place(grid.zero_point))
        yield from number_faults(grid, numbers(packed.place(grid.scale)), zero_point)
    for weight in packed.manifest.weights:
        try:
            if weight.unit_widths and int(packed.units(weight).max(initial=0)) != weight.bits:
                yield f"{weight.name!r} has no unit of its {weight.bits} bits"
            codes = packed.codes(weight)
        except UsageError as error:
            yield f"{weight.name!r}: {error}"
            continue
        yield from code_faults(weight, codes)


def numbers(tensor: StoredTensor) -> npt.NDArray[np.generic]:
    """Return a tensor of a type that numpy has as an array, in its shape.

    Raises:
        FileFormatError: numpy has no such type.
    """
    if tensor.dtype not in _NUMPY:
        raise FileFormatError(
            f"numpy has no numbers of type {tensor.dtype}, which {tensor.name!r} holds; load it "
            f"with cgmq_fx.load_packed"
        )
    return np.frombuffer(tensor.data.tobytes(), _NUMPY[tensor.dtype]).reshape(tensor.shape)


def require_names(names: Iterable[str]) -> None:
    """Check that the tensors of a module have names that a file can hold.

    Raises:
        UsageError: some have not.
    """
    odd = [name for name in names if not is_tensor_name(name) or name.startswith(OWN)]
    if odd:
        raise UsageError(
            f"the tensors {odd[:_MAX_LISTED]} have names that no packed file holds: names are made "
            f"of printable characters without slashes, colons and quotes, and do not start with "
            f"{OWN!r}; rename these modules"
        )
