"""`load_packed`: the tensors of a packed file, bit for bit as they were in the lowered module."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cgmq_fx.container import StoredTensor
from cgmq_fx.errors import UsageError
from cgmq_fx.export_packed import TYPE_NAMES
from cgmq_fx.frozen import FrozenModule
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.manifest import StoredGrid, StoredWeight
from cgmq_fx.packed_file import CODES, open_packed
from cgmq_fx.prepared import PLAN
from cgmq_fx.unit_bits import UnitBits

_TYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in TYPE_NAMES.items()}
_MAX_LISTED = 10


@dataclass(frozen=True)
class PackedState:
    """What a packed file holds of a model.

    Attributes:
        tensors: by the names of the lowered module's state: packed codes, scales, zero_points,
            float parameters and buffers.
        codes: the codes of the weights below 32 bits, unpacked, by the path of their module.
        bit_widths: by site, as `LoweredModule.bit_widths`.
        weights: the weights below 32 bits, by the path of their module.
    """

    tensors: Mapping[str, Tensor]
    codes: Mapping[str, Tensor]
    bit_widths: Mapping[str, int]
    weights: Mapping[str, StoredWeight]
    _grids: tuple[StoredGrid, ...]
    _units: Mapping[str, UnitBits]

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return plain arrays: each weight as its real values, in its type, and all other tensors.

        What numpy has no type for, bfloat16, becomes float32. A weight has the path of its module.
        """
        found: dict[str, npt.NDArray[np.generic]] = {}
        own = tuple(f"{grid.name}." for grid in self._grids)
        for path, weight in self.weights.items():
            found[path] = _array(_value(weight, self.codes[path], self.tensors))
        for name, tensor in self.tensors.items():
            if not name.startswith(own):
                found[name] = _array(tensor)
        return found

    def load_into(self, fixed: LoweredModule) -> None:
        """Give a lowered module of the same graph these tensors.

        Raises:
            UsageError: it is not such a module; it stays as it was, and the message lists what
                differs.
        """
        if not isinstance(fixed, LoweredModule):
            raise UsageError(
                f"{type(fixed).__name__} is not lowered and cannot take packed tensors; give it "
                f"what cgmq_fx.lower returned"
            )
        held = {
            name: tensor
            for name, tensor in (*fixed.named_parameters(), *fixed.named_buffers())
            if not name.startswith(f"{PLAN}.")
        }
        faults = [*self._tensor_faults(held), *self._grid_faults(fixed)]
        if faults:
            more = f" and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
            raise UsageError(
                f"the packed tensors do not fit {type(fixed).__name__}: "
                f"{'; '.join(faults[:_MAX_LISTED])}{more}; lower the same model to the same "
                f"bit-widths"
            )
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(self.tensors[name])

    def _tensor_faults(self, held: Mapping[str, Tensor]) -> list[str]:
        faults = [f"{name!r} is only in the file" for name in self.tensors if name not in held]
        for name, tensor in held.items():
            own = self.tensors.get(name)
            if own is None:
                faults.append(f"{name!r} is only in the module")
            elif (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
                faults.append(
                    f"{name!r} is {own.dtype} of shape {list(own.shape)} in the file, "
                    f"{tensor.dtype} of shape {list(tensor.shape)} in the module"
                )
        return faults

    def _grid_faults(self, fixed: LoweredModule) -> list[str]:
        modules = dict(fixed.named_modules())
        faults = []
        for grid in self._grids:
            module = modules.get(grid.name)
            if not isinstance(module, FrozenModule):
                continue
            fields = ("bit_width", "quant_min", "quant_max", "channel_axis")
            here = tuple(getattr(module, field) for field in fields)
            bits = self._units.get(grid.name, grid.bits)
            there = (bits, grid.quant_min, grid.quant_max, grid.channel_axis)
            if here != there:
                faults.append(
                    f"{grid.name!r} has bits, quant_min, quant_max and channel axis {there} in the "
                    f"file, {here} in the module"
                )
        return faults


def load_packed(path: str | os.PathLike[str]) -> PackedState:
    """Read a file that `cgmq_fx.export` wrote as ``.safetensors``.

    Nothing in the file is run, and a damaged one is refused before any of it is used.

    Raises:
        FileFormatError: it cannot be read, is damaged, or contradicts itself.
    """
    packed = open_packed(path)
    manifest = packed.manifest
    tensors: dict[str, Tensor] = {}
    codes: dict[str, Tensor] = {}
    units: dict[str, UnitBits] = {}
    for weight in manifest.weights:
        tensors[f"{weight.name}.packed"] = _tensor(packed.container.tensors[weight.name + CODES])
        if weight.unit_widths:
            units[weight.name] = UnitBits(packed.units(weight).tobytes())
            shaped = torch.from_numpy(units[weight.name].array.copy()).view(weight.unit_shape)
            tensors[f"{weight.name}.unit_bits"] = shaped
        codes[weight.name] = torch.from_numpy(packed.codes(weight)).to(_TYPES[weight.storage])
    for grid in manifest.grids:
        tensors[f"{grid.name}.scale"] = _tensor(packed.place(grid.scale))
        if grid.zero_point is not None:
            tensors[f"{grid.name}.zero_point"] = _tensor(packed.place(grid.zero_point))
    for name in (*manifest.parameters, *manifest.buffers):
        tensors[name] = _tensor(packed.container.tensors[name])
    bits = list(manifest.bits)
    for weight in manifest.weights:
        bits[weight.site] = units.get(weight.name, bits[weight.site])
    names = (site.name for site in manifest.sites)
    return PackedState(
        MappingProxyType(tensors),
        MappingProxyType(codes),
        MappingProxyType(dict(zip(names, bits, strict=True))),
        MappingProxyType({weight.name: weight for weight in manifest.weights}),
        manifest.grids,
        MappingProxyType(units),
    )


def _tensor(stored: StoredTensor) -> Tensor:
    dtype = _TYPES[stored.dtype]
    if not stored.data.size:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.from_numpy(stored.data.copy()).view(dtype).reshape(stored.shape)


def _value(weight: StoredWeight, codes: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the real values of a weight, as `FrozenWeight` computes them."""
    dtype = _TYPES[weight.dtype]
    steps = codes.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if weight.zero_point is not None:
        steps = steps - tensors[f"{weight.name}.zero_point"]
    scale = tensors[f"{weight.name}.scale"]
    if weight.has_scale_by_width:
        units = tensors[f"{weight.name}.unit_bits"]
        index = torch.searchsorted(torch.tensor(weight.unit_widths), units.long())
        rows, places = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
            scale, index.expand(len(scale), *index.shape)
        )
        scale = rows.gather(0, places[:1]).squeeze(0)
    elif weight.channel_axis is not None:
        shape = [1] * steps.ndim
        shape[weight.channel_axis] = -1
        scale = scale.view(shape)
    return (steps * scale).to(dtype)


def _array(tensor: Tensor) -> npt.NDArray[np.generic]:
    found: npt.NDArray[np.generic] = (
        tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    ).numpy()
    return found
