"""Finds the tensors of a lowered module among the bytes of its ``.pte`` program."""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cgmq_fx.frozen import FrozenModule, FrozenWeight
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.pools import NUMPY_TYPES, Array, array_of
from cgmq_fx.prepared import PLAN
from cgmq_fx.pte_grids import PteGrids
from cgmq_fx.pte_places import Place, orders
from cgmq_fx.xnnpack_modules import int8_codes, is_eight_bit
from cgmq_fx.xnnpack_reader import QCINT32

_MAX_GROUPS = 64
#: Types of files by those of numpy.
_TYPES = {np.dtype(kind).str: name for name, kind in NUMPY_TYPES.items()} | {"|b1": "BOOL"}


class PlaceFinder:
    """Finds where tensors stand in a program.

    Args:
        fixed: the module.
        grids: its program.
    """

    def __init__(self, fixed: LoweredModule, grids: PteGrids) -> None:
        self.fixed, self.grids = fixed, grids
        self._keys: dict[tuple[str, bytes], list[str]] = {}
        for key, item in grids.constants.items():
            digest = hashlib.sha256(item.data.data).digest()
            self._keys.setdefault((item.dtype, digest), []).append(key)

    def places(self) -> list[Place]:
        """Return a place for each tensor of the program; several for what stands there twice.

        Constants that the module does not have are called after their number.
        """
        frozen = {
            name: module
            for name, module in self.fixed.named_modules()
            if isinstance(module, FrozenModule)
        }
        found: list[Place] = []
        for name, module in frozen.items():
            if isinstance(module, FrozenWeight):
                found.extend(self._of_weight(name, module))
        taken = {place.key for place in found}
        left = [key for key in self.grids.constants if key not in taken]
        return [*found, *self._named(left, tuple(f"{path}." for path in (*frozen, PLAN)))]

    def _of_weight(self, name: str, module: FrozenWeight) -> Iterator[Place]:
        forms = [module().detach().cpu().numpy()]
        if is_eight_bit(module):
            forms.append(int8_codes(module).cpu().numpy())
        for form in forms:
            yield from self._of(name, form)

    def _of(self, name: str, tensor: Array) -> Iterator[Place]:
        """Yield the places of bytes that a tensor has in one order of its axes."""
        dtype = _TYPES.get(tensor.dtype.str, "")
        groups = range(2, _MAX_GROUPS + 1) if tensor.ndim in (3, 4) else ()
        for view, axes in orders(tensor.shape, groups):
            data = np.ascontiguousarray(tensor.reshape(view).transpose(axes)).tobytes()
            keys = self._keys.get((dtype, hashlib.sha256(data).digest()), [])
            yield from (Place(name, key, tuple(view), tuple(axes)) for key in keys)
            if keys:
                return

    def _named(self, left: list[str], own: tuple[str, ...]) -> Iterator[Place]:
        """Yield a place for each key that is left, under a name of the module where it has one."""
        state = {
            name: value.detach().cpu()
            for name, value in (*self.fixed.named_parameters(), *self.fixed.named_buffers())
            if not name.startswith(own) and value.dtype != torch.bfloat16
        }
        waiting, used = dict.fromkeys(left), set()
        for name, value in state.items():
            for place in self._of(name, value.numpy()):
                if place.key in waiting and name not in used:
                    used.add(name)
                    del waiting[place.key]
                    yield place
        for number, key in enumerate(waiting):
            item = self.grids.constants[key]
            rounded = self._rounded(key, {k: v for k, v in state.items() if k not in used})
            used.add(rounded or "")
            name = rounded or f"constants.{number}"
            yield Place(name, key, item.shape, tuple(range(len(item.shape))))

    def _rounded(self, key: str, state: dict[str, Tensor]) -> str | None:
        """Return the name of the bias that XNNPACK has as the integers of a key."""
        for value in self.grids.read_as.get(key, ()):
            if value.kind != QCINT32:
                continue
            scale = np.frombuffer(self.grids.file.named[value.scale_key], "<f4")
            codes = array_of(self.grids.constants[key]).astype(np.float64)
            for name, bias in state.items():
                if bias.shape == codes.shape == scale.shape and bias.is_floating_point():
                    apart = bias.numpy().astype(np.float64) / scale - codes
                    if np.abs(apart).max(initial=0) <= 1:
                        return name
        return None
