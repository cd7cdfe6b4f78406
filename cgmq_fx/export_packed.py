"""Writes a lowered module as a packed file: `cgmq_fx.manifest` says what stands in it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cgmq_fx.account import WEIGHT_MEMORY
from cgmq_fx.container import ITEM_BYTES, StoredTensor
from cgmq_fx.cost.peak_memory import PeakMemory
from cgmq_fx.cost.totals import FLOAT_BITS, Resource
from cgmq_fx.errors import UsageError
from cgmq_fx.frozen import FrozenModule, FrozenWeight
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.manifest import (
    MANIFEST,
    POOL,
    LiveTensor,
    Manifest,
    Place,
    StoredGrid,
    StoredOperation,
    StoredResource,
    StoredSite,
    StoredTable,
    StoredWeight,
)
from cgmq_fx.manifest_json import to_bytes
from cgmq_fx.packed_codes import storage_type
from cgmq_fx.packed_file import CODES, UNITS, content_digest, require_names
from cgmq_fx.packing import pack
from cgmq_fx.prepared import PLAN
from cgmq_fx.report import Report
from cgmq_fx.unit_bits import map_bits

#: The type of safetensors for each type of torch.
TYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_packed(fixed: LoweredModule, contents: Report, path: Path) -> None:
    """Write `fixed` to a new file.

    Args:
        fixed: what `lower` returned.
        contents: its report.
        path: where to.

    Raises:
        UsageError: a tensor has a name or a type that the format does not have, or the package
            safetensors is not installed.
        CostTableError: a cost table is code, which no file can hold.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UsageError(
            "the export to .safetensors needs the package safetensors, which is not installed: "
            "pip install 'cgmq-fx[export]'"
        ) from error
    tensors, manifest = packed_content(fixed, contents)
    compressed = np.frombuffer(to_bytes(manifest), np.uint8).copy()
    tensors[MANIFEST] = torch.from_numpy(compressed)
    save_file(tensors, path)


def packed_content(fixed: LoweredModule, contents: Report) -> tuple[dict[str, Tensor], Manifest]:
    """Return the tensors of a packed file, by name and without the manifest, and the manifest.

    Args:
        fixed: what `lower` returned.
        contents: its report.

    Raises:
        UsageError: a tensor has a name or a type that the format does not have.
        CostTableError: a cost table is code, which no file can hold.
    """
    return _Packer(fixed).packed(contents)


class _Packer:
    """Collects the tensors of a file and what its manifest says of them."""

    def __init__(self, fixed: LoweredModule) -> None:
        self.fixed = fixed
        self.accounting = fixed.plan.accounting
        self.tensors: dict[str, Tensor] = {}
        self._pools: dict[str, list[Tensor]] = {}
        self._site = {name: index for index, name in enumerate(self.accounting.site_names)}

    def packed(self, contents: Report) -> tuple[dict[str, Tensor], Manifest]:
        frozen = {
            name: module
            for name, module in self.fixed.named_modules()
            if isinstance(module, FrozenModule)
        }
        weights, quantizers = [], []
        for name, module in frozen.items():
            if isinstance(module, FrozenWeight):
                weights.append(self._weight(name, module))
            else:
                quantizers.append(self._grid(name, module))
        parameters, buffers = self._floats(frozen)
        require_names((*self.tensors, *frozen))
        for dtype, parts in self._pools.items():
            self.tensors[f"{POOL}.{dtype}"] = torch.cat(parts)
        peak = self.accounting.resources.get("peak_activation_memory")
        memory = self.accounting.resources.get(WEIGHT_MEMORY)
        settings = self.fixed.plan.settings
        manifest = Manifest(
            generator=f"cgmq-fx {version('cgmq-fx')}",
            model=contents.model,
            batch_axis=settings.batch_axis,
            input_bits=settings.input_bits,
            sha256=content_digest(map(_stored, self.tensors, self.tensors.values())),
            sites=tuple(
                StoredSite(site.name, site.role, site.elements) for site in self.accounting.sites
            ),
            weights=tuple(weights),
            quantizers=tuple(quantizers),
            parameters=parameters,
            buffers=buffers,
            operations=tuple(self._operations()),
            stored_sites=_stored_sites(memory),
            float_parameters=_float_parameters(memory),
            live=_live(peak) if isinstance(peak, PeakMemory) else None,
            tables=tuple(
                StoredTable(table.digest, table.to_json()) for table in settings.tables.values()
            ),
            resources=tuple(self._resources(contents)),
        )
        return self.tensors, manifest

    # -- tensors ---------------------------------------------------------------------------------

    def _grid(self, name: str, module: FrozenModule) -> StoredGrid:
        axis = module.channel_axis
        zero_point = module.zero_point
        return StoredGrid(
            name,
            self._site[module.site],
            int(module.bit_width),
            module.quant_min,
            module.quant_max,
            axis if isinstance(axis, int) else None,
            self._place(module.scale),
            self._place(zero_point) if isinstance(zero_point, Tensor) else None,
        )

    def _weight(self, name: str, module: FrozenWeight) -> StoredWeight:
        signed = module.quant_min < 0
        self.tensors[name + CODES] = module.packed.cpu()
        grid = self._grid(name, module)
        weight = StoredWeight(
            **vars(grid),
            shape=tuple(module.shape),
            signed=signed,
            storage=TYPE_NAMES[storage_type(int(module.bit_width), signed=signed)],
            dtype=TYPE_NAMES[module.dtype],
        )
        return weight if module.unit_bits is None else self._with_units(weight, module)

    def _with_units(self, weight: StoredWeight, module: FrozenWeight) -> StoredWeight:
        """Return the weight with the bit-widths of its channels; those of elements are a tensor."""
        assert module.unit_bits is not None
        shape, units = tuple(module.unit_bits.shape), module.unit_bits.flatten()
        weight = replace(weight, unit_widths=module.unit_widths, unit_shape=shape)
        if max(shape) == len(units):
            return replace(weight, unit_bits=tuple(units.tolist()))
        self.tensors[weight.name + UNITS] = _packed_units(module)
        return weight

    def _place(self, values: Tensor) -> Place:
        """Append numbers to the pool of their type and return where they stand."""
        dtype = TYPE_NAMES[values.dtype]
        pool = self._pools.setdefault(dtype, [])
        at = sum(map(len, pool))
        pool.append(values.detach().cpu().reshape(-1))
        return Place(dtype, at, tuple(values.shape))

    def _floats(
        self, frozen: Mapping[str, FrozenModule]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Take all other tensors; return the names of the parameters and of the buffers."""
        own = tuple(f"{path}." for path in (*frozen, PLAN))
        found: list[tuple[str, ...]] = []
        for tensors in (self.fixed.named_parameters(), self.fixed.named_buffers()):
            taken = {name: value for name, value in tensors if not name.startswith(own)}
            odd = {name: value.dtype for name, value in taken.items() if not _is_plain(value)}
            if odd:
                raise UsageError(
                    f"the tensors {odd} cannot be exported: .safetensors holds dense tensors of "
                    f"the types {', '.join(ITEM_BYTES)}"
                )
            for name, value in taken.items():
                self.tensors[name] = value.detach().cpu().contiguous().clone()
            found.append(tuple(taken))
        return found[0], found[1]

    # -- costs -----------------------------------------------------------------------------------

    def _operations(self) -> Iterator[StoredOperation]:
        pairs = zip(self.accounting.operations, self.accounting.ledger, strict=True)
        for bound, entry in pairs:
            yield StoredOperation(bound.operation, bound.sources, entry.reason)

    def _resources(self, contents: Report) -> Iterator[StoredResource]:
        limits = self.fixed.plan.settings.limits
        for item in contents.resources:
            limit = limits.get(item.name)
            stored = StoredResource(item.name, None, None, None, item.budget, item.convention)
            if limit is not None:
                stored = replace(stored, share=limit.share, value=limit.value, unit=limit.unit)
            yield stored


def _packed_units(module: FrozenWeight) -> Tensor:
    """Return which of its `unit_widths` each unit of a weight has, packed."""
    assert module.unit_bits is not None
    units = module.unit_bits.cpu().numpy()
    places = np.searchsorted(np.array(module.unit_widths), units)
    bits = map_bits(1, module.unit_widths)
    return torch.from_numpy(pack(places, bits, signed=False))


def _is_plain(value: Tensor) -> bool:
    return value.dtype in TYPE_NAMES and value.layout is torch.strided and not value.is_meta


def _stored(name: str, value: Tensor) -> StoredTensor:
    data = value.reshape(-1).view(torch.uint8).numpy()
    return StoredTensor(name, TYPE_NAMES[value.dtype], tuple(value.shape), data)


def _stored_sites(memory: Resource | None) -> tuple[int, ...]:
    if memory is None:
        return ()
    return tuple(term.sites[0] for term in memory.terms if term.sites[0] is not None)


def _float_parameters(memory: Resource | None) -> int | None:
    if memory is None:
        return None
    fixed = sum(term.cost(()) for term in memory.terms if term.sites[0] is None)
    return fixed // FLOAT_BITS


def _live(peak: PeakMemory) -> tuple[LiveTensor, ...]:
    return tuple(
        LiveTensor(item.name, item.elements, item.first, item.last, item.site, item.bits,
                   item.is_copy)
        for item in peak.buffers
    )  # fmt: skip
