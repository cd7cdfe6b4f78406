"""Texts that a change must not alter unseen: files in tests/golden/."""

import os

from source_tree import ROOT

FOLDER = ROOT / "tests" / "golden"


def check_golden(name: str, text: str) -> None:
    """Compare `text` with the file `name`; with CGMQ_REGEN_GOLDEN=1 write the file first."""
    file = FOLDER / f"{name}.txt"
    if os.environ.get("CGMQ_REGEN_GOLDEN") == "1":
        FOLDER.mkdir(exist_ok=True)
        file.write_text(f"{text}\n", encoding="utf-8")
    assert file.exists(), f"no golden text {file}; write it with CGMQ_REGEN_GOLDEN=1 and read it"
    assert text == file.read_text(encoding="utf-8").removesuffix("\n")
