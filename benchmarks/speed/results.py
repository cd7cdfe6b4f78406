"""Makes a page of the lines of JSON that step_time.py wrote.

    python benchmarks/speed/results.py build/speed.jsonl

Where a measurement was repeated, the last one counts.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_HEAD = """# Time of a training step

Ratios to steps of the float model in the same process, which take turns with them: median over
rounds, and quartiles. Compiled steps are compared with compiled float ones.

| network | threads | gates | tool | contender | beside | rounds | wall | processor |
| --- | --: | --- | --- | --- | --- | --: | --- | --- |
"""


def last_of_each(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return the rows, of equal measurements the last."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        names = ("network", "threads", "granularity", "tool", "contender", "base")
        kept[tuple(row[name] for name in names)] = row
    return [kept[key] for key in sorted(kept)]


def line_of(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    names = ("network", "threads", "granularity", "tool", "contender", "base", "rounds")
    cells = [str(row[name]) for name in names]
    for kind in ("wall", "cpu"):
        found = row[kind]
        cells.append(f"**{found['median']:.2f}** ({found['low']:.2f} to {found['high']:.2f})")
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Read, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    lines = [line for path in arguments.rows for line in path.read_text().splitlines()]
    text = _HEAD + "".join(map(line_of, last_of_each(lines)))
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
