"""Faults of a cost table: collected while it is read, raised all at once."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cgmq_fx.errors import CostTableError

#: Where a fault is, as keys and indices: ("row", 2, "grid", 0, "cost").
Path = tuple[str | int, ...]

_MAX_SHOWN = 60
_MAX_FAULTS = 50


@dataclass(frozen=True)
class Fault:
    """One broken rule.

    Attributes:
        path: the key at fault.
        value: what stands there, shortened; empty where nothing does.
        rule: what it breaks, and what to write instead.
    """

    path: Path
    value: str
    rule: str

    def __str__(self) -> str:
        """Return the fault without its file and line."""
        shown = f" = {self.value}" if self.value else ""
        return f"{path_text(self.path)}{shown}: {self.rule}"


class Faults:
    """The faults found so far below one key of a table."""

    def __init__(self, path: Path = (), found: list[Fault] | None = None) -> None:
        self.path = path
        self.found: list[Fault] = [] if found is None else found

    def below(self, *keys: str | int) -> "Faults":
        """Return a view that adds faults below `keys`, to the same list."""
        return Faults((*self.path, *keys), self.found)

    @property
    def are_many(self) -> bool:
        """Whether there are more than a message lists; further ones are only counted."""
        return len(self.found) >= _MAX_FAULTS

    def add(self, rule: str, value: object = ...) -> None:
        """Note that `value` breaks `rule` here."""
        text = "" if value is ... or self.are_many else shown(value)
        self.found.append(Fault(self.path, text, rule))

    def raise_if_any(self, table: str, line_of: Callable[[Path], int | None] | None = None) -> None:
        """Raise one error that lists every fault, each behind its file and line where known.

        Raises:
            CostTableError: there are faults.
        """
        if self.found:
            raise CostTableError(render(table, self.found, line_of))


def render(
    table: str, faults: Sequence[Fault], line_of: Callable[[Path], int | None] | None = None
) -> str:
    """Return the message for `faults` of the table or file called `table`."""
    lines = []
    for fault in faults[:_MAX_FAULTS]:
        line = line_of(fault.path) if line_of else None
        lines.append(f"{table}:{line}: {fault}" if line else f"{table}: {fault}")
    if len(faults) > _MAX_FAULTS:
        lines.append(f"{table}: and {len(faults) - _MAX_FAULTS} more")
    count = f"{len(faults)} faults" if len(faults) > 1 else "a fault"
    return f"cost table refused for {count}:\n  " + "\n  ".join(lines)


def path_text(path: Path) -> str:
    """Return a path as a person counts: ``row 3, grid 1, cost``; the first of a list is 1."""
    parts: list[str] = []
    for key in path:
        if isinstance(key, int) and parts:
            parts[-1] += f" {key + 1}"
        else:
            parts.append(_key_text(str(key)))
    return ", ".join(parts) or "the table"


def _key_text(key: str) -> str:
    """Return a key; an odd one in quotes, so that messages keep their form."""
    return key if key.isprintable() and 0 < len(key) <= _MAX_SHOWN else shown(key)


def shown(value: object) -> str:
    """Return `value` as it would be written, shortened."""
    try:
        text = repr(value) if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or endless nesting
        return f"(a {type(value).__name__} too large to show)"
    if isinstance(value, bool):
        text = text.lower()
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def nearest(word: object, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" for the known word nearest to `word`, or nothing."""
    found = difflib.get_close_matches(str(word)[:_MAX_SHOWN], known, n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""
