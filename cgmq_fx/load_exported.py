"""`load_exported`: a ``.pt2`` file as a module, after it was checked."""

import os
from typing import Any

import torch
from torch import nn

from cgmq_fx.program_file import open_program


def load_exported(path: str | os.PathLike[str]) -> nn.Module:
    """Return the program of a ``.pt2`` file that `cgmq_fx.export` wrote, as a module.

    `torch.export.load` trusts what it loads: it unpickles tensors, evaluates sizes as Python and
    compiles guards. Here the file is first read as data, and refused where it holds anything of
    that kind, or contradicts its manifest.

    Raises:
        FileFormatError: the file cannot be read, is damaged, or holds what loading it would run.
    """
    open_program(path)
    program: Any = torch.export.load(os.fspath(path))
    module: nn.Module = program.module()
    return module
