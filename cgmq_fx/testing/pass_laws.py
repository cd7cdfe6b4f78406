"""What a graph pass may change, and what it must leave: checks that yield the faults they find."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UsageError
from cgmq_fx.passes.base import GraphPass, Numerics
from cgmq_fx.passes.pipeline import run_pass
from cgmq_fx.testing.compare import opened
from cgmq_fx.testing.picture import Picture

#: A pass of cgmq_fx, or a function of a graph module that returns the same or another one, None or
#: whether it changed something, both in a tuple, or a `PassResult` of torch.
AnyPass = GraphPass | Callable[[fx.GraphModule], Any]


@dataclass(frozen=True)
class Applied:
    """What came out of one run of a pass; `flag` is None where it reports none."""

    gm: fx.GraphModule
    flag: bool | None


def name_of(pass_: AnyPass) -> str:
    """Return what messages call a pass."""
    if isinstance(pass_, GraphPass):
        return repr(pass_)
    return str(getattr(pass_, "__qualname__", None) or repr(pass_))


def apply(pass_: AnyPass, gm: fx.GraphModule) -> Applied:
    """Run a pass once.

    Raises:
        UsageError: it returned what no pass returns.
    """
    if isinstance(pass_, GraphPass):
        return Applied(gm, run_pass(pass_, gm))
    found = pass_(gm)
    if isinstance(found, PassResult):
        return Applied(found.graph_module, found.modified)
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], fx.GraphModule):
        return Applied(found[0], bool(found[1]))
    if isinstance(found, fx.GraphModule):
        return Applied(found, None)
    if found is None or isinstance(found, bool):
        return Applied(gm, found)
    raise UsageError(
        f"{name_of(pass_)} returned {type(found).__name__}; a pass returns a GraphModule, None, "
        f"whether it changed the graph, a (GraphModule, bool) tuple or a PassResult"
    )


# -- the graph -------------------------------------------------------------------------------------


def well_formed_faults(gm: fx.GraphModule) -> Iterator[str]:
    """The graph passes lint, and the code that runs is the code of the graph."""
    try:
        gm.graph.lint()
    except Exception as error:  # lint raises what it likes
        yield f"graph.lint() says: {type(error).__name__}: {error}"
        return
    if gm.graph.python_code("self").src != gm.code:
        yield "the code is not that of the graph any more: call recompile() after editing"


def signature_faults(
    before: Sequence[tuple[str, Any]], after: fx.Graph, wanted: Any, found: Any
) -> Iterator[str]:
    """Placeholders keep names, order and defaults, and outputs their structure.

    Args:
        before: what `placeholders` said before the pass.
        after: the graph after it.
        wanted: outputs before.
        found: outputs after; only the structure is looked at.
    """
    now = placeholders(after)
    if list(before) != now:
        yield f"the placeholders were {list(before)} and are {now}"
        return
    old, new = (pytree.tree_structure(opened(value)) for value in (wanted, found))
    if old != new:
        yield f"the output had the structure {old} and has {new}"


def placeholders(graph: fx.Graph) -> list[tuple[str, tuple[Any, ...]]]:
    """Return name and default of each input."""
    return [(str(node.target), node.args) for node in graph.nodes if node.op == "placeholder"]


# -- what stays, stays as it was -------------------------------------------------------------------


def settings_faults(before: Picture, now: Picture) -> Iterator[str]:
    """Modules that stay under their path keep their hyperparameters."""
    for path, (kind, old) in before.modules.items():
        if path not in now.modules or now.modules[path][0] is not kind:
            continue
        new = now.modules[path][1]
        for name in sorted({*old, *new} - {"training"}):
            if old.get(name) != new.get(name):
                yield (
                    f"module '{path}' ({kind.__name__}): {name} was {old.get(name)!r} and is "
                    f"{new.get(name)!r}"
                )


@dataclass(frozen=True)
class Literals:
    """The arguments of calls that are no nodes, by node, at one moment."""

    of: Mapping[fx.Node, tuple[str, object, tuple[Any, ...], Mapping[str, Any]]]

    @staticmethod
    def in_(graph: fx.Graph) -> "Literals":
        """Return those of a graph."""
        calls = [node for node in graph.nodes if node.op.startswith("call")]
        return Literals({n: (n.op, n.target, n.args, n.kwargs) for n in calls})

    def faults(self, graph: fx.Graph) -> Iterator[str]:
        """Yield literals that are others on nodes of the same call that stayed in the graph."""
        for node in graph.nodes:
            if node not in self.of or self.of[node][:2] != (node.op, node.target):
                continue
            _, _, args, kwargs = self.of[node]
            pairs = [(f"argument {i}", *pair) for i, pair in enumerate(zip(args, node.args))]  # noqa: B905
            shared = [name for name in kwargs if name in node.kwargs]
            pairs += [(f"argument {name}", kwargs[name], node.kwargs[name]) for name in shared]
            for place, old, new in pairs:
                if not _holds_nodes(old) and not _holds_nodes(new) and not _same(old, new):
                    yield f"'{node.format_node()}': {place} was {old!r} and is {new!r}"


def _holds_nodes(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found) or value is None


def _same(old: Any, new: Any) -> bool:
    return bool(type(old) is type(new) and old == new) or repr(old) == repr(new)


def state_faults(
    before: Picture, now: Picture, read: set[str], numerics: Numerics
) -> Iterator[str]:
    """Parameters and buffers that are still read are there, as they were, tied as they were.

    Args:
        before: the module before the pass.
        now: and after.
        read: targets of the graph, after the pass, that read a module or a tensor.
        numerics: with exact numerics no tensor that stays may have other elements; else parameters
            may, such as a weight into which a factor was folded, but no buffer.
    """
    for name, old in before.tensors.items():
        new = now.tensors.get(name)
        owner = name.rpartition(".")[0]
        if new is None:
            kept = owner in read and before.modules.get(owner, (None,))[0] is now.modules.get(
                owner, (None,)
            )[0]  # fmt: skip
            if kept:
                yield f"the {old.kind} '{name}' is gone, and '{owner}' is still called"
            continue
        if old.kind != new.kind:
            yield f"'{name}' was a {old.kind} and is a {new.kind}"
        elif old.form[:2] != new.form[:2]:
            yield f"'{name}' was {old.form[:2]} and is {new.form[:2]}"
        elif old.content != new.content and numerics is Numerics.EXACT:
            yield f"the {old.kind} '{name}' has other elements, though the pass is exact"
        elif old.content != new.content and old.kind != "parameter":
            yield f"the {old.kind} '{name}' has other elements"
        first = old.first_name
        if first in now.tensors and now.tensors[first].first_name != new.first_name:
            yield f"'{name}' and '{first}' were one tensor and are two"


def duplicate_faults(before: Picture, now: Picture) -> Iterator[str]:
    """No tensor is stored more often than before."""
    for content, names in _stored(now).items():
        had = len(_stored(before).get(content, ()))
        if had and len(names) > had:
            yield f"one tensor is stored {len(names)} times, as {names}; it was {had} times"


def _stored(picture: Picture) -> dict[object, list[str]]:
    found: dict[object, list[str]] = {}
    for name, tensor in picture.tensors.items():
        # Tensors of one element, and the ones and zeros of fresh layers, are equal by chance.
        if tensor.first_name == name and not _is_small(tensor.form[1]):
            found.setdefault((tensor.content, tensor.form[:2]), []).append(name)
    return found


def _is_small(shape: Any) -> bool:
    return len(shape) < 2 or torch.Size(shape).numel() < 4
