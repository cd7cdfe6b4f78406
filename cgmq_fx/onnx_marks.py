"""Replaces the marks of an ONNX model by what a format has for a grid."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.frozen import FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.marked_graph import MARK_DOMAIN, MARK_PLACE, MarkedGraph
from cgmq_fx.onnx_graph import OnnxGraph


class MarkWriter(ABC):
    """Replaces the marks of a model.

    Args:
        model: the ``onnx.ModelProto``; changed in place.
        marks: what its marks stand for.
    """

    #: Domains of nodes that it adds, and their versions.
    domains: ClassVar[tuple[tuple[str, int], ...]] = ()

    def __init__(self, model: Any, marks: MarkedGraph) -> None:
        self.graph, self.marks = OnnxGraph(model), marks
        self._outputs: dict[str, list[str]] = {}
        self._makers: dict[str, str] = {}
        for node in self.graph.graph.node:
            if node.domain == MARK_DOMAIN:
                self._outputs.setdefault(self._name(node), []).append(node.output[0])
                self._makers[node.output[0]] = self._name(node)

    def run(self) -> None:
        """Replace all marks.

        Raises:
            UnsupportedModelError: a grid is none that the format has; the message names it.
        """
        self._done: dict[str, int] = {}
        self.graph.rewrite(self._replaced)
        self.graph.set_domains(self.domains, without=MARK_DOMAIN)

    @abstractmethod
    def weight(self, output: str, name: str, module: FrozenWeight) -> Sequence[Any]:
        """Return the nodes that make the value of a weight, and add its tensors."""

    @abstractmethod
    def activation(self, x: str, output: str, name: str, module: FrozenQuantizer) -> Sequence[Any]:
        """Return the nodes that round x, and add the tensors of the grid."""

    def module_of(self, value: str) -> FrozenModule | None:
        """Return what puts a value of the model on a grid; None where it is none of a grid."""
        name = self._makers.get(value)
        return None if name is None else self.marks.frozen.get(name)

    def marked_by(self, node: Any) -> FrozenModule | None:
        """Return what a node marks; None where it is no mark, or that of a float parameter."""
        return self.marks.frozen.get(self._name(node)) if node.domain == MARK_DOMAIN else None

    def outputs_of(self, name: str) -> Sequence[str]:
        """Return the values that stand on a grid, as the model calls them."""
        return self._outputs[name]

    def _name(self, node: Any) -> str:
        (place,) = (item.i for item in node.attribute if item.name == MARK_PLACE)
        return self.marks.names[int(place)]

    def _replaced(self, node: Any) -> Sequence[Any]:
        if node.domain != MARK_DOMAIN:
            return [node]
        name = self._name(node)
        module = self.marks.frozen.get(name)
        if module is None:
            self.graph.rename(node.output[0], node.input[0])
            return []
        _check_dtype(name, module)
        call = self._done[name] = self._done.get(name, -1) + 1
        output = f"{name}.value.{call}" if call else f"{name}.value"
        if isinstance(module, FrozenWeight):
            self.graph.rename(node.output[0], f"{name}.value")
            return [] if call else self.weight(output, name, module)
        assert isinstance(module, FrozenQuantizer)
        self.graph.rename(node.output[0], output)
        return self.activation(node.input[0], output, name, module)


def _check_dtype(name: str, module: FrozenModule) -> None:
    dtypes = {module.scale.dtype, getattr(module, "dtype", torch.float32)} - {torch.float32}
    if dtypes:
        raise UnsupportedModelError(
            f"{name!r} has numbers of type {', '.join(map(str, dtypes))}; the export to ONNX takes "
            f"models in torch.float32: convert the float model with .float() before "
            f"cgmq_fx.prepare, or export it to .safetensors"
        )
