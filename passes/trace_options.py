"""What a caller of `trace` may ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class TraceOptions:
    """How to trace, apart from the shapes of the inputs.

    Attributes:
        leaves: paths of submodules that stay closed because the user says so.
        concrete: values of arguments of forward that are no tensors, by name.
        creations: tensors that the forward makes from numbers are made by the graph, at each call,
            and are no constants of it; needed where the forward writes into one.
    """

    leaves: frozenset[str] = frozenset()
    concrete: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    creations: bool = False
