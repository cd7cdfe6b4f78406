"""The protocol of a graph pass."""

from abc import ABC, abstractmethod
from enum import Enum
from typing import Any, ClassVar

from torch import fx

from cgmq_fx.passes.meta import MetaKey


class Numerics(Enum):
    """What a pass promises about the numbers that the graph computes."""

    EXACT = "exact: outputs equal bit for bit"
    REASSOCIATED = "within 1e-4 relative: float operations are reordered"
    CHANGES = "changes: outputs may differ"


class GraphPass(ABC):
    """One step of the compiler: edits a graph module in place and says whether it did.

    Contract, checked by `Pipeline` and by the contract tests:
      * `requires` is on every node it concerns before the pass, `provides` after it;
      * the pipeline deletes `invalidates` when the pass returns True;
      * placeholders and the output structure are unchanged;
      * the outputs keep the promise of `numerics`;
      * running the pass again right away returns False.

    A pass is a frozen dataclass; its options are its fields, so that its repr is the bug report.
    A pass either analyses (writes meta, returns False) or transforms (edits the graph), never both.
    It neither lints nor recompiles: the pipeline does.
    """

    name: ClassVar[str]
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[frozenset[MetaKey[Any]]] = frozenset()
    provides: ClassVar[frozenset[MetaKey[Any]]] = frozenset()
    invalidates: ClassVar[frozenset[MetaKey[Any]]] = frozenset()

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> bool:
        """Run the pass on `gm` and return True exactly when the graph or its modules changed."""
