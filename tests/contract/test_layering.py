"""Imports point down only, and the check that says so sees every kind of fault."""

import shutil
from dataclasses import dataclass

import pytest

from layering import violations
from source_tree import PACKAGE_OF_FOLDER, ROOT


@dataclass(frozen=True)
class Fault:
    """Lines planted in files of a copy of the sources, and what the check must say about them."""

    id: str
    lines: dict[str, str]
    complaint: str


FAULTS = [
    Fault("stray copy", {"passes/meta.py": "import passes"}, "its name is cgmq_fx.passes"),
    Fault("stray submodule", {"cgmq_fx/cli.py": "from cost.base import x"}, "is cgmq_fx.cost"),
    Fault("front", {"passes/meta.py": "import cgmq_fx"}, "not the front"),
    Fault("name of front", {"passes/meta.py": "from cgmq_fx import some_name"}, "not the front"),
    Fault("relative", {"passes/meta.py": "from .base import GraphPass"}, "imports are absolute"),
    Fault("upward", {"cost/planted.py": "from cgmq_fx.passes import meta"}, "not passes"),
    Fault("upward, lazily", {"cgmq_fx/errors.py": "def f():\n    import cgmq_fx.cost"}, "not cost"),
    Fault("sideways", {"cost/planted.py": "import cgmq_fx.quantizers"}, "not quantizers"),
    Fault("unlisted module", {"cgmq_fx/planted.py": ""}, "cgmq_fx.planted: no group in GROUP_OF"),
    Fault("unlisted target", {"cgmq_fx/fit.py": "import cgmq_fx.gone"}, "no group in GROUP_OF"),
    Fault("fx in quantizers", {"cgmq_fx/quantizers.py": "from torch import fx"}, "of torch.fx"),
    Fault("torch in cost", {"cost/planted.py": "import torch"}, "from outside: none"),
    Fault("third party in values", {"cgmq_fx/errors.py": "import rich"}, "from outside: none"),
    Fault("kit", {"cgmq_fx/cli.py": "import cgmq_fx.testing.case"}, "not testing"),
    Fault(
        "cycle",
        {"cgmq_fx/lower.py": "import cgmq_fx.cli", "cgmq_fx/cli.py": "import cgmq_fx.lower"},
        "import cycle: ",
    ),
]


@pytest.fixture
def copy_of_sources(tmp_path):
    for folder in PACKAGE_OF_FOLDER:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def test_imports_point_down_only():
    assert violations(ROOT) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_planted_fault_is_seen(fault, copy_of_sources):
    before = violations(copy_of_sources)
    for file, line in fault.lines.items():
        with (copy_of_sources / file).open("a") as source:
            source.write(f"\n{line}\n")
    new = [text for text in violations(copy_of_sources) if text not in before]
    assert any(fault.complaint in text for text in new), new
