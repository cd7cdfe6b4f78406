"""Build one cost table on others: which rows of the included tables remain, and what they lend."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cgmq_fx.cost.faults import Faults
from cgmq_fx.cost.row import Row

#: What a table that includes others takes from them where it does not say it itself.
INHERITED = ("unit", "input_bits", "reference", "unpriced", "share")
MAX_INCLUDES = 8
MAX_INCLUDE_DEPTH = 8
#: Files that one table may be made of.
MAX_FILES = 16


@dataclass(frozen=True)
class Draft:
    """A row on its way into a table.

    Attributes:
        fields: checked fields of the row.
        key: its operations and its conditions: what tells it from the rows that it replaces.
        layer: how many tables deep it was included.
        origin: file and line, for messages.
    """

    fields: Mapping[str, Any]
    key: tuple[frozenset[str], frozenset[object]]
    layer: int
    origin: str

    @cached_property
    def row(self) -> Row:
        """The finished row."""
        return Row(**{**self.fields, "layer": self.layer}, origin=self.origin)


@dataclass(frozen=True)
class Parts:
    """A table that others may include.

    Attributes:
        label: its file, for messages.
        fields: checked fields besides the rows.
        drafts: its rows, with those that it includes.
    """

    label: str
    fields: Mapping[str, Any]
    drafts: tuple[Draft, ...]


def draft(fields: Mapping[str, Any], origin: str) -> Draft:
    """Return the draft of a row from its checked fields."""
    where = fields["where"]
    conditions = frozenset(where.conditions if where else ())
    return Draft(fields, (frozenset(fields["op"]), conditions), fields["layer"], origin)


def inherit(
    content: Mapping[str, object], bases: Sequence[Parts], faults: Faults
) -> dict[str, Any]:
    """Return what a table takes from those that it includes; what it says itself goes first.

    Notes where the included tables say different things and this one nothing, and where units
    differ: costs are not converted.
    """
    taken: dict[str, Any] = {}
    for key in INHERITED:
        said = {base.label: base.fields[key] for base in bases if key in base.fields}
        if key not in content and said:
            taken[key] = next(iter(said.values()))
        differing = {label: value for label, value in said.items() if value != taken.get(key)}
        if key in taken and differing:
            listed = ", ".join(f"{_plain(value)} in {label}" for label, value in said.items())
            way = "one table has one unit" if key == "unit" else f"say {key} here"
            faults.add(f"the included tables differ in {key}: {listed}; {way}")
    return taken


def check_units(unit: str, bases: Iterable[Parts], faults: Faults) -> None:
    """Note included tables that count another unit than this one: costs are not converted."""
    for base in bases:
        if base.fields["unit"] != unit:
            faults.add(
                f"the included {base.label} counts {base.fields['unit']!r}; one table has one "
                "unit: write this one in it too",
                unit,
            )


def _plain(value: object) -> str:
    return str(value).removeprefix("Reference")


def merge(own: Sequence[Draft], bases: Sequence[Parts], faults: Faults) -> tuple[Draft, ...]:
    """Return the rows of a table that includes `bases`.

    A row of its own replaces included ones for the same operations under the same condition. Of
    two included ones, the less deeply included stays; the same row twice is one row. Whatever else
    prices the same operation is told apart by how specific it is, and then by its layer.
    """
    replaced = {item.key for item in own}
    found: dict[object, Draft] = {}
    for base in bases:
        for item in base.drafts:
            if item.key in replaced:
                continue
            deeper = _included(item, base)
            other = found.setdefault(item.key, deeper)
            if deeper.layer < other.layer:
                found[item.key] = deeper
            elif deeper.layer == other.layer and deeper.fields != other.fields:
                faults.add(
                    f"the included rows {other.origin} and {deeper.origin} price "
                    f"{', '.join(deeper.fields['op'])} under the same condition; write the row "
                    "that is meant in this table"
                )
    return (*own, *found.values())


def _included(item: Draft, base: Parts) -> Draft:
    """Return a row one table deeper, with its table's source where it has none of its own."""
    source = item.fields["source"] or base.fields["source"]
    fields = {**item.fields, "source": source, "layer": 0}
    return replace(item, fields=fields, layer=item.layer + 1)
