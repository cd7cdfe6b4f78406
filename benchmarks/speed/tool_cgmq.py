"""This package: bit-widths of weights and activations learned, the guide attached."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from networks import Workload
from torch import Tensor
from training import Step, optimizer_of, step_of

import cgmq_fx
from cgmq_fx.choose_bits import lower_to_budget
from cgmq_fx.prepared import PreparedModule

PACKAGES = ("cgmq-fx",)
#: Bit-widths of 2 to 8 at the budget, the widths of the greater part of a run.
BUDGET = "2%"
# More than a benchmark has: the guide goes its way at every step, and its checks are rare.
_STEPS = 100_000


def contenders(
    workload: Workload, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Step]:
    """Return the steps in eager mode, and compiled where that is asked for."""
    steps = {"eager": guided_step(workload, images, labels, options)}
    if options.get("compile"):
        steps["compiled"] = guided_step(workload, images, labels, options, torch.compile)
    return steps


def guided_step(
    workload: Workload,
    images: Tensor,
    labels: Tensor,
    options: Mapping[str, Any],
    wrap: Callable[[Any], Any] = lambda model: model,
) -> Step:
    """Return the step of a prepared model at bit-widths within its budget."""
    prepared = prepared_model(workload, images, options)
    optimizer = optimizer_of(prepared)
    cgmq_fx.attach(prepared, optimizer, total_steps=_STEPS)
    return step_of(wrap(prepared), optimizer, images, labels)


def prepared_model(
    workload: Workload, images: Tensor, options: Mapping[str, Any]
) -> PreparedModule:
    """Return the workload's network, prepared, calibrated and at its budget."""
    granularity = options.get("granularity")
    chosen = {"granularity": granularity} if granularity else {}
    prepared = cgmq_fx.prepare(
        workload.model(), budget=BUDGET, example_inputs=(images[:1],), **chosen
    )
    prepared(images)
    lower_to_budget(prepared)
    prepared(images)
    return prepared
