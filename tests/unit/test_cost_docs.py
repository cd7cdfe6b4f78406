"""Every snippet of docs/cost-tables.md is run, in order, in one folder."""

import json
import os
import re

import pytest

from cgmq_fx.cost.attributes import CLASS_ATTRIBUTES, COMMON_ATTRIBUTES, bit_names
from cgmq_fx.cost.load import load_table
from cgmq_fx.cost.operation import OP_CLASSES
from cgmq_fx.cost.row_fields import PER, ROW_KEYS
from cgmq_fx.cost.schema import json_schema
from cgmq_fx.cost.syntax import FUNCTIONS
from cgmq_fx.cost.table_fields import FILE_KEYS, TABLE_KEYS
from cgmq_fx.errors import CostTableError
from doc_snippets import run_commands, snippets
from source_tree import ROOT

PAGE = ROOT / "docs" / "cost-tables.md"
VARIABLES = re.compile(r"(?<=<!-- variables -->\n).*?(?=<!-- end of variables -->)", re.DOTALL)
HEAD = 'name = "snippet"\nunit = "cycle"\n'
KINDS = {"number": "", "bool": " (true or false)", "text": " (text)"}


def variables_text():
    """Return the list of variables as it must stand on the page."""
    lines = ["| class | bit-widths | variables |", "| --- | --- | --- |"]
    lines.append(f"| every class | | {listed(COMMON_ATTRIBUTES)} |")
    rest = {}
    for op in OP_CLASSES:
        own = listed(CLASS_ATTRIBUTES.get(op, {}))
        bits = ", ".join(f"`{name}`" for name in bit_names([op]))
        rest.setdefault((bits, own), []).append(f"`{op}`")
    for (bits, own), ops in rest.items():
        lines.append(f"| {', '.join(ops)} | {bits} | {own} |")
    return "\n".join(lines) + "\n"


def listed(kinds):
    return ", ".join(f"`{name}`{KINDS[kind]}" for name, kind in kinds.items())


def test_the_list_of_variables_is_complete():
    page = PAGE.read_text()
    if os.environ.get("CGMQ_REGEN_GOLDEN"):
        PAGE.write_text(VARIABLES.sub(lambda match: variables_text(), page))
        page = PAGE.read_text()
    assert VARIABLES.search(page)[0] == variables_text()


@pytest.mark.parametrize("word", [*TABLE_KEYS, *FILE_KEYS, *ROW_KEYS, *PER, *FUNCTIONS])
def test_every_word_of_the_format_is_explained(word):
    assert re.search(rf"[`{{\"\s]{re.escape(word)}[`\"\s]", PAGE.read_text())


def test_every_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    names = {"__name__": "snippet"}
    kinds = []
    for snippet in snippets(PAGE):
        kinds.append(snippet.language)
        if snippet.file:
            (tmp_path / snippet.file).write_text(snippet.text)
        if snippet.language == "toml":
            check_table(snippet)
        elif snippet.language == "json":
            load_table(json.loads(snippet.text))
        elif snippet.language == "python":
            exec(compile(snippet.text, snippet.file or "snippet", "exec"), names)
        else:
            assert snippet.language == "console", f"unknown kind of snippet: {snippet}"
            run_commands(snippet.text, tmp_path, capsys)
    assert {"toml", "python", "console"} <= set(kinds)
    assert names["table"].digest
    assert json.loads((tmp_path / "cost-table.schema.json").read_text()) == json_schema()


def check_table(snippet):
    if snippet.note == "refused":
        with pytest.raises(CostTableError):
            load_table(snippet.file)
    elif snippet.note != "unchecked":
        if not snippet.file:
            with open("snippet.toml", "w") as file:
                file.write(HEAD + snippet.text)
        load_table(snippet.file or "snippet.toml", strict=True)
