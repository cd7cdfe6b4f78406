"""Find cost tables by name: built-in ones, and those that installed packages bring.

A package brings tables by entry points of the group `GROUP`. The entry point's name is the table's
name; its value is ``module:attribute``, where the attribute is a `CostTable` or a function without
arguments that returns one, or ``package:file.toml`` (or ``.json``), a file in that package.
"""

import importlib.metadata
import importlib.resources
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint
from typing import NoReturn

from cgmq_fx.cost.faults import nearest
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.errors import CostTableError

#: Entry-point group by which installed packages bring cost tables.
GROUP = "cgmq_fx.cost_tables"
SUFFIXES = (".toml", ".json")
_TABLES = "cgmq_fx.cost.tables"


@dataclass(frozen=True)
class TableText:
    """A table file that is inside a package.

    Attributes:
        name: of the file, for messages.
        content: its bytes.
        path: where it stands, for what it includes; None where it is not in a folder.
    """

    name: str
    content: bytes
    path: str | None = None


@cache
def builtin_names() -> tuple[str, ...]:
    """Return the names of the built-in tables."""
    names = (item.name for item in importlib.resources.files(_TABLES).iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def builtin_text(name: str) -> TableText:
    """Return the file of a built-in table."""
    file = importlib.resources.files(_TABLES) / f"{name}.toml"
    return TableText(f"{name}.toml", file.read_bytes())


def table_names() -> tuple[str, ...]:
    """Return the names of the built-in tables and of those that installed packages bring.

    A built-in table hides one of the same name from a package, with a `CostTableWarning`.
    """
    return tuple(sorted({*builtin_names(), *_plugins()}))


def plugin_names() -> tuple[str, ...]:
    """Return the names of the tables that installed packages bring."""
    return tuple(sorted(_plugins()))


def _plugins() -> dict[str, list[EntryPoint]]:
    """Return the entry points of other packages by name, without those that are hidden."""
    found: dict[str, list[EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.name in builtin_names():
            warnings.warn(
                f"cost table {point.name!r} of {_distribution(point)} is hidden by the built-in "
                "table of that name; its package must give it another name",
                CostTableWarning,
                stacklevel=4,
            )
        elif point not in found.setdefault(point.name, []):
            found[point.name].append(point)
    return found


def _distribution(point: EntryPoint) -> str:
    if point.dist is None:
        return f"an unknown distribution (entry point {point.value!r})"
    return f"distribution {point.dist.name} {point.dist.version}"


def find_plugin(name: str) -> EntryPoint:
    """Return the entry point that brings the table `name`.

    Raises:
        CostTableError: none does, or several do.
    """
    points = _plugins().get(name, [])
    if not points:
        no_such_table(name)
    if len(points) > 1:
        owners = " and ".join(_distribution(point) for point in points)
        raise CostTableError(
            f"cost table {name!r} is brought by {owners}; uninstall one of them, or give the path "
            "of the table's file"
        )
    return points[0]


def no_such_table(name: str) -> NoReturn:
    """Raise the error for a name that no table has."""
    known = table_names()
    raise CostTableError(
        f"there is no cost table {name!r}{nearest(name, known)}; there are: {', '.join(known)}; "
        "a table of your own is given by the path of its .toml or .json file"
    )


def load_plugin(point: EntryPoint) -> object:
    """Return what an entry point names: a `TableText`, or whatever the attribute is or returns.

    Raises:
        CostTableError: it cannot be loaded; the message names the distribution.
    """
    try:
        if point.value.endswith(SUFFIXES):
            return _resource(point.value)
        found = point.load()
        return found() if callable(found) else found
    except Exception as error:  # whatever a foreign package does
        raise plugin_error(point, f"raised {type(error).__name__}: {error}") from error


def _resource(value: str) -> TableText:
    package, _, name = value.partition(":")
    resource = importlib.resources.files(package.strip()) / name.strip()
    path = str(resource)
    return TableText(f"{package.strip()}:{name.strip()}", resource.read_bytes(), path)


def plugin_error(point: EntryPoint, what: str) -> CostTableError:
    """Return the error for an entry point that does not give a sound table."""
    return CostTableError(
        f"cost table {point.name!r} of {_distribution(point)} cannot be loaded: entry point "
        f"{point.value!r} {what}; correct or uninstall that package"
    )
