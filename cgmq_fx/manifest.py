"""What the manifest of a packed file says; docs/formats/safetensors.md explains its fields.

Nothing here is believed before `cgmq_fx.packed_file` and `cgmq_fx.verify` compared it with the
tensors of the file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from cgmq_fx.cost.operation import BitSource, Operation

FORMAT = "cgmq_fx.packed"
VERSION = 1
#: Names of the tensors that are not those of the model.
OWN = "cgmq_fx_file"
MANIFEST = f"{OWN}.manifest"
POOL = f"{OWN}.qparams"
#: Bit-width of what has no quantizer.
FLOAT_BITS = 32


@dataclass(frozen=True)
class Place:
    """Where numbers stand in a pool, the tensor that holds those of all quantizers of one type.

    Attributes:
        dtype: type of the numbers; the pool is the tensor ``cgmq_fx_file.qparams.<dtype>``.
        at: index of the first number in the pool.
        shape: their shape.
    """

    dtype: str
    at: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Index behind the last number."""
        return self.at + math.prod(self.shape)


@dataclass(frozen=True)
class StoredSite:
    """One learned bit-width.

    Attributes:
        name: of the quantizer.
        role: ``weight``, ``activation`` or ``input``.
        elements: of its tensor, for one sample.
    """

    name: str
    role: str
    elements: int


@dataclass(frozen=True)
class StoredGrid:
    """A quantizer of an activation: real = (code - zero_point) * scale.

    Attributes:
        name: path of its module.
        site: index of its site.
        bits: bit-width of its codes.
        quant_min: smallest code.
        quant_max: largest code.
        channel_axis: the axis that scale and zero_point run along; None: they broadcast.
        scale: the scale.
        zero_point: the zero_point; None: 0.
    """

    name: str
    site: int
    bits: int
    quant_min: int
    quant_max: int
    channel_axis: int | None
    scale: Place
    zero_point: Place | None


@dataclass(frozen=True)
class StoredWeight(StoredGrid):
    """A weight whose codes stand, packed, in the tensor ``<name>.codes``.

    Attributes:
        shape: of the weight.
        signed: the codes are in two's complement.
        storage: type of the codes in the module.
        dtype: type of the value.
        unit_widths: where channels or elements differ in bit-width, those that they may have,
            rising; `bits` is then the widest that one has. Empty where all have `bits`.
        unit_shape: shape of what has a bit-width of its own, broadcasts with the weight.
        unit_bits: the bit-width of each channel, where channels differ. Those of elements stand,
            packed, in the tensor ``<name>.bit_widths``.
    """

    shape: tuple[int, ...]
    signed: bool
    storage: str
    dtype: str
    unit_widths: tuple[int, ...] = ()
    unit_shape: tuple[int, ...] = ()
    unit_bits: tuple[int, ...] = ()

    @property
    def has_unit_tensor(self) -> bool:
        """Whether the bit-widths of its units stand in a tensor."""
        return bool(self.unit_widths) and not self.unit_bits

    @property
    def has_scale_by_width(self) -> bool:
        """Whether the scale has a row for each of `unit_widths`."""
        return bool(self.unit_widths) and len(self.scale.shape) > len(self.shape)

    @property
    def elements(self) -> int:
        """Number of its codes."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoredOperation:
    """An operation, where its bit-widths come from, and why it is not quantized if it is not."""

    operation: Operation
    sources: tuple[BitSource, ...]
    reason: str


@dataclass(frozen=True)
class LiveTensor:
    """An activation in memory, live from step `first` to step `last`.

    An element has the bit-width of the site, or `bits` where there is none. The float network that
    "100 %" means has no copies.
    """

    name: str
    elements: int
    first: int
    last: int
    site: int | None
    bits: int
    is_copy: bool


@dataclass(frozen=True)
class StoredResource:
    """A cost and its bound.

    Attributes:
        name: of a table of the file, ``weight_memory`` or ``peak_activation_memory``.
        share: the bound as a part of the reference cost; None where it is none.
        value: the bound as a number of `unit`; None where it is none.
        unit: unit of `value`; None with a share.
        bound: what the bound comes to in the unit of the resource; None where there is no bound.
        convention: what counts, for people.
    """

    name: str
    share: Fraction | None
    value: Fraction | None
    unit: str | None
    bound: Fraction | None
    convention: tuple[str, ...]


@dataclass(frozen=True)
class StoredTable:
    """A cost table as the values of a table file, and the digest that it had when exported."""

    digest: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """All that a packed file says of its model.

    Attributes:
        generator: what wrote the file.
        model: class of the model.
        batch_axis: the axis of the inputs that counts samples; None: costs are of the whole input.
        input_bits: bit-width of what arrives from outside; None where it is learned.
        sha256: of all tensors but the manifest, see `cgmq_fx.packed_file.content_digest`.
        sites: the learned bit-widths.
        weights: weights below 32 bits.
        quantizers: of activations, below 32 bits.
        parameters: names of the tensors that stay float parameters.
        buffers: names of the other tensors.
        operations: in the order of the graph.
        stored_sites: indices of the sites whose weights are counted by ``weight_memory``.
        float_parameters: number of float parameters before batch norms were folded; None where no
            budget asked for it.
        live: activations; None where no budget asked for them.
        tables: cost tables.
        resources: costs, those with a bound first.
    """

    generator: str
    model: str
    batch_axis: int | None
    input_bits: int | None
    sha256: str
    sites: tuple[StoredSite, ...]
    weights: tuple[StoredWeight, ...]
    quantizers: tuple[StoredGrid, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    operations: tuple[StoredOperation, ...]
    stored_sites: tuple[int, ...]
    float_parameters: int | None
    live: tuple[LiveTensor, ...] | None
    tables: tuple[StoredTable, ...]
    resources: tuple[StoredResource, ...]

    @property
    def grids(self) -> tuple[StoredGrid, ...]:
        """All quantizers, those of weights first."""
        return (*self.weights, *self.quantizers)

    @property
    def bits(self) -> tuple[int, ...]:
        """The (widest) bit-width of every site; 32 where it has no quantizer."""
        widths: dict[int, int] = {}
        for grid in self.grids:
            widths[grid.site] = max(widths.get(grid.site, 0), grid.bits)
        return tuple(widths.get(site, FLOAT_BITS) for site in range(len(self.sites)))
