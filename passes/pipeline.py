"""Running passes in order and holding them to their contract."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import fx

from cgmq_fx.errors import CgmqError, PassError
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.meta import MetaKey


def _names(keys: frozenset[MetaKey[Any]]) -> str:
    return ", ".join(sorted(key.key for key in keys))


def _signature(gm: fx.GraphModule) -> tuple[str, ...]:
    return tuple(str(node.target) for node in gm.graph.nodes if node.op == "placeholder")


@final
@dataclass(frozen=True)
class Pipeline:
    """A fixed order of passes.

    `available` are the annotations that the graph carries already when the pipeline starts. A wrong
    order fails when the pipeline is built, before any model is touched.

    Raises:
        PassError: a pass requires what no earlier pass provides, or breaks its contract when run.
    """

    passes: Sequence[GraphPass]
    available: frozenset[MetaKey[Any]] = frozenset()

    def __post_init__(self) -> None:
        have = set(self.available)
        for index, pass_ in enumerate(self.passes):
            missing = pass_.requires - have
            if missing:
                raise PassError(
                    f"pass {index} '{pass_.name}' requires {_names(frozenset(missing))}, which no "
                    f"earlier pass provides; put "
                    f"{', '.join(sorted(k.written_by for k in missing))} before it"
                )
            have -= pass_.invalidates
            have |= pass_.provides

    def run(self, gm: fx.GraphModule) -> bool:
        """Run every pass on `gm` in place, and return whether any of them changed it."""
        changed_any = False
        for index, pass_ in enumerate(self.passes):
            try:
                changed_any |= run_pass(pass_, gm)
            except CgmqError:
                raise
            except Exception as error:
                before = ", ".join(p.name for p in self.passes[:index]) or "nothing"
                raise PassError(
                    f"pass {pass_!r} failed after {before}: {type(error).__name__}: {error}"
                ) from error
        return changed_any


def run_pass(pass_: GraphPass, gm: fx.GraphModule) -> bool:
    """Run one pass and check what can be checked: signature, provided annotations, lint."""
    signature = _signature(gm)
    changed = pass_.run(gm)
    if changed:
        gm.graph.lint()
        gm.recompile()
        for node in gm.graph.nodes:
            for key in pass_.invalidates:
                key.clear(node)
    if _signature(gm) != signature:
        raise PassError(
            f"pass '{pass_.name}' changed the placeholders from {signature} to {_signature(gm)}; "
            f"a pass keeps the signature of the graph"
        )
    for key in pass_.provides:
        bare = [node for node in gm.graph.nodes if not key.has(node)]
        if bare:
            raise PassError(
                f"pass '{pass_.name}' provides {key.key} but left node '{bare[0].format_node()}' "
                f"without it"
            )
    return changed
