"""An exported file of any format, as `cgmq_fx.verify` reads it, and what must fit in all of them.

Each format has a reader that returns a `StoredFile` only when the manifest and the real tensors of
the file agree: the codes of every weight have the shape, the width and the grid that the manifest
says, and so has every quantizer of an activation. The functions below are what all readers check;
each yields one text for each fault.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cgmq_fx.container import FileFault
from cgmq_fx.gates import BINARY_WIDTH
from cgmq_fx.manifest import Manifest, StoredGrid, StoredWeight
from cgmq_fx.packing import MAX_WIDTH, MIN_WIDTH, code_range
from cgmq_fx.unit_bits import UnitBits

_MAX_LISTED = 10


@dataclass(frozen=True)
class StoredFile:
    """What `verify` needs of a file that was opened and whose manifest describes its tensors.

    Attributes:
        path: where it is, for messages.
        manifest: what it says of the model.
        float_elements: number of elements of the tensors that `manifest.parameters` names.
        notes: what people should know of how the file computes.
        units: the bit-widths of weights whose units differ in these, by the name of the weight.
    """

    path: str
    manifest: Manifest
    float_elements: int
    notes: tuple[str, ...] = ()
    units: Mapping[str, UnitBits] = field(default_factory=dict)


def refuse(fault: FileFault, faults: Iterable[str]) -> None:
    """Raise one error that lists what contradicts itself in a file, if anything does.

    Raises:
        FileFormatError: there is a fault.
    """
    found = list(faults)
    if found:
        more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
        raise fault(f"contradicts itself: {'; '.join(found[:_MAX_LISTED])}{more}")


def name_faults(manifest: Manifest) -> Iterator[str]:
    """Yield what is there twice."""
    grids = [grid.name for grid in manifest.grids]
    if len(set(grids)) < len(grids):
        yield "the manifest names a quantizer twice"
    sites = [site.name for site in manifest.sites]
    if len(set(sites)) < len(sites):
        yield "two sites have one name"


def grid_faults(manifest: Manifest) -> Iterator[str]:
    """Yield quantizers whose width, levels, site and shapes do not fit each other."""
    for grid in manifest.grids:
        text = f"{grid.name!r}"
        if not MIN_WIDTH <= grid.bits <= MAX_WIDTH:
            yield f"{text} has {grid.bits} bits, not {MIN_WIDTH} to {MAX_WIDTH}"
            continue
        if grid.site >= len(manifest.sites):
            yield f"{text} has the site {grid.site} of {len(manifest.sites)}"
        elif not _is_named_after(grid.name, manifest.sites[grid.site].name):
            yield f"{text} has the site {manifest.sites[grid.site].name!r}, which is another's"
        levels = grid.quant_max - grid.quant_min + 1
        if grid.bits == BINARY_WIDTH and grid.quant_min < 0:
            levels -= 1  # -1 and 1, without 0
        if not 2 ** (grid.bits - 1) < levels <= 2**grid.bits:
            yield (
                f"{text} has {levels} levels, {grid.quant_min} to {grid.quant_max}, which is not "
                f"{grid.bits} bits"
            )
    for weight in manifest.weights:
        yield from _weight_faults(weight)


def _is_named_after(path: str, site: str) -> bool:
    """Tell whether a module has the name of its site; several of one site are numbered."""
    name = path.rpartition(".")[2]
    return name == site or bool(re.fullmatch(r"_\d+", name.removeprefix(site)))


def _weight_faults(weight: StoredWeight) -> Iterator[str]:
    if MIN_WIDTH <= weight.bits <= MAX_WIDTH:
        low, high = code_range(weight.bits, signed=weight.signed)
        if weight.quant_min < low or weight.quant_max > high:
            kind = "signed" if weight.signed else "unsigned"
            yield (
                f"{weight.name!r} has codes from {weight.quant_min} to {weight.quant_max}, which "
                f"{weight.bits} {kind} bits cannot hold"
            )
    axis, rank = weight.channel_axis, len(weight.shape)
    if axis is not None and not -rank <= axis < rank:
        yield f"{weight.name!r} has the channel axis {axis} of {rank}"
    elif weight.has_scale_by_width:
        rows, *rest = weight.scale.shape
        if rows != len(weight.unit_widths) or not _fits(weight, tuple(rest), along_axis=False):
            yield f"{weight.name!r} has a scale of shape {list(weight.scale.shape)}"
    elif not _fits(weight, weight.scale.shape, along_axis=axis is not None):
        yield f"{weight.name!r} has a scale of shape {list(weight.scale.shape)}"
    zero_point = weight.zero_point
    if zero_point is not None and not _fits(weight, zero_point.shape, along_axis=False):
        yield f"{weight.name!r} has a zero_point of shape {list(zero_point.shape)}"


def unit_faults(weight: StoredWeight) -> Iterator[str]:
    """Yield what is wrong with the units of a weight that differ in bit-width."""
    text, widths = f"{weight.name!r}", weight.unit_widths
    if list(widths) != sorted(set(widths)) or len(widths) < 2 or widths[-1] > MAX_WIDTH:
        yield f"{text} has units of {list(widths)} bits, which do not rise up to {MAX_WIDTH}"
    shape = weight.unit_shape
    pairs = zip(shape, weight.shape, strict=False)
    if len(shape) != len(weight.shape) or not all(own in (1, full) for own, full in pairs):
        yield f"{text} has units of shape {list(shape)}, and is of shape {list(weight.shape)}"
    if weight.unit_bits and (
        len(weight.unit_bits) != math.prod(shape) or not set(weight.unit_bits) <= set(widths)
    ):
        yield f"{text} has {len(weight.unit_bits)} bit-widths of channels that are not its units'"
    if weight.zero_point is not None or not weight.signed:
        yield f"{text} has units that differ in bit-width on a grid that is not symmetric"


def _fits(weight: StoredWeight, shape: tuple[int, ...], *, along_axis: bool) -> bool:
    if along_axis:
        assert weight.channel_axis is not None
        return shape == (weight.shape[weight.channel_axis],)
    pairs = zip(reversed(shape), reversed(weight.shape), strict=False)
    return len(shape) <= len(weight.shape) and all(own in (1, full) for own, full in pairs)


def number_faults(
    grid: StoredGrid,
    scale: npt.NDArray[np.generic],
    zero_point: npt.NDArray[np.generic] | None,
) -> Iterator[str]:
    """Yield numbers of a quantizer that are none."""
    for label, numbers in (("scale", scale), ("zero_point", zero_point)):
        if numbers is not None and not np.isfinite(numbers).all():
            yield f"{grid.name!r} has a {label} that is not finite"


def code_faults(weight: StoredWeight, codes: npt.NDArray[np.signedinteger]) -> Iterator[str]:
    """Yield codes of a weight that do not lie on its grid."""
    if codes.size and not (weight.quant_min <= codes.min() and codes.max() <= weight.quant_max):
        yield (
            f"{weight.name!r} has codes from {codes.min()} to {codes.max()}, its grid "
            f"{weight.quant_min} to {weight.quant_max}"
        )
