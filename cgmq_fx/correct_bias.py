"""Biases that take back what quantization shifts the mean of a channel by.

The mean error of each output channel goes off the bias of its layer, or off the running mean of the
batch norm behind a layer without one (Nagel et al. 2019, arXiv 1906.04721).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from cgmq_fx.calibrate import evaluating
from cgmq_fx.calibration_data import Inputs, model_inputs
from cgmq_fx.guide import check_prepared
from cgmq_fx.layer_values import Product, arguments_at, float_twin, products
from cgmq_fx.passes.values import find_attribute
from cgmq_fx.prepared import PreparedModule

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def correct_bias(
    prepared: PreparedModule, loader: Iterable[Any], *, batches: int | None = None
) -> list[str]:
    """Shift biases so that the mean of every channel is what it is in the float network.

    Layer after layer, each with those before it quantized and corrected. Call it last, after the
    bit-widths are chosen and the weights rounded. Layers with neither a bias of their own nor a
    batch norm behind them stay as they are.

    Args:
        prepared: a model after `cgmq_fx.calibrate`.
        loader: batches as `calibrate` takes them.
        batches: how many to take; None: all.

    Returns:
        The names of the parameters and buffers that changed.

    Raises:
        UsageError: an argument makes no sense, or the loader has no batch.
    """
    prepared = check_prepared(prepared, "correct_bias")
    inputs = list(model_inputs(prepared, loader, batches, "correct_bias"))
    changed = []
    with evaluating(prepared):
        twin = float_twin(prepared)
        for product in products(prepared):
            place = _own_bias(prepared, product) or _running_mean(prepared, product)
            if place is None or place in changed:
                continue
            shift = _mean_error(prepared, twin, product, inputs)
            held = find_attribute(prepared, place)
            held.add_(shift if place.endswith("running_mean") else -shift)
            changed.append(place)
    return changed


def _own_bias(prepared: PreparedModule, product: Product) -> str | None:
    """Return the path of a bias that this layer alone reads."""
    bias = product.operand("bias")
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return None
    nodes = prepared.graph.find_nodes(op="get_attr", target=bias.target)
    readers = {user for node in nodes for user in node.users}
    return str(bias.target) if readers == {product.node} else None


def _running_mean(prepared: PreparedModule, product: Product) -> str | None:
    """Return the path of the running mean of a batch norm that reads this layer alone."""
    users = list(product.node.users)
    if len(users) != 1 or users[0].op != "call_module" or product.operand("bias") is not None:
        return None
    (user,) = users
    norm = prepared.get_submodule(str(user.target))
    calls = prepared.graph.find_nodes(op="call_module", target=user.target)
    is_alone = len(list(calls)) == 1 and isinstance(norm, _BATCH_NORMS)
    if not is_alone or norm.running_mean is None:
        return None
    return f"{user.target}.running_mean"


def _mean_error(
    prepared: PreparedModule, twin: PreparedModule, product: Product, inputs: Sequence[Inputs]
) -> Tensor:
    """Return by channel the mean of the quantized results minus that of the float ones."""
    total, count = torch.zeros(()), 0
    for given in inputs:
        ours = product.result(*arguments_at(prepared, product.node, given))
        exact = product.result(*arguments_at(twin, product.node, given))
        error = (ours - exact).movedim(product.channel_axis, 0).flatten(1)
        total = total + error.sum(1)
        count += error.shape[1]
    return total / max(count, 1)
