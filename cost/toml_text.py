"""Write the plain values of a cost table as TOML."""

import json
from collections.abc import Mapping
from typing import Any


def toml_text(content: Mapping[str, Any]) -> str:
    """Return a TOML file of a table: texts, whole numbers and tables of them; rows come last.

    Args:
        content: what `cgmq_fx.cost.table.CostTable.to_json` returns.
    """
    lines = [f"{key} = {_value(value)}" for key, value in content.items() if key != "row"]
    for row in content["row"]:
        lines += ["", "[[row]]"]
        lines += [f"{key} = {_lines(value)}" for key, value in row.items()]
    return "\n".join(lines) + "\n"


def _lines(value: Any) -> str:
    """Return a value, a grid with one pair per line."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return "[\n" + "".join(f"    {_value(item)},\n" for item in value) + "]"
    return _value(value)


def _value(value: Any) -> str:
    if isinstance(value, str):
        # What JSON escapes, TOML escapes alike; DEL it also wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_value(item)}' for key, item in value.items())} }}"
    return str(value)
