"""Load cost tables: built-in ones and those of packages by name, files by path, mappings."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from cgmq_fx.cost import find
from cgmq_fx.cost.faults import Faults, shown
from cgmq_fx.cost.fields import read_mapping, read_sequence, read_text
from cgmq_fx.cost.include import (
    MAX_FILES,
    MAX_INCLUDE_DEPTH,
    MAX_INCLUDES,
    Draft,
    Parts,
    check_units,
    draft,
    inherit,
    merge,
)
from cgmq_fx.cost.row_fields import normalise
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.table_fields import MAX_ROWS, check_rows, normalise_table
from cgmq_fx.cost.table_file import MAX_FILE_BYTES, TableFile, from_bytes, from_path
from cgmq_fx.errors import CostTableError

#: Characters of all different formulas of a table together: each is tried at many bit-widths.
MAX_FORMULAS = 4096
#: Characters of all conditions of a table together.
MAX_CONDITIONS = 50_000
_MAX_QUOTED = 2000


def load_table(
    source: str | os.PathLike[str] | Mapping[str, Any] | CostTable, strict: bool = False
) -> CostTable:
    """Return a cost table.

    Args:
        source: a path of a ``.toml`` or ``.json`` file, the name of a table (`table_names`), or the
            content of a file as a mapping, whose includes start at the current folder. A
            `CostTable` is returned as it is.
        strict: refuse a table in which a cost falls when bits rise, instead of warning.

    Raises:
        CostTableError: the table is malformed; it is refused whole, and the message lists every
            fault with file, line, key, value and rule.
    """
    if isinstance(source, CostTable):
        return replace(source, strict=True) if strict and not source.strict else source
    if isinstance(source, Mapping):
        return _Loading().table(TableFile("cost table", source), strict=strict)
    if isinstance(source, str) and _is_name(source):
        table = get_table(source)
        return load_table(table, strict) if strict else table
    if not isinstance(source, (str, os.PathLike)):
        raise CostTableError(
            f"a cost table is a path, a name, a mapping or a CostTable, not a "
            f"{type(source).__name__}: {shown(source)}"
        )
    path = Path(os.fsdecode(source))
    if path.suffix not in find.SUFFIXES and not os.path.lexists(path):
        find.no_such_table(str(path)[:_MAX_QUOTED])
    return _Loading().table(from_path(path), strict=strict)


def get_table(name: str) -> CostTable:
    """Return a table by its name: a built-in one, or one that an installed package brings.

    Raises:
        CostTableError: there is none of that name, the message lists those there are; or the
            package's table cannot be loaded, the message names the package.
    """
    return _builtin(name) if name in find.builtin_names() else _from_plugin(name)


def _is_name(text: str) -> bool:
    """Tell a table's name from a path; other packages are asked only where it can be a name."""
    if text in find.builtin_names():
        return True
    return not text.endswith(find.SUFFIXES) and text in find.plugin_names()


@cache
def _builtin(name: str) -> CostTable:
    return _Loading().table(_builtin_file(name), strict=True)


def _builtin_file(name: str) -> TableFile:
    text = find.builtin_text(name)
    return from_bytes(text.content, text.name)


def _from_plugin(name: str) -> CostTable:
    point = find.find_plugin(name)
    found = find.load_plugin(point)
    try:
        if isinstance(found, find.TableText):
            found = _Loading().table(_packaged_file(found), strict=False)
    except CostTableError as error:
        raise find.plugin_error(point, f"is refused: {error}") from error
    if not isinstance(found, CostTable):
        raise find.plugin_error(point, f"gives a {type(found).__name__}, not a CostTable")
    if found.name != name:
        raise find.plugin_error(point, f"gives a table called {found.name!r}, not {name!r}")
    return found


def _packaged_file(text: find.TableText) -> TableFile:
    if text.path is not None and os.path.isfile(text.path):
        return from_path(Path(text.path))
    return from_bytes(text.content, text.name)


@dataclass
class _Loading:
    """What one call of `load_table` has read so far: files are read once, and not without end."""

    known: dict[str, Parts] = field(default_factory=dict)
    num_bytes: int = 0
    formulas: set[str] = field(default_factory=set)
    num_condition_characters: int = 0

    def table(self, file: TableFile, *, strict: bool) -> CostTable:
        """Return the table of a file, or raise one error with every fault."""
        parts = self.parts(file, ())
        rows = tuple(item.row for item in parts.drafts)
        return CostTable(**parts.fields, rows=rows, origin=file.label, strict=strict)

    def parts(self, file: TableFile, chain: tuple[TableFile, ...]) -> Parts:
        """Return a table and what it includes; `chain` are the tables that include it."""
        faults = Faults()
        content = read_mapping(file.content, faults)
        faults.raise_if_any(file.label, file.lines)
        bases: list[Parts] = []
        if "include" in content:
            bases = self._bases(content["include"], file, chain, faults.below("include"))
        broken = bool(faults.found)
        taken = inherit(content, bases, faults.below("include"))
        if broken:  # what a table lacks may stand in the one that could not be included
            taken = {"unit": "BOP", **taken}
        values = normalise_table({**taken, **content}, faults)
        if "unit" in content and "unit" in values:
            check_units(values["unit"], bases, faults.below("unit"))
        own: tuple[Draft, ...] = ()
        if "row" in content:
            own = self._drafts(content["row"], file, faults.below("row"))
        elif "include" not in content:
            faults.below("row").add("this key is missing; add at least one [[row]]")
        drafts = merge(own, bases, faults.below("include"))
        if len(drafts) > MAX_ROWS:
            faults.below("include").add(f"makes {len(drafts)} rows; at most {MAX_ROWS} are read")
        faults.raise_if_any(file.label, file.lines)
        return Parts(file.label, values, drafts)

    def _bases(
        self, raw: object, file: TableFile, chain: tuple[TableFile, ...], faults: Faults
    ) -> list[Parts]:
        items = read_sequence([raw] if isinstance(raw, str) else raw, faults, MAX_INCLUDES)
        bases: list[Parts] = []
        seen: set[str | None] = set()
        for index, item in enumerate(items):
            here = faults if isinstance(raw, str) else faults.below(index)
            name = read_text(item, here, empty=False)
            if not name.strip():
                continue
            try:
                included = self._open(name, file)
                base = self._include(included, (*chain, file))
            except CostTableError as error:
                text = str(error)
                if len(text) > _MAX_QUOTED:
                    text = f"{text[:_MAX_QUOTED]} ..."
                here.add(f"cannot be included: {text}", name)
                continue
            if included.identity in seen:
                here.add("stands twice in this list; keep one", name)
            seen.add(included.identity)
            bases.append(base)
        return bases

    def _open(self, name: str, file: TableFile) -> TableFile:
        if name in find.builtin_names():
            return _builtin_file(name)
        if name.endswith(find.SUFFIXES):
            return from_path(file.folder / name)
        found = find.load_plugin(find.find_plugin(name))
        if isinstance(found, find.TableText):
            return _packaged_file(found)
        if isinstance(found, CostTable):
            return TableFile(name, found.to_json(), identity=f"table {name}")
        raise CostTableError(f"what its package brings is a {type(found).__name__}")

    def _include(self, file: TableFile, chain: tuple[TableFile, ...]) -> Parts:
        assert file.identity is not None
        names = " > ".join(item.label for item in (*chain, file))
        if file.identity in (item.identity for item in chain):
            raise CostTableError(f"it includes itself: {names}; remove one of these includes")
        if len(chain) > MAX_INCLUDE_DEPTH:
            raise CostTableError(
                f"includes go deeper than {MAX_INCLUDE_DEPTH}: {names}; write the rows into fewer "
                "files"
            )
        if file.identity not in self.known:
            self.num_bytes += file.size
            if self.num_bytes > MAX_FILE_BYTES or len(self.known) >= MAX_FILES:
                raise CostTableError(
                    f"over {MAX_FILES} files, or over {MAX_FILE_BYTES:,} bytes, are included in "
                    "all; split the table"
                )
            self.known[file.identity] = self.parts(file, chain)
        return self.known[file.identity]

    def _drafts(self, raw: object, file: TableFile, faults: Faults) -> tuple[Draft, ...]:
        items = read_sequence(raw, faults, MAX_ROWS)
        if not self._are_few(items, faults):
            return ()
        drafts: list[Draft] = []
        for index, item in enumerate(items):
            here, before = faults.below(index), len(faults.found)
            content = read_mapping(item, here)
            if len(faults.found) > before:
                continue
            fields = normalise(content, here)
            if len(faults.found) == before:
                line = file.lines(here.path) if file.lines else None
                origin = f"{file.label}:{line}" if line else f"{file.label}, row {index + 1}"
                drafts.append(draft(fields, origin))
        if not faults.found and drafts:
            check_rows([item.row for item in drafts], Faults((), faults.found))
        return tuple(drafts)

    def _are_few(self, items: list[object], faults: Faults) -> bool:
        """Note it if checking all formulas and conditions would take long."""
        rows = [item for item in items if isinstance(item, Mapping)]
        for row in rows:
            cost, where = row.get("cost"), row.get("where")
            formula = cost.get("formula") if isinstance(cost, Mapping) else None
            if isinstance(formula, str):
                self.formulas.add(formula)
            if isinstance(where, str):
                self.num_condition_characters += len(where)
        total = sum(map(len, self.formulas))
        if total > MAX_FORMULAS:
            faults.add(
                f"the formulas have {total:,} characters in all; at most {MAX_FORMULAS:,} are "
                "read: give one formula to several operations, or write grids"
            )
        if self.num_condition_characters > MAX_CONDITIONS:
            faults.add(
                f"the conditions have {self.num_condition_characters:,} characters in all; at most "
                f"{MAX_CONDITIONS:,} are read: write fewer 'where', or shorter ones"
            )
        return total <= MAX_FORMULAS and self.num_condition_characters <= MAX_CONDITIONS
