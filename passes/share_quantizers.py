"""Decides which tensors must have one quantizer."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, final

import networkx as nx
from torch import fx

from cgmq_fx.errors import UsageError
from cgmq_fx.overrides import Chosen, merged
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.meta import CHOICES, OP_INFO, SITES, Choice, MetaKey, SiteRef


@final
@dataclass(frozen=True)
class ShareQuantizers(GraphPass):
    """Write `SITES` on every node: which of its operands read which quantizer.

    A quantizer belongs to a tensor, so all operations that read the tensor share it. Parameters
    that are one object under several names (tied weights) are one tensor. Where an operation of a
    class in `share` reads several tensors through quantizers, these tensors have one; so have,
    through a tensor that two such operations read, the tensors of both.

    A rule never adds a quantizer: an operand that no table wants quantized stays as it is. A weight
    has its own quantizer whatever reads it.

    Args:
        share: operation classes.

    Raises:
        UsageError: overrides of one quantizer disagree; all of them are named.
    """

    name: ClassVar[str] = "share-quantizers"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO, CHOICES})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({SITES})

    share: frozenset[str] = frozenset()

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        read = _quantized(gm)
        group_of = self._groups(read)
        chosen: dict[str, list[Chosen]] = {}
        for choices in read.values():
            for choice in choices:
                chosen.setdefault(group_of[choice.site], []).extend(choice.overrides)
        said = _merged(chosen, group_of)
        for node, choices in read.items():
            SITES.set(
                node,
                tuple(
                    SiteRef(choice.ref, group_of[choice.site], said[group_of[choice.site]])
                    for choice in choices
                ),
            )
        return False

    def _groups(self, read: dict[fx.Node, list[Choice]]) -> dict[str, str]:
        """Return the quantizer of each tensor, named after the first of the tensors it serves."""
        sites = list(dict.fromkeys(item.site for choices in read.values() for item in choices))
        edges = [(site, site) for site in sites]
        for node, choices in read.items():
            if OP_INFO.get(node).op in self.share:
                shared = [item.site for item in choices if item.ref and not item.ref.is_weight]
                edges += itertools.pairwise(shared)
        order = {site: place for place, site in enumerate(sites)}
        first = {
            site: min(group, key=order.__getitem__)
            for group in nx.connected_components(nx.Graph(edges))
            for site in group
        }
        return {site: first[site] for site in sites}


def _quantized(gm: fx.GraphModule) -> dict[fx.Node, list[Choice]]:
    """Return by node the operands that are quantized: what is skipped is not.

    What just follows other readers of a weight is not either where all of these are skipped.
    """
    choices = {node: CHOICES.get(node) for node in gm.graph.nodes}
    wanted = {
        item.site
        for items in choices.values()
        for item in items
        if not item.follows and not item.skipped_by
    }
    return {
        node: [item for item in items if not item.skipped_by and item.site in wanted]
        for node, items in choices.items()
    }


def _merged(chosen: dict[str, list[Chosen]], group_of: dict[str, str]) -> dict[str, Chosen | None]:
    said: dict[str, Chosen | None] = {}
    faults: list[str] = []
    for site, items in chosen.items():
        said[site], found = merged(items)
        if found:
            members = [name for name, group in group_of.items() if group == site]
            others = "" if len(members) == 1 else f", which serves {', '.join(members)}"
            faults += [f"quantizer {site!r}{others}: {text}" for text in found]
    if faults:
        raise UsageError(
            "\n".join(faults)
            + "\nOverrides of one quantizer must agree (an exact name wins over globs, types and "
            "predicates): let them say the same, narrow a selector, or restrict one with "
            "role='weight'"
        )
    return said
