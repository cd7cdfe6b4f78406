"""The graph of a ``.pt2`` file as data, read with suspicion.

`torch.export.load` trusts a file: it evaluates the sizes in it as Python, runs its guards, calls
functions by name and writes names into source code. What passes here can do none of that.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cgmq_fx.container import MAX_NAME, FileFault, is_tensor_name, read_json

MAX_GRAPH_BYTES = 1 << 26
MAX_GRAPH_PARTS = 1_500_000
_MAX_EXPRESSION = 1000
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUANTIZE = re.compile(r"quantize_(\d{1,9})(_\d+)?")
_SYMBOL = re.compile(r"[su][0-9]+")
# Operators on tensors, and arithmetic on sizes.
_TARGET = re.compile(
    r"torch\.ops\.(aten|quantized_decomposed)\.\w+\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|mod|neg|pos|eq|ne|lt|le|gt|ge|getitem)"
    r"|torch\.sym_(int|float|not|max|min)"
)
# These read or write files, or print.
_REFUSED = re.compile(r"torch\.ops\.aten\.(from_file|_print|_save)\w*\..*")
# Of sympy's notation, what sums and products of sizes are written in; powers could take forever.
_TOKEN = re.compile(
    r"\s+|[(),=*+/-]|-?[0-9]{1,18}(?![0-9A-Za-z_.])|'[su][0-9]+'|[su][0-9]+(?![0-9A-Za-z_])"
    r"|(Symbol|Integer|Rational|Add|Mul|FloorDiv|Mod|PythonMod|CleanDiv|Max|Min|positive"
    r"|nonnegative|integer|True|False)(?![0-9A-Za-z_])"
)
_CONTAINERS = frozenset(
    {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
)
_NO_KEYS = frozenset(
    {"as_graph", "as_custom_obj", "custom_obj", "as_operator", "as_complex", "token"}
)


@dataclass(frozen=True)
class ProgramNode:
    """One call of an operator.

    Attributes:
        name: of its first output.
        target: the operator.
        arguments: by name, as ``{kind: value}``.
    """

    name: str
    target: str
    arguments: Mapping[str, Mapping[str, Any]]

    def tensor(self, argument: str) -> str | None:
        """Return the name of the tensor that an argument is; None where it is none."""
        held = self.arguments.get(argument, {}).get("as_tensor")
        return held["name"] if isinstance(held, dict) else None

    def tensors(self) -> Iterator[tuple[str, str]]:
        """Yield all tensors among its arguments, with the names of these."""
        for argument, given in self.arguments.items():
            for held in _tensors_in(given):
                yield argument, held

    def value(self, argument: str) -> object:
        """Return what an argument is, if it is no tensor; None where it is not given."""
        given = self.arguments.get(argument, {})
        return next(iter(given.values())) if "as_tensor" not in given and given else None


@dataclass(frozen=True)
class ProgramGraph:
    """The graph of a program.

    Attributes:
        nodes: in the order of their calls.
        states: by the name of a graph input that is a parameter, a buffer or a constant, the name
            of that in the state.
        tensors: by name, what is said of a tensor's type and shape.
    """

    nodes: tuple[ProgramNode, ...]
    states: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Any]]


def _tensors_in(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for kind, item in value.items():
            if kind == "as_tensor":
                yield item["name"]
            elif kind == "name":
                yield item
            else:
                yield from _tensors_in(item)


def quantizer_index(name: str) -> int | None:
    """Return which quantizer the node of this name belongs to; None where it is no quantize."""
    found = _QUANTIZE.fullmatch(name)
    return None if found is None else int(found[1])


class _UnsoundError(Exception):
    """A part of the graph is not what the format says."""


def read_graph(text: bytes, fault: FileFault) -> ProgramGraph:
    """Return the graph of a program.

    Raises:
        FileFormatError: the text is malformed, or says what loading it would run.
    """
    if len(text) > MAX_GRAPH_BYTES:
        raise fault(f"has a graph of {len(text):,} bytes; at most {MAX_GRAPH_BYTES:,} are read")
    raw = read_json(text, "graph", fault, MAX_GRAPH_PARTS)
    try:
        _check(raw, "")
        return _graph(raw)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise fault(f"has a malformed graph ({str(error)[:MAX_NAME]})") from None
    except _UnsoundError as error:
        raise fault(f"has a graph with {str(error)[:MAX_NAME]}") from None


def _graph(raw: Any) -> ProgramGraph:
    graph, signature = raw["graph_module"]["graph"], raw["graph_module"]["signature"]
    nodes = tuple(_node(item) for item in graph["nodes"])
    _check_order(graph, nodes)
    states: dict[str, str] = {}
    for spec in signature["input_specs"]:
        ((kind, held),) = spec.items()
        key = _STATE_NAMES.get(kind)
        if key is not None:
            states[held["arg"]["name"]] = held[key]
        elif kind not in ("user_input", "constant_input"):
            raise _UnsoundError(f"an input of the kind {kind!r}")
    for spec in signature["output_specs"]:
        if set(spec) - {"user_output"}:
            raise _UnsoundError(f"an output of the kind {sorted(spec)}, which changes its state")
    tensors = graph["tensor_values"]
    if not isinstance(tensors, dict):
        raise _UnsoundError("no tensors")
    return ProgramGraph(nodes, states, tensors)


_STATE_NAMES = {
    "parameter": "parameter_name",
    "buffer": "buffer_name",
    "tensor_constant": "tensor_constant_name",
}


def _check_order(graph: Any, nodes: tuple[ProgramNode, ...]) -> None:
    """Refuse tensors that are read before they are made, or are made twice."""
    made = set(_tensors_in(graph["inputs"]))
    for raw, node in zip(graph["nodes"], nodes, strict=True):
        for _, name in node.tensors():
            if name not in made:
                raise _UnsoundError(f"the tensor {name!r}, which is read before it is made")
        for name in _tensors_in(raw["outputs"]):
            if name in made:
                raise _UnsoundError(f"two tensors called {name!r}")
            made.add(name)


def _node(raw: Any) -> ProgramNode:
    target = raw["target"]
    if not isinstance(target, str) or not _TARGET.fullmatch(target) or _REFUSED.fullmatch(target):
        raise _UnsoundError(f"the call of {str(target)[:MAX_NAME]!r}, which is no known operator")
    arguments = {}
    for item in raw["inputs"]:
        if not isinstance(item["arg"], dict) or len(item["arg"]) != 1:
            raise _UnsoundError(f"an argument of {target} that is none")
        arguments[item["name"]] = item["arg"]
    name = raw["name"]
    if name is None:  # older files leave it to the output
        name = raw["outputs"][0]["as_tensor"]["name"]
    return ProgramNode(name, target, arguments)


# -- what loading would run ------------------------------------------------------------------------


def _check(value: Any, key: str) -> None:
    """Refuse what `torch.export.load` would evaluate, import or write into source code."""
    rule = _RULES.get(key)
    if rule is not None:
        rule(value)
    if isinstance(value, dict):
        for name, item in value.items():
            if name in _NO_KEYS and item:
                raise _UnsoundError(f"a part of the kind {name!r}")
            _check(item, name)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, (dict, list)):
                _check(item, "")


def _identifier(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and _IDENTIFIER.fullmatch(value)):
        raise _UnsoundError(f"the name {str(value)[:MAX_NAME]!r}, which is no identifier")


def _identifiers(value: Any) -> None:
    for item in value or ():
        _identifier(item)


def _path(value: Any) -> None:
    if value != "" and not is_tensor_name(value):
        raise _UnsoundError(f"the path {str(value)[:MAX_NAME]!r}, which is none of a module")


def _expression(value: Any) -> None:
    text = value if isinstance(value, str) else ""
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or text.startswith("**", at):
            break
        at = found.end()
    if at < len(text) or not text or len(text) > _MAX_EXPRESSION:
        raise _UnsoundError(f"the size {str(value)[:MAX_NAME]!r}, which is no sum or product")


def _empty(value: Any) -> None:
    if value:
        raise _UnsoundError(f"{str(value)[:MAX_NAME]!r}, which names code")


def _symbols(value: Any) -> None:
    for name in value:
        if not _SYMBOL.fullmatch(name):
            raise _UnsoundError(f"the size {name[:MAX_NAME]!r}")


def _structure(value: Any) -> None:
    """Refuse trees with nodes of types that would be imported."""
    version, tree = json.loads(value)
    if type(version) is not int:
        raise _UnsoundError("a structure without version")
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        if node["type"] not in _CONTAINERS:
            raise _UnsoundError(f"a structure of the type {str(node['type'])[:MAX_NAME]!r}")
        if "{" in (node["context"] or ""):
            raise _UnsoundError("a structure whose context is no list of keys")
        waiting.extend(node["children_spec"])


def _by_name(value: Any) -> None:
    _identifiers(list(value))


_RULES: Mapping[str, Callable[[Any], None]] = {
    "name": _identifier,
    "forward_arg_names": _identifiers,
    "tensor_values": _by_name,
    "sym_int_values": _by_name,
    "sym_bool_values": _by_name,
    "sym_float_values": _by_name,
    "parameter_name": _path,
    "buffer_name": _path,
    "tensor_constant_name": _path,
    "fqn": _path,
    "expr_str": _expression,
    "metadata": _empty,
    "guards_code": _empty,
    "treespec_namedtuple_fields": _empty,
    "range_constraints": _symbols,
    "in_spec": _structure,
    "out_spec": _structure,
}
