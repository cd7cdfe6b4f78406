"""The tools whose training steps are timed, by name.

A tool is a module of this folder with a function `contenders(workload, images, labels)`, which
returns steps by the name of a contender, made ready to be timed; and `PACKAGES`, those whose
versions are told. It is imported only where it is asked for, since each tool has an environment of
its own, in which of these files' imports only torch is installed beside it.
"""

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from networks import Workload
from torch import Tensor
from training import Step, optimizer_of, step_of

#: Names of the modules.
TOOLS = ("cgmq", "torch_fx", "torchao", "brevitas", "modelopt", "mct", "aimet", "hgq2")


def float_steps(
    workload: Workload, images: Tensor, labels: Tensor, *, compiled: bool
) -> dict[str, Step]:
    """Return steps of the float model, what every tool is measured against."""
    model = workload.model()
    steps = {"float": step_of(model, optimizer_of(model), images, labels)}
    if compiled:
        model = workload.model()
        forward = torch.compile(model)
        steps["compiled float"] = step_of(forward, optimizer_of(model), images, labels)
    return steps


def steps_of(tool: str, workload: Workload, options: Mapping[str, Any]) -> dict[str, Step]:
    """Return the steps of a tool and of the float model."""
    images, labels = workload.data()
    module = importlib.import_module(f"tool_{tool}")
    steps = float_steps(workload, images, labels, compiled=options.get("compile", False))
    return steps | module.contenders(workload, images, labels, options)


def versions_of(tool: str) -> dict[str, str]:
    """Return the versions of what a tool consists of."""
    packages: Sequence[str] = importlib.import_module(f"tool_{tool}").PACKAGES
    return {package: version(package) for package in ("torch", *packages)}
