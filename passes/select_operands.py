"""Decides which operands are quantized, as the tables want and the caller chose."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from torch import fx

from cgmq_fx.errors import UsageError
from cgmq_fx.overrides import Chosen, Override
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.candidates import Read, Wanted, storage_of, wanted_reads
from cgmq_fx.passes.describe_operands import Describer
from cgmq_fx.passes.meta import (
    CHOICES,
    IS_CONSTANT,
    OP_INFO,
    SKIPPED,
    Choice,
    MetaKey,
    Skipped,
)
from cgmq_fx.selectors import Candidate, Selector, exact_names

_MAX_NAMES = 12


@final
@dataclass(frozen=True)
class SelectOperands(GraphPass):
    """Write `CHOICES` and `SKIPPED` on every node: which of its operands are quantized, and how.

    An operation outside `wanted` that looks up a wanted weight, such as the embedding tied to an
    output layer, reads the quantized one too: the weight is stored once. For the same reason a
    weight is skipped at all of its uses or at none.

    Args:
        wanted: the operations that tables price by bit-widths, or that memory bounds.
        skip: what stays float.
        overrides: what differs for some quantizers.

    Raises:
        UsageError: selectors match nothing, contradict one another, or fail; all of them are named.
    """

    name: ClassVar[str] = "select-operands"
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset({OP_INFO, IS_CONSTANT})
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset({CHOICES, SKIPPED})

    wanted: Wanted
    skip: tuple[Selector, ...] = ()
    overrides: tuple[tuple[Selector, Override], ...] = ()

    def run(self, gm: fx.GraphModule) -> bool:
        """Annotate `gm`; see `GraphPass.run`."""
        reads = wanted_reads(gm, self.wanted)
        selection = _Selection(gm, reads)
        if self.skip or self.overrides:
            selection.apply(self.skip, self.overrides)
        choices: dict[fx.Node, list[Choice]] = {node: [] for node in gm.graph.nodes}
        skipped: dict[fx.Node, list[Skipped]] = {node: [] for node in gm.graph.nodes}
        for place, read in enumerate(reads):
            by = tuple(item.text for item in selection.skipped[place])
            choices[read.node].append(
                Choice(read.ref, read.site, by, tuple(selection.chosen[place]), read.follows)
            )
            if by:
                skipped[read.node].append(Skipped(by, _operand_name(read)))
        for node in gm.graph.nodes:
            CHOICES.set(node, tuple(choices[node]))
            SKIPPED.set(node, tuple(skipped[node]))
        return False


def _operand_name(read: Read) -> str:
    return "attention weights" if read.ref is None else read.ref.keyword


@dataclass
class _Selection:
    """Selectors met with operands; `skipped` and `chosen` have an entry for each of `reads`."""

    gm: fx.GraphModule
    reads: Sequence[Read]
    skipped: list[list[Selector]] = field(init=False)
    chosen: list[list[Chosen]] = field(init=False)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.skipped = [[] for _ in self.reads]
        self.chosen = [[] for _ in self.reads]

    def apply(
        self, skip: Iterable[Selector], overrides: Iterable[tuple[Selector, Override]]
    ) -> None:
        """Match all selectors, and raise one error with every fault."""
        describer = Describer(self.gm)
        self.operands = [describer.operand(read) for read in self.reads]
        self.others = describer.operations()
        overriding = list(overrides)
        for selector in skip:
            found = self._matching(selector, "skip")
            for place in found or ():
                self.skipped[place].append(selector)
        for selector, override in overriding:
            for place in self._overridden(selector, override):
                by = f"overrides[{selector.text}]"
                self.chosen[place].append(Chosen(by, selector.is_exact, override))
        self._settle()
        self._check_tied()
        if self.faults:
            raise UsageError("\n".join(self.faults))

    # -- matching --------------------------------------------------------------------------------

    def _matching(self, selector: Selector, argument: str) -> list[int] | None:
        """Return the places of the operands that `selector` selects; None after a fault."""
        try:
            found = [p for p, item in enumerate(self.operands) if selector.matches(item)]
        except UsageError as error:
            self.faults.append(f"{argument}: {error}")
            return None
        if not found and not any(selector.matches(item) for item in self.others):
            self.faults.append(f"{argument}: {self._unmatched(selector)}")
            return None
        return found

    def _unmatched(self, selector: Selector) -> str:
        if not isinstance(selector.given, str):
            return (
                f"{selector.text} selects nothing in this model; list what there is with "
                f"cgmq_fx.report(prepared).rows and list(prepared.quantizers)"
            )
        names = exact_names([*self.operands, *self.others])
        close = difflib.get_close_matches(selector.given, names, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(map(repr, close))}? The" if close else "the"
        shown = ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")
        return (
            f"{selector.text} selects nothing in this model; {hint} {len(names)} names are "
            f"{shown or 'none'}; list them with cgmq_fx.report(prepared).rows, "
            f"list(prepared.quantizers) and model.named_modules()"
        )

    def _overridden(self, selector: Selector, override: Override) -> list[int]:
        found = self._matching(selector, "overrides")
        if found is None:
            return []
        kept = [p for p in found if override.role in (None, _role(self.operands[p]))]
        if kept:
            return kept
        if found:
            roles = sorted({_role(self.operands[place]) for place in found})
            why = f"selects {' and '.join(roles)} operands, none of the role {override.role!r}"
        else:
            why = (
                "selects operations of which nothing is quantized, so that it changes nothing; "
                "cgmq_fx.ledger(prepared) says why they are float"
            )
        self.faults.append(f"overrides: {selector.text} {why}")
        return []

    # -- contradictions --------------------------------------------------------------------------

    def _settle(self) -> None:
        """Let exact names of `skip` win over the other overrides; note what contradicts itself.

        An override that meets only skipped operands of a quantizer would say nothing.
        """
        met: dict[tuple[str, Chosen], list[int]] = {}
        for place, read in enumerate(self.reads):
            for chosen in self.chosen[place]:
                met.setdefault((read.site, chosen), []).append(place)
        for (site, chosen), places in met.items():
            if not all(self.skipped[place] for place in places):
                continue
            skips = list(dict.fromkeys(s for place in places for s in self.skipped[place]))
            if chosen.is_exact or not any(item.is_exact for item in skips):
                listed = " and ".join(f"skip={item.text}" for item in skips)
                self.faults.append(
                    f"{chosen.by} ({chosen.override}) is for quantizer {site!r}, which {listed} "
                    f"leaves out; remove one of them, or narrow one of the selectors"
                )
        for place, skips in enumerate(self.skipped):
            if skips:
                self.chosen[place] = []

    def _check_tied(self) -> None:
        """Note weights that are skipped at some of their uses: they would be stored twice."""
        uses: dict[object, list[int]] = {}
        for place, read in enumerate(self.reads):
            if read.ref is not None and read.ref.is_weight:
                uses.setdefault(storage_of(self.gm, read.tensor), []).append(place)
        for places in uses.values():
            kept = [place for place in places if not self.skipped[place]]
            gone = [place for place in places if self.skipped[place]]
            # A look-up that just follows stays float with the rest.
            if not gone or all(self.reads[place].follows for place in kept):
                continue
            name = _known(self.operands[gone[0]]).tensor
            skips = sorted({item.text for place in gone for item in self.skipped[place]})
            self.faults.append(
                f"weight {name!r} is skipped in {self._operations(gone)} by "
                f"{' and '.join(f'skip={text}' for text in skips)}, but quantized in "
                f"{self._operations(kept)}; a shared weight is stored once: skip it everywhere "
                f"with skip={name!r}, or nowhere"
            )

    def _operations(self, places: Iterable[int]) -> str:
        return ", ".join(repr(_known(self.operands[place]).operation) for place in places)


def _known(candidate: Candidate) -> Any:
    assert candidate.operand is not None
    return candidate.operand


def _role(candidate: Candidate) -> str:
    return str(_known(candidate).role)
