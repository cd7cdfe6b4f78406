"""Naming parts of a model: by name, glob, type of layer or predicate."""

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from cgmq_fx.errors import UsageError
from cgmq_fx.quantizer_spec import Role

_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Operand:
    """One tensor that one operation reads, as a predicate sees it.

    Attributes:
        operation: name of the operation, as the report shows it.
        op: its operation class, such as ``conv2d``.
        target: what it calls, in full, such as ``torch.nn.functional.conv2d``.
        module_path: the layer that it belongs to, as in ``named_modules()``; "" at the top.
        module_type: the type of that layer; None at the top, or where the layer is not known.
        role: what the tensor is.
        site: name of the quantizer that the tensor has or would have.
        tensor: name of the parameter in the state dict; of another tensor, the node that makes it.
        shape: its shape, for one sample; None where shapes are not known yet.
    """

    operation: str
    op: str
    target: str
    module_path: str
    module_type: type[nn.Module] | None
    role: Role
    site: str
    tensor: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Candidate:
    """What selectors are matched against: an operation, or one of its operands.

    Attributes:
        names: all its exact names: of the operation, its layer and all layers around that, its
            quantizer and its parameter, each under all names that a shared one has.
        types: types of its layer and of all layers around that.
        operand: the operand; None for an operation of which nothing can be quantized.
    """

    names: frozenset[str]
    types: frozenset[type[nn.Module]]
    operand: Operand | None


Given = str | type[nn.Module] | Callable[[Operand], bool]


@dataclass(frozen=True)
class Selector:
    """A name, a glob, a type of layer or a predicate.

    Args:
        given: what the caller wrote. A pickled selector lacks a predicate that cannot be pickled;
            it names itself still, and selects no more.
        text: what messages call it.
    """

    given: Given | None
    text: str

    @property
    def is_exact(self) -> bool:
        """Whether it is the name of one thing, so that it wins over what matches many."""
        return isinstance(self.given, str) and _MAGIC.isdisjoint(self.given)

    def matches(self, candidate: Candidate) -> bool:
        """Tell whether it selects `candidate`.

        Raises:
            UsageError: the predicate raises, or returns something else than a bool.
        """
        given = self.given
        if isinstance(given, str):
            names = candidate.names
            return given in names or (
                not self.is_exact and any(fnmatchcase(name, given) for name in names)
            )
        if isinstance(given, type):
            return any(issubclass(kind, given) for kind in candidate.types)
        if given is None or candidate.operand is None:
            return False
        return self._ask(given, candidate.operand)

    def _ask(self, predicate: Callable[[Operand], bool], operand: Operand) -> bool:
        place = f"the {operand.role} {operand.tensor!r} of operation {operand.operation!r}"
        try:
            answer: object = predicate(operand)
        except Exception as error:
            raise UsageError(
                f"predicate {self.text} raised {type(error).__name__}: {error} for {place}"
            ) from error
        if not isinstance(answer, bool):
            raise UsageError(
                f"predicate {self.text} returned {answer!r} of type {type(answer).__name__} for "
                f"{place}; return True or False"
            )
        return answer

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given if _can_pickle(self.given) else None, "text": self.text}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def _can_pickle(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:  # whatever a user's object does
        return False
    return True


def is_selector(given: object) -> bool:
    """Tell whether `given` may select: a text, a type of layer, or a function."""
    if isinstance(given, type):
        return issubclass(given, nn.Module)
    return (isinstance(given, str) and bool(given)) or (
        callable(given) and not isinstance(given, nn.Module)
    )


def selector(given: Given) -> Selector:
    """Return the selector that a caller wrote as `given`.

    >>> selector("layer4.*").is_exact, selector("layer4").is_exact
    (False, True)
    >>> selector(nn.Linear).text
    'torch.nn.modules.linear.Linear'
    """
    if isinstance(given, str):
        return Selector(given, repr(given))
    name = getattr(given, "__qualname__", None)
    if name is None:
        return Selector(given, repr(given))
    return Selector(given, f"{given.__module__}.{name}")


def exact_names(candidates: Iterable[Candidate]) -> list[str]:
    """Return all names that an exact selector may have."""
    return sorted({name for candidate in candidates for name in candidate.names})
