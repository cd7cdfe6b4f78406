"""An ONNX graph that is rewritten node by node."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class OnnxGraph:
    """The graph of a model, its values by name.

    Args:
        model: an ``onnx.ModelProto``; changed in place.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self._renamed: dict[str, str] = {}
        self._added: dict[str, Any] = {}
        self._index()

    def _index(self) -> None:
        self.readers = readers_of(self.graph.node)
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def rewrite(self, replace: Callable[[Any], Sequence[Any]]) -> None:
        """Put ``replace(node)`` in the place of every node, then what was renamed and added."""
        nodes = [new for node in self.graph.node for new in replace(node)]
        for node in nodes:
            for place, name in enumerate(node.input):
                node.input[place] = self._renamed.get(name, name)
        outputs = {item.name for item in self.graph.output}
        self._keep_outputs(nodes, outputs)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input} | outputs
        kept = [item for item in self.graph.initializer if item.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend([*kept, *self._added.values()])
        self._renamed, self._added = {}, {}
        self._index()

    def rank_of(self, name: str) -> int:
        """Return how many axes a value has, as far as the exporter said so."""
        known = (*self.graph.value_info, *self.graph.input, *self.graph.output)
        return next(len(v.type.tensor_type.shape.dim) for v in known if v.name == name)

    def set_domains(self, added: Iterable[tuple[str, int]], without: str) -> None:
        """Say which sets of operators the nodes are of."""
        import onnx

        kept = [item for item in self.model.opset_import if item.domain != without]
        new = [onnx.helper.make_opsetid(domain, version) for domain, version in added]
        del self.model.opset_import[:]
        self.model.opset_import.extend([*kept, *new])

    def _keep_outputs(self, nodes: list[Any], outputs: Collection[str]) -> None:
        """Let outputs of the graph that were renamed keep their names."""
        import onnx

        for old, new in self._renamed.items():
            if old in outputs:
                nodes.append(onnx.helper.make_node("Identity", [new], [old], name=old))

    def rename(self, old: str, new: str) -> None:
        """Let nodes that read `old` read `new`."""
        if old != new:
            self._renamed[old] = new

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        output: str,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> Any:
        """Return a new node, named after its output."""
        import onnx

        return onnx.helper.make_node(
            op_type, inputs, [output], name=output, domain=domain, **(attributes or {})
        )

    def add_array(self, name: str, values: npt.NDArray[np.generic]) -> str:
        """Add an initializer of the type that numpy has; return its name."""
        import onnx

        held = np.ascontiguousarray(values).reshape(values.shape)
        self._added[name] = onnx.numpy_helper.from_array(held, name)
        return name

    def add_integers(self, name: str, values: npt.NDArray[np.generic], dtype: str) -> str:
        """Add an initializer of an integer type of ONNX, packed where that is narrow."""
        import onnx

        code = onnx.TensorProto.DataType.Value(dtype)
        numbers = np.asarray(values).astype(onnx.helper.tensor_dtype_to_np_dtype(code))
        self._added[name] = onnx.numpy_helper.from_array(numbers, name)
        return name

    def partners_of(self, name: str, op_types: Collection[str]) -> Iterator[str]:
        """Yield what such operations read beside a value, or beside it after it was rearranged."""
        for node in self.readers.get(name, ()):
            if node.op_type in op_types:
                yield from (other for other in node.input if other != name)
            elif node.op_type in _MOVES:
                yield from self.partners_of(node.output[0], op_types)

    def num_readers(self, name: str) -> int:
        """Return how many operations read a value, as it is or after it was rearranged."""
        return sum(
            self.num_readers(node.output[0]) if node.op_type in _MOVES else 1
            for node in self.readers.get(name, ())
        )

    def source_of(self, name: str) -> str:
        """Return the value that one is before it was rearranged."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type not in _REARRANGES:
            return name
        return self.source_of(maker.input[0])

    def reaches(self, name: str, op_types: Collection[str]) -> bool:
        """Tell whether a value is read by such an operation, or is after it was rearranged."""
        return any(
            node.op_type in op_types
            or (node.op_type in _MOVES and self.reaches(node.output[0], op_types))
            for node in self.readers.get(name, ())
        )


#: What leaves numbers as they are; and a ReLU, which a quantizer behind it does too, and a maximum,
#: which is the same of rounded numbers: the runtime quantizes in front of it instead.
_REARRANGES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity"})
_MOVES = _REARRANGES | {"Relu", "MaxPool"}


def readers_of(nodes: Sequence[Any]) -> dict[str, list[Any]]:
    """Return by name of a value the nodes that read it."""
    found: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found
