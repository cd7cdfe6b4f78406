"""Read cost tables: built-in ones by name, files by path, mappings as they are."""

import difflib
import importlib.resources
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from cgmq_fx.cost.faults import Faults, shown
from cgmq_fx.cost.fields import read_mapping, read_sequence
from cgmq_fx.cost.lines import Path as KeyPath
from cgmq_fx.cost.lines import json_lines, line_of, toml_lines
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.row_fields import normalise
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.table_fields import MAX_ROWS, check_rows, normalise_table
from cgmq_fx.errors import CostTableError

MAX_FILE_BYTES = 1 << 20
#: Deeper lists and tables than this are no cost table.
MAX_DEPTH = 20

_Lines = Callable[[KeyPath], int | None]


def load_table(
    source: str | os.PathLike[str] | Mapping[str, Any] | CostTable, strict: bool = False
) -> CostTable:
    """Return a cost table.

    Args:
        source: a path of a ``.toml`` or ``.json`` file, the name of a built-in table
            (`table_names`), or the content of a file as a mapping. A `CostTable` is returned as it
            is.
        strict: refuse a table in which a cost falls when bits rise, instead of warning.

    Raises:
        CostTableError: the table is malformed; it is refused whole, and the message lists every
            fault with file, line, key, value and rule.
    """
    if isinstance(source, CostTable):
        return replace(source, strict=True) if strict and not source.strict else source
    if isinstance(source, Mapping):
        return _build(source, "cost table", None, strict=strict)
    if isinstance(source, str) and source in table_names():
        return _builtin(source)
    if not isinstance(source, (str, os.PathLike)):
        raise CostTableError(
            f"a cost table is a path, a name, a mapping or a CostTable, not a "
            f"{type(source).__name__}: {shown(source)}"
        )
    return _from_file(Path(os.fsdecode(source)), strict=strict)


def get_table(name: str) -> CostTable:
    """Return a built-in table by its name.

    Raises:
        CostTableError: there is none of that name; the message lists those there are.
    """
    if name not in table_names():
        _unknown(name)
    return _builtin(name)


@cache
def table_names() -> tuple[str, ...]:
    """Return the names of the built-in tables."""
    folder = importlib.resources.files("cgmq_fx.cost.tables")
    names = (item.name for item in folder.iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


@cache
def _builtin(name: str) -> CostTable:
    file = importlib.resources.files("cgmq_fx.cost.tables") / f"{name}.toml"
    return _from_text(file.read_text(encoding="utf-8"), f"{name}.toml", strict=True)


def _unknown(name: str) -> NoReturn:
    close = difflib.get_close_matches(name, table_names(), n=1, cutoff=0.6)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise CostTableError(
        f"there is no cost table {name!r}{hint}; built in: {', '.join(table_names())}; "
        "a table of your own is given by the path of its .toml or .json file"
    )


def _from_file(path: Path, *, strict: bool) -> CostTable:
    if not path.exists() and path.suffix not in (".toml", ".json"):
        _unknown(str(path))
    if path.is_dir():
        raise CostTableError(f"cost table {path} is a folder; give the path of one .toml file")
    if path.exists() and not path.is_file():
        raise CostTableError(f"cost table {path} is not a plain file; give the path of one")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            size = path.stat().st_size
            raise CostTableError(
                f"cost table {path} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read: "
                "write the costs as formulas, or split the table"
            )
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise CostTableError(
            f"cost table {path} cannot be read: {error}; "
            "give the path of a UTF-8 .toml or .json file"
        ) from error
    return _from_text(text, str(path), strict=strict)


def _from_text(text: str, file: str, *, strict: bool) -> CostTable:
    is_json = file.endswith(".json")
    try:
        if is_json:
            raw = json.loads(
                text, parse_float=Decimal, parse_constant=Decimal, object_pairs_hook=_no_duplicates
            )
        else:
            raw = tomllib.loads(text, parse_float=Decimal)
        depth = _depth(raw)
    except (ValueError, RecursionError, ArithmeticError) as error:
        kind = "JSON" if is_json else "TOML"
        raise CostTableError(
            f"cost table {file} is not sound {kind}: {error or 'nested too deep'}; "
            "correct the text there"
        ) from error
    if depth > MAX_DEPTH:
        raise CostTableError(
            f"cost table {file} is nested {depth} deep; a cost table needs no more than {MAX_DEPTH}"
        )
    lines = json_lines(text) if is_json else toml_lines(text)
    return _build(raw, file, partial(line_of, lines), strict=strict)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice in one object")
        found[key] = value
    return found


def _depth(value: object) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _build(raw: object, file: str, lines: _Lines | None, *, strict: bool) -> CostTable:
    """Return the table that `raw` describes, or raise one error with every fault."""
    faults = Faults()
    content = read_mapping(raw, faults)
    values = normalise_table(content, faults)
    if not content:
        faults.raise_if_any(file, lines)
    if "row" not in content:
        faults.below("row").add("this key is missing; add at least one [[row]]")
    else:
        values["rows"] = _rows(content["row"], file, lines, faults.below("row"))
    faults.raise_if_any(file, lines)
    return CostTable(**values, origin=file, strict=strict)


def _rows(raw: object, file: str, lines: _Lines | None, faults: Faults) -> tuple[Row, ...]:
    rows: list[Row] = []
    for index, item in enumerate(read_sequence(raw, faults, MAX_ROWS)):
        here, before = faults.below(index), len(faults.found)
        content = read_mapping(item, here)
        if len(faults.found) > before:
            continue
        fields = normalise(content, here)
        if len(faults.found) == before:
            line = lines(here.path) if lines else None
            origin = f"{file}:{line}" if line else f"{file}, row {index + 1}"
            rows.append(Row(**fields, origin=origin))
    if not faults.found:
        check_rows(rows, Faults((), faults.found))
    return tuple(rows)
