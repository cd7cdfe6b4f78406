"""How many codes a tensor of an XNNPACK graph can have: what its graph clamps, in codes."""

from collections.abc import Mapping

import numpy as np

from cgmq_fx.xnnpack_reader import CONVERT, MOVING, QINT8, XnnGraph, XnnNode, XnnValue

_INT8 = np.iinfo(np.int8)
_ANY = (int(_INT8.min), int(_INT8.max))
_MAX_DEPTH = 50
Levels = tuple[int, int]


class LevelReader:
    """Finds the smallest and the largest code of int8 tensors.

    Args:
        graph: of one part for XNNPACK.
        constants: the bytes of constants by their keys.
    """

    def __init__(self, graph: XnnGraph, constants: Mapping[str, memoryview]) -> None:
        self.graph, self.constants = graph, constants
        self._made_by = {node.output: node for node in graph.nodes}

    def levels(self, name: int) -> Levels:
        """Return the codes that an int8 tensor may have; all of int8 where nothing clamps them."""
        return self._levels(name, _MAX_DEPTH)

    def _levels(self, name: int, depth: int) -> Levels:
        value, node = self.graph.values[name], self._made_by.get(name)
        if value.key:
            held = np.frombuffer(self.constants[value.key], np.int8)
            return (int(held.min()), int(held.max())) if held.size else (0, 0)
        if node is None or depth == 0:
            return _ANY
        if node.clamp is not None:
            return _codes(value, node.clamp)
        if node.kind == CONVERT:
            return self._converted(value, node, depth)
        source = self.graph.values[node.inputs[0]] if node.inputs else None
        if node.kind in MOVING and source is not None and source.kind == QINT8:
            same = (source.scale, source.zero_point) == (value.scale, value.zero_point)
            return self._levels(node.inputs[0], depth - 1) if same else _ANY
        return _ANY

    def _converted(self, value: XnnValue, node: XnnNode, depth: int) -> Levels:
        """Return the codes of values that were clamped before they became codes."""
        source = node.inputs[0]
        for _ in range(depth):
            maker = self._made_by.get(source)
            if maker is None or not maker.inputs:
                break
            if maker.clamp is not None:
                return _codes(value, maker.clamp)
            if maker.kind not in MOVING:
                break
            source = maker.inputs[0]
        return _ANY


def _codes(value: XnnValue, clamp: tuple[float, float]) -> Levels:
    """Return the codes of the ends of a clamp, at most those of int8."""
    with np.errstate(all="ignore"):
        ends = np.array(clamp, np.float64) / np.float64(value.scale) + value.zero_point
    if np.isnan(ends).any():
        return _ANY
    low, high = np.clip(np.rint(ends), *_ANY).astype(int).tolist()
    return int(low), int(high)
