"""Compares what `prepare` makes of a model through `torch.export` with the model."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule


def exported(model: nn.Module, inputs: Any, **options: Any) -> PreparedModule:
    """Return `model` prepared through export, every bit-width at 32."""
    options = {"budget": "100%", "front_end": "export", **options}
    prepared = prepare(model, example_inputs=inputs, **options)
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(FLOAT_WIDTH)
    return prepared


def with_batch(inputs: Any, batch: int, axis: int = 0) -> Any:
    """Return `inputs` with the samples repeated, and a little apart, to another batch."""
    old = next(leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)).shape[axis]

    def repeat(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() <= axis or leaf.shape[axis] != old:
            return leaf
        chosen = leaf.index_select(axis, torch.arange(batch) % old)
        return chosen + 0.1 * torch.randn_like(chosen) if chosen.is_floating_point() else chosen

    return pytree.tree_map(repeat, inputs)


def run(module: nn.Module, inputs: Any, *, training: bool) -> tuple[Any, Any]:
    """Return outputs with fixed random numbers, and what became of the inputs."""
    own = copy.deepcopy(inputs)
    module.train(training)
    torch.manual_seed(3)
    return (module(**own) if isinstance(own, dict) else module(*own)), own


def assert_equal(left: Any, right: Any) -> None:
    """Compare two structures, tensors bit for bit."""
    assert pytree.tree_structure(left) == pytree.tree_structure(right)
    for a, b in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def assert_like_model(
    model: nn.Module,
    prepared: PreparedModule,
    inputs: Any,
    batches: Sequence[int] = (),
    axis: int = 0,
) -> None:
    """Laws 1 to 3: signature, state, and numbers in both modes, for other batches too."""
    names = [str(node.target) for node in prepared.graph.nodes if node.op == "placeholder"]
    assert [name.lstrip("*") for name in names] == list(inspect.signature(model.forward).parameters)
    state = prepared.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    for training in (False, True):
        for given in (inputs, *(with_batch(inputs, batch, axis) for batch in batches)):
            mine, theirs = copy.deepcopy(model), copy.deepcopy(prepared)
            assert_equal(run(mine, given, training=training), run(theirs, given, training=training))
            state = theirs.state_dict()
            for key, tensor in mine.state_dict().items():
                assert torch.equal(state[key], tensor), f"{key} differs after a run"
