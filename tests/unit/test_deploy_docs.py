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
    MEANT[page.stem](found)


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "deploy.md").read_text()
    assert {page.stem for page in PAGES} == set(re.findall(r"\(deploy/(\w+)\.md\)", index))
    assert set(MEANT) == {page.stem for page in PAGES}


def check_inductor(found):
    # A value in the middle between two codes may get either, and what follows moves with it.
    with torch.no_grad():
        torch.testing.assert_close(found["y"], found["module"](found["x"]), rtol=0, atol=5e-3)
    assert found["int8_kernels"] > 0


def fixed_of(found):
    """Return the module that the first file of a page made, and what it returns."""
    fixed = runpy.run_path("export.py")["fixed"]
    return fixed, fixed(torch.from_numpy(found["x"]))


def check_executorch(found):
    torch.testing.assert_close(found["y"], found["wanted"], rtol=0, atol=5e-3)
    assert 0 < found["int8_kernels"] < 4


def check_onnxruntime(found):
    _, wanted = fixed_of(found)
    torch.testing.assert_close(found["y"], wanted, rtol=0, atol=5e-3)
    assert found["int8_kernels"] == 2  # the second convolution feeds a mean in float


def check_qonnx(found):
    fixed, wanted = fixed_of(found)
    torch.testing.assert_close(found["y"], wanted, rtol=0, atol=1e-4)
    assert set(found["bits"].values()) & set(fixed.bit_widths.values()) & {2, 3, 5, 8}


def check_packed(found):
    assert found["bits"] == runpy.run_path("export.py")["fixed"].bit_widths
    assert 0 < found["total"] <= 3 * 1024
    assert found["arrays"]


MEANT = {
    "executorch": check_executorch,
    "inductor": check_inductor,
    "onnxruntime": check_onnxruntime,
    "packed": check_packed,
    "qonnx": check_qonnx,
}
