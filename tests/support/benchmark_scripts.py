"""The scripts of benchmarks/, as modules."""

import importlib.util
import sys
from types import ModuleType

from source_tree import ROOT


def script(name: str) -> ModuleType:
    """Return a script of benchmarks/ as a module, imported once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
