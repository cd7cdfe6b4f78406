"""Texts that a change must not alter unseen: files in tests/golden/."""

import os
from pathlib import Path

from source_tree import ROOT

FOLDER = ROOT / "tests" / "golden"


def check_golden(name: str, text: str) -> None:
    """Compare `text` with the file `name` in tests/golden/; see `check_golden_file`."""
    check_golden_file(FOLDER / f"{name}.txt", text)


def check_golden_file(file: Path, text: str) -> None:
    """Compare `text` with `file`; with CGMQ_REGEN_GOLDEN=1 write the file first."""
    if os.environ.get("CGMQ_REGEN_GOLDEN") == "1":
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{text}\n", encoding="utf-8")
    assert file.exists(), f"no golden text {file}; write it with CGMQ_REGEN_GOLDEN=1 and read it"
    assert text == file.read_text(encoding="utf-8").removesuffix("\n")
