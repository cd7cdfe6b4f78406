"""Pages of results: what was run, on what, and a table."""

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a table; the first column is text, the others are numbers."""
    ruler = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(map(str, row))} |" for row in (columns, ruler, *rows)]


def versions(*packages: str) -> str:
    """Return names and versions of packages, and those of Python and the processor's kind."""
    named = [f"{name} {version(name)}" for name in packages]
    return ", ".join([*named, f"Python {platform.python_version()}, {platform.machine()}"])


def write(path: Path, title: str, command: str, lines: Sequence[str]) -> None:
    """Write a page; `command` made it."""
    path.write_text(f"# {title}\n\n`{command}`\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
