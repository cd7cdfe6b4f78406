"""What a caller of `prepare` chose: what stays float, what differs, what has one quantizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cgmq_fx.cost.table_fields import SHAREABLE
from cgmq_fx.errors import UsageError
from cgmq_fx.overrides import Override, read_override
from cgmq_fx.selectors import Given, Selector, is_selector, selector

Skip = Given | Sequence[Given]
Overrides = Mapping[Given, Override | Mapping[str, Any]]

_SELECTORS = (
    "give a name or a glob such as 'layer4.*', a type of layer such as nn.Linear, or a predicate"
)


@dataclass(frozen=True)
class Choices:
    """The arguments `skip`, `overrides` and `share` of `prepare`, checked.

    Attributes:
        skip: selectors of what stays float.
        overrides: selectors and what they say of the quantizers that they select.
        share: operation classes whose operands have one quantizer; None: those of the tables.
    """

    skip: tuple[Selector, ...] = ()
    overrides: tuple[tuple[Selector, Override], ...] = ()
    share: tuple[str, ...] | None = None

    def arguments(self) -> dict[str, object]:
        """Return `skip` and `overrides` as a caller would write them."""
        return {
            "skip": tuple(item.given for item in self.skip),
            "overrides": {item.given: override for item, override in self.overrides},
        }

    def without_skip(self, gone: Selector) -> "Choices":
        """Return these choices without one selector of `skip`."""
        return replace(self, skip=tuple(item for item in self.skip if item is not gone))

    def without_override(self, gone: Selector) -> "Choices":
        """Return these choices without the override of one selector."""
        return replace(self, overrides=tuple(p for p in self.overrides if p[0] is not gone))


def read_choices(skip: Skip, overrides: Overrides | None, share: Sequence[str] | None) -> Choices:
    """Return the choices that a caller wrote.

    Raises:
        UsageError: selectors, overrides or classes to share are malformed, all named at once.
    """
    faults: list[str] = []
    choices = Choices(
        _read_skip(skip, faults), _read_overrides(overrides, faults), _read_share(share, faults)
    )
    if faults:
        raise UsageError("\n".join(faults))
    return choices


def _read_skip(skip: object, faults: list[str]) -> tuple[Selector, ...]:
    single = isinstance(skip, str | type) or not isinstance(skip, Sequence | set | frozenset)
    items: list[Any] = [skip] if single else list(skip)  # type: ignore[call-overload]
    wrong = [item for item in items if not is_selector(item)]
    faults += [f"skip: {item!r} selects nothing; {_SELECTORS}" for item in wrong]
    return tuple(selector(item) for item in items if is_selector(item))


def _read_overrides(overrides: object, faults: list[str]) -> tuple[tuple[Selector, Override], ...]:
    if overrides is None:
        return ()
    if not isinstance(overrides, Mapping):
        faults.append(
            f"overrides is of type {type(overrides).__name__}; give a mapping from selectors to "
            f"Override, such as {{'conv1': cgmq_fx.Override(bit_width=8)}}"
        )
        return ()
    read = []
    for given, said in overrides.items():
        if not is_selector(given):
            faults.append(f"overrides: {given!r} selects nothing; {_SELECTORS}")
            continue
        chosen = selector(given)
        try:
            read.append((chosen, read_override(said)))
        except UsageError as error:
            faults.append(f"overrides[{chosen.text}]: {error}")
    return tuple(read)


def _read_share(share: object, faults: list[str]) -> tuple[str, ...] | None:
    if share is None:
        return None
    items = list(share) if isinstance(share, Sequence) and not isinstance(share, str) else [share]
    wrong = [item for item in items if item not in SHAREABLE]
    if wrong:
        faults.append(
            f"share={share!r} has {wrong}; give a sequence of operation classes out of "
            f"{', '.join(SHAREABLE)}, or () for none"
        )
    return tuple(dict.fromkeys(item for item in items if item in SHAREABLE))
