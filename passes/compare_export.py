"""Compares an exported graph with the model, on the user's inputs and on one sample of them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.export_inputs import ModelCall, fill_slots, with_data
from cgmq_fx.passes.restored import attributes_restored

# Export may take a way that rounds apart, as where a model asks whether it is being exported.
_TOLERANCE = 1e-3


def compare_export(call: ModelCall, gm: fx.GraphModule, batch_axis: int | None) -> None:
    """Run both in evaluation mode, and refuse a graph that computes something else.

    Export decides a branch on a batch of one, and one on whether it is exporting, without a trace
    in the program.

    Args:
        call: the model, which `gm` shares its submodules with, and its inputs.
        gm: what was exported.
        batch_axis: the axis that counts samples where `gm` takes any batch, else None.

    Raises:
        UnsupportedModelError: results differ by more than rounding.
    """
    batches = [("the example inputs", [with_data(tensor) for tensor in call.tensors])]
    if batch_axis is not None:
        one = _one_sample(batches[0][1], batch_axis)
        batches.append(("one sample of the example inputs", one))
    for name, batch in batches:
        expected, found = (_run(module, call, batch) for module in (call.model, gm))
        fault = _difference(expected, found)
        if fault:
            raise UnsupportedModelError(
                f"{type(call.model).__name__} computes something else while torch.export records "
                f"it: on {name} {fault}. A branch on a batch of one, or on whether the model is "
                f"exported or compiled, does that; take the branch out, or use front_end='fx'"
            )


def _one_sample(tensors: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Return one sample of each tensor that has as many as the first."""
    batch = next((tensor.shape[axis] for tensor in tensors if tensor.dim() > axis), 0)

    def cut(tensor: Tensor) -> Tensor:
        has_samples = tensor.dim() > axis and tensor.shape[axis] == batch
        return tensor.narrow(axis, 0, min(1, batch)) if has_samples else tensor

    return [cut(tensor) for tensor in tensors]


@torch.no_grad()
def _run(module: nn.Module, call: ModelCall, tensors: Sequence[Tensor]) -> Any:
    own = [tensor.clone() for tensor in tensors]
    args, kwargs = call.arguments(fill_slots(copy.deepcopy(call.structures), own))
    with _kept(module), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(*args, **kwargs)


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Keep modes, buffers and attributes as they are."""
    modes = {item: item.training for item in module.modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.eval()
    try:
        with attributes_restored(module):
            yield
    finally:
        for item, mode in modes.items():
            item.training = mode
        for name, buffer in module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def _difference(expected: Any, found: Any) -> str:
    """Return how far apart two results are; empty where only rounding differs."""
    left, right = (
        [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
        for value in (expected, found)
    )
    if [leaf.shape for leaf in left] != [leaf.shape for leaf in right]:
        return f"it returns shapes {_shapes(left)}, the graph {_shapes(right)}"
    for place, (a, b) in enumerate(zip(left, right, strict=True)):
        scale = float(a.abs().double().nan_to_num().max()) if a.numel() else 0.0
        if not torch.allclose(
            a.double(), b.double(), rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True
        ):
            return f"its output {place} differs by up to {float((a - b).abs().max()):.3g}"
    return ""


def _shapes(tensors: Sequence[Tensor]) -> str:
    return str([tuple(tensor.shape) for tensor in tensors])
