"""What memory holds for a prepared model, found in its graph: weights as codes, the rest as floats.

Nothing of the library's accounting is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from cgmq_fx.passes.guards import select_mode
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.testing.counting import FloatCount, constants, is_quantizer

_FLOAT_BITS = 32


@dataclass(frozen=True)
class StoredWeight:
    """A weight that memory holds as codes.

    Attributes:
        site: of its quantizer.
        numel: elements of what the quantizer reads.
        sources: the parameters and tables that it is computed from; itself, where it is one.
        is_computed: it is not itself one of them.
        is_whole: it is one of them, in whatever shape.
    """

    site: str
    numel: int
    sources: tuple[Tensor, ...]
    is_computed: bool
    is_whole: bool


def stored_weights(prepared: PreparedModule) -> list[StoredWeight]:
    """Return the quantized weights: what quantizers read that the graph computes from state."""
    values = constants(prepared)
    found = []
    for node in prepared.graph.nodes:
        read = node.all_input_nodes
        if not is_quantizer(prepared, node) or len(read) != 1 or read[0] not in values:
            continue
        if prepared.quantizers[site_of(node)].spec.role != "weight":
            continue  # what a model computes from state with its inputs' sizes is no weight
        value, origins = values[read[0]], _origins(read[0])
        held = [values[origin] for origin in origins]
        is_whole = len(held) == 1 and held[0].numel() == value.numel()
        is_whole = is_whole and _storage(held[0]) == _storage(value)
        sources = tuple(find_attribute(prepared, str(origin.target)) for origin in origins)
        is_computed = read[0].op != "get_attr"
        found.append(StoredWeight(site_of(node), value.numel(), sources, is_computed, is_whole))
    return found


def site_of(node: fx.Node) -> str:
    """Return the site of the quantizer that a node calls or hands over."""
    return str(node.target).rpartition(".")[2]


def memory_bits(prepared: PreparedModule, counted: FloatCount, width_of: Mapping[str, int]) -> int:
    """Return the bits that weights and parameters take.

    Args:
        prepared: a priced model.
        counted: what the float model does.
        width_of: the bit-width of each site.
    """
    weights = {weight.site: weight for weight in stored_weights(prepared)}
    codes = sum(weight.numel * width_of[site] for site, weight in weights.items())
    floats = {id(find_attribute(prepared, name)): size for name, size in counted.parameters.items()}
    floats |= _made(prepared, counted)
    raw = _read_raw(prepared)
    for weight in weights.values():
        for key in map(id, weight.sources):
            if not weight.is_computed or key not in raw:
                floats.pop(key, None)
    return codes + _FLOAT_BITS * (sum(floats.values()) + _folded_elements(prepared))


def _made(prepared: PreparedModule, counted: FloatCount) -> dict[int, int]:
    """Return the elements of constants that forward makes from numbers: these are stored too."""
    found: dict[int, int] = {}
    for node in needed(prepared.graph):
        if node.op == "get_attr" and str(node.target) not in counted.named:
            made = find_attribute(prepared, str(node.target))
            if isinstance(made, Tensor) and made.is_floating_point():
                found[id(made)] = made.numel()
    return found


def _read_raw(prepared: PreparedModule) -> set[int]:
    """Return the state that reaches an operation on another way than through quantizers."""
    values = constants(prepared)
    found: set[int] = set()
    for node in prepared.graph.nodes:
        if node not in values and not is_quantizer(prepared, node):
            for read in node.all_input_nodes:
                if read in values:
                    origins = (find_attribute(prepared, str(o.target)) for o in _origins(read))
                    found.update(map(id, origins))
    return found


def _origins(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes that fetch the state that a constant is computed from."""
    if node.op == "get_attr":
        return (node,)
    found = (origin for read in node.all_input_nodes for origin in _origins(read))
    return tuple(dict.fromkeys(found))


def _storage(tensor: Tensor) -> object:
    return tensor.untyped_storage()._cdata


def needed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values reach the output in evaluation mode."""
    found: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        branches = node.args[2:] if node.target is select_mode else (node.args, node.kwargs)
        fx.node.map_arg(branches, waiting.append)
    return found


def _folded_elements(prepared: PreparedModule) -> int:
    """Return the factors and shifts of batch norms that have no parameters of their own."""
    paths = {str(node.target) for node in prepared.graph.nodes if node.op == "call_module"}
    norms: dict[int, Any] = {
        id(module): module for module in map(prepared.get_submodule, paths) if _is_bare_norm(module)
    }
    return sum(2 * int(norm.num_features) for norm in norms.values())


def _is_bare_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.affine
