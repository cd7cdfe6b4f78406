"""What selectors see of a graph: names, layers and roles of operations and their operands."""

from collections.abc import Iterator

from torch import fx, nn

from cgmq_fx.passes.candidates import Read, is_input
from cgmq_fx.passes.meta import MODULE_PATH, OP_INFO, VALUE
from cgmq_fx.passes.names import first_tensor, operation_names
from cgmq_fx.passes.recurrent import is_recurrent, products_of
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.quantizer_spec import Role
from cgmq_fx.selectors import Candidate, Operand

# Names that the report gives to the two products of attention.
_PRODUCTS = ("qk", "pv")


class Describer:
    """Describes the operations of a graph, under all names that shared layers and weights have."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.names = operation_names(gm)
        self._module_names: dict[int, list[str]] = {}
        for name, module in gm.named_modules(remove_duplicate=False):
            self._module_names.setdefault(id(module), []).append(name)
        self._tensor_names: dict[int, list[str]] = {}
        for name, tensor in _named_tensors(gm):
            self._tensor_names.setdefault(id(tensor), []).append(name)

    def operations(self) -> list[Candidate]:
        """Return the nodes that call something, as operations without operands."""
        return [
            Candidate(self._operation_names(node), self._types(node), None)
            for node in self.gm.graph.nodes
            if node.op.startswith("call_")
        ]

    def operand(self, read: Read) -> Candidate:
        """Return one operand of one operation."""
        node, info = read.node, OP_INFO.get(read.node)
        path = MODULE_PATH.find(node) or ""
        layer = self._module(path)
        parameters = self._parameters(read)
        value = VALUE.find(read.tensor) if read.ref is not None else None
        shape = first_tensor(value)
        described = Operand(
            self.names.get(node, node.name),
            info.op,
            info.target,
            path,
            type(layer) if path and layer is not None else None,
            _role(read),
            read.site,
            parameters[0] if parameters else read.tensor.name,
            None if shape is None else shape.shape,
        )
        names = self._operation_names(node) | {read.site, *parameters}
        return Candidate(names, self._types(node), described)

    # -- names -----------------------------------------------------------------------------------

    def _operation_names(self, node: fx.Node) -> frozenset[str]:
        names = {found for path in _prefixes(node) for found in self._aliases(path)}
        own = self.names.get(node)
        if own is not None:
            names.add(own)
            if OP_INFO.get(node).op == "attention":
                names |= {f"{own}.{part}" for part in _PRODUCTS}
            if is_recurrent(node):
                names |= {f"{own}.{product.name}" for product in products_of(node)}
        return frozenset(names)

    def _aliases(self, path: str) -> list[str]:
        module = self._module(path)
        return [path] if module is None else [path, *self._module_names.get(id(module), ())]

    def _types(self, node: fx.Node) -> frozenset[type[nn.Module]]:
        modules = (self._module(path) for path in _prefixes(node))
        return frozenset(type(module) for module in modules if module is not None)

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.gm.get_submodule(path)
        except AttributeError:  # a front end may name layers that it has dissolved
            return None

    def _parameters(self, read: Read) -> list[str]:
        """Return the state dict's names of what a constant operand is, or is computed from."""
        if read.ref is None or not read.ref.is_weight:
            return []
        names: list[str] = []
        for node in _sources(read.tensor):
            tensor = find_attribute(self.gm, str(node.target))
            names += self._tensor_names.get(id(tensor), [str(node.target)])
        return list(dict.fromkeys(names))


def _named_tensors(gm: fx.GraphModule) -> Iterator[tuple[str, object]]:
    yield from gm.named_parameters(remove_duplicate=False)
    yield from gm.named_buffers(remove_duplicate=False)


def _prefixes(node: fx.Node) -> list[str]:
    """Return the path of a node's layer and of all layers around it, innermost first."""
    path = MODULE_PATH.find(node) or (str(node.target) if node.op == "call_module" else "")
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _sources(tensor: fx.Node) -> list[fx.Node]:
    """Return the parameters that a constant is computed from, in the order of the graph."""
    found, open_nodes = {tensor}, [tensor]
    while open_nodes:
        for arg in open_nodes.pop().all_input_nodes:
            if arg not in found:
                found.add(arg)
                open_nodes.append(arg)
    return [node for node in sorted(found) if node.op == "get_attr"]


def _role(read: Read) -> Role:
    if read.ref is None:
        return "activation"
    if read.ref.is_weight:
        return "weight"
    return "input" if is_input(read.tensor) else "activation"
