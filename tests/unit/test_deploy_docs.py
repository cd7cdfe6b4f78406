"""The commands of docs/deploy are run as they stand there, in order, in one folder."""

import re
import runpy
import shlex

import pytest
import torch

from cgmq_fx.cli import main
from source_tree import ROOT

BLOCK = re.compile(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
PAGES = sorted((ROOT / "docs" / "deploy").glob("*.md"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = pytest.importorskip("torch._inductor.config")
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    with config.patch(freezing=config.freezing):  # the page sets it
        for language, file, text in blocks:
            if language == "python":
                (tmp_path / file).write_text(text)
                with torch.random.fork_rng():
                    found = runpy.run_path(file)
            else:
                for line in text.splitlines():
                    program, *words = shlex.split(line)
                    assert program == "cgmq-fx"
                    assert main(words) == 0
    # A value in the middle between two codes may get either, and what follows moves with it.
    with torch.no_grad():
        wanted = found["wanted"] if "wanted" in found else found["module"](found["x"])
        torch.testing.assert_close(found["y"], wanted, rtol=0, atol=5e-3)
    assert found["int8_kernels"] > 0
