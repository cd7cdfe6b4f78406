"""Read the text of a cost table: bytes in, plain values and the lines of their keys out."""

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from cgmq_fx.cost.lines import Path as KeyPath
from cgmq_fx.cost.lines import deepest_dotted_key, json_lines, line_of, toml_lines
from cgmq_fx.errors import CostTableError

MAX_FILE_BYTES = 1 << 18
#: Deeper lists and tables than this are no cost table.
MAX_DEPTH = 20


@dataclass(frozen=True)
class TableFile:
    """A table as it was written, not checked yet.

    Attributes:
        label: file name, for messages.
        content: its plain values.
        lines: tells the line of a key, if known; None for a mapping.
        size: bytes of the text; 0 for a mapping.
        folder: where relative paths that it includes start.
        identity: the same for the same file, whatever it is called; None for a mapping.
    """

    label: str
    content: object
    lines: Callable[[KeyPath], int | None] | None = None
    size: int = 0
    folder: Path = Path()
    identity: str | None = None


def from_path(path: Path) -> TableFile:
    """Read a file.

    Raises:
        CostTableError: it cannot be read, is too large, or no sound TOML or JSON.
    """
    try:
        if path.is_dir():
            raise CostTableError(f"cost table {path} is a folder; give the path of one .toml file")
        if path.exists() and not path.is_file():
            raise CostTableError(f"cost table {path} is not a plain file; give the path of one")
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        size = path.stat().st_size
        real = path.resolve()
    except (OSError, ValueError) as error:
        raise CostTableError(
            f"cost table {str(path)[:500]} cannot be read: {str(error)[:500]}; "
            "give the path of a UTF-8 .toml or .json file"
        ) from error
    return from_bytes(content, str(path), size=size, folder=real.parent, identity=str(real))


def from_bytes(
    content: bytes,
    label: str,
    *,
    size: int | None = None,
    folder: Path | None = None,
    identity: str | None = None,
) -> TableFile:
    """Read the bytes of a file; `size` is that of all of it where `content` is only its start."""
    size = len(content) if size is None else max(size, len(content))
    if len(content) > MAX_FILE_BYTES:
        raise CostTableError(
            f"cost table {label} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read: "
            "write the costs as formulas, or split the table"
        )
    try:
        text = content.decode("utf-8")
    except ValueError as error:
        raise CostTableError(
            f"cost table {label} cannot be read: {error}; "
            "give the path of a UTF-8 .toml or .json file"
        ) from error
    is_json = label.endswith(".json")
    raw = _parsed(text, label, is_json=is_json)
    lines = json_lines(text) if is_json else toml_lines(text)
    return TableFile(
        label,
        raw,
        partial(line_of, lines),
        len(content),
        Path() if folder is None else folder,
        label if identity is None else identity,
    )


def _parsed(text: str, label: str, *, is_json: bool) -> Any:
    depth = 0 if is_json else deepest_dotted_key(text)
    try:
        if depth > MAX_DEPTH:
            raw: Any = None
        elif is_json:
            raw = json.loads(
                text, parse_float=Decimal, parse_constant=Decimal, object_pairs_hook=_no_duplicates
            )
        else:
            raw = tomllib.loads(text, parse_float=Decimal)
        depth = max(depth, _depth(raw))
    except (ValueError, RecursionError, ArithmeticError) as error:
        kind = "JSON" if is_json else "TOML"
        raise CostTableError(
            f"cost table {label} is not sound {kind}: {str(error)[:500] or 'nested too deep'}; "
            "correct the text there"
        ) from error
    if depth > MAX_DEPTH:
        raise CostTableError(
            f"cost table {label} is nested {depth} deep; a cost table needs no more than "
            f"{MAX_DEPTH}"
        )
    return raw


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
