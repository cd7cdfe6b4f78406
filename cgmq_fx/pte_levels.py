"""How many codes a tensor for XNNPACK can have: what its program clamps, in codes."""

from collections.abc import Mapping

import numpy as np

from cgmq_fx.xnnpack_reader import CONVERT, MOVING, QINT8, XnnGraph, XnnValue

_INT8 = np.iinfo(np.int8)
_MAX_DEPTH = 50
Levels = tuple[int, int]
Clamp = tuple[float, float]
#: All codes of int8.
ANY: Levels = (int(_INT8.min), int(_INT8.max))


class LevelReader:
    """Finds the smallest and the largest code of int8 tensors of one part.

    Args:
        graph: of the part.
        constants: the bytes of constants by their keys.
        given: by argument of the part, the ends of the codes, or of the real values, that it has
            already; those that have none are left out.
    """

    def __init__(
        self,
        graph: XnnGraph,
        constants: Mapping[str, memoryview],
        given: Mapping[int, Clamp],
    ) -> None:
        self.graph, self.constants, self.given = graph, constants, given
        self._made_by = {node.output: node for node in graph.nodes}

    def ends(self, name: int) -> Clamp | None:
        """Return the ends of a tensor: of its codes, or of its real values; None without any."""
        value = self.graph.values[name]
        return self.levels(name) if value.kind == QINT8 else self._clamp(name, _MAX_DEPTH)

    def levels(self, name: int) -> Levels:
        """Return the codes that an int8 tensor may have; all of int8 where nothing clamps them."""
        return self._levels(name, _MAX_DEPTH)

    def _levels(self, name: int, depth: int) -> Levels:
        value, node = self.graph.values[name], self._made_by.get(name)
        if value.key:
            held = np.frombuffer(self.constants[value.key], np.int8)
            return (int(held.min()), int(held.max())) if held.size else (0, 0)
        if node is None or depth == 0:
            low, high = self._given(value) or ANY
            return int(low), int(high)
        if node.clamp is not None:
            return _codes(value, node.clamp)
        if node.kind == CONVERT:
            clamp = self._clamp(node.inputs[0], depth - 1)
            return ANY if clamp is None else _codes(value, clamp)
        source = self.graph.values[node.inputs[0]] if node.inputs else None
        if node.kind in MOVING and source is not None and source.kind == QINT8:
            same = (source.scale, source.zero_point) == (value.scale, value.zero_point)
            return self._levels(node.inputs[0], depth - 1) if same else ANY
        return ANY

    def _clamp(self, name: int, depth: int) -> Clamp | None:
        """Return the ends of real values; None where nothing clamps them."""
        value, node = self.graph.values[name], self._made_by.get(name)
        if value.kind == QINT8 or depth == 0:
            return None
        if node is None:
            return self._given(value)
        if node.clamp is not None:
            return node.clamp
        return self._clamp(node.inputs[0], depth - 1) if node.kind in MOVING else None

    def _given(self, value: XnnValue) -> Clamp | None:
        return None if value.argument is None else self.given.get(value.argument)


def _codes(value: XnnValue, clamp: Clamp) -> Levels:
    """Return the codes of the ends of a clamp, at most those of int8."""
    with np.errstate(all="ignore"):
        ends = np.array(clamp, np.float64) / np.float64(value.scale) + value.zero_point
    if np.isnan(ends).any():
        return ANY
    low, high = np.clip(np.rint(ends), *ANY).astype(int).tolist()
    return int(low), int(high)
