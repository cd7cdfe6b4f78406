"""Every snippet of docs/measuring.md that names a file or is a command is run, in order."""

import sys
from pathlib import Path

import pytest

from cgmq_fx.cost.load import load_table
from doc_snippets import run_commands, snippets
from source_tree import ROOT

PAGE = ROOT / "docs" / "measuring.md"
STEMS = {Path(item.file).stem for item in snippets(PAGE) if item.file}


def test_every_snippet_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    kinds = []
    for snippet in snippets(PAGE):
        kinds.append(snippet.language)
        if snippet.file:
            (tmp_path / snippet.file).write_text(snippet.text)
        if snippet.language == "console":
            run_commands(snippet.text, tmp_path, capsys)
    assert kinds.count("console") == 2
    assert load_table("board.toml").unit == "ms"
    assert not (tmp_path / "wrong.toml").exists()


@pytest.fixture(autouse=True)
def _imports_of_the_page_are_forgotten():
    """Scripts of benchmarks/ have modules of the same names."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in STEMS:
            del sys.modules[name]
