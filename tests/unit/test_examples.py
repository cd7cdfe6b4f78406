"""The MNIST example is a plain training script plus `prepare`, `attach` and `lower`."""

import difflib

from golden import check_golden_file
from source_tree import ROOT

EXAMPLES = ROOT / "examples"


def _lines(name: str) -> list[str]:
    return (EXAMPLES / name).read_text().splitlines(keepends=True)


def test_the_diff_is_that_of_the_scripts() -> None:
    diff = difflib.unified_diff(
        _lines("mnist_plain.py"),
        _lines("mnist.py"),
        "examples/mnist_plain.py",
        "examples/mnist.py",
    )
    check_golden_file(EXAMPLES / "mnist.diff", "".join(diff).removesuffix("\n"))


def test_nothing_but_the_docstring_was_taken_away() -> None:
    removed = [line for line in _lines("mnist.diff")[2:] if line.startswith("-")]
    docstring = _lines("mnist_plain.py")[:4]
    assert [line[1:] for line in removed] == [line for line in docstring if line.strip(' "\n')]


def test_the_library_is_called_where_the_readme_says() -> None:
    calls = [line for line in _lines("mnist.diff") if "cgmq_fx." in line and line.startswith("+")]
    names = [line.partition("cgmq_fx.")[2].partition("(")[0] for line in calls]
    assert names == ["prepare", "attach", "lower", "report"]
