"""Whether a prepared model computes what its float model does: outputs, gradients, buffers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule


def at_32_bits(model: nn.Module, *inputs: Any, **options: Any) -> PreparedModule:
    """Return the prepared model, with every quantizer at 32 bits."""
    prepared = prepare(model, "100%", example_inputs=inputs, learn_input_bits=True, **options)
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(32)
    return prepared


def assert_exact(model: nn.Module, prepared: nn.Module, *inputs: Any) -> None:
    """Compare both in both modes, bit for bit; gradients of the parameters within rounding."""
    for training in (True, False):
        found, own = _run(prepared, inputs, training), _run(model, inputs, training)
        for left, right in zip(found[0], own[0], strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0)
        for name, gradient in own[1].items():
            twin = found[1][name]
            assert (twin is None) == (gradient is None), f"gradient of {name}"
            if gradient is not None and twin is not None:
                torch.testing.assert_close(twin, gradient, msg=f"gradient of {name}")
        buffers = dict(prepared.named_buffers())
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=0, atol=0)


def _run(
    module: nn.Module, inputs: Any, training: bool
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    module.train(training).zero_grad(set_to_none=True)
    torch.manual_seed(2)
    tensors = [t for t in pytree.tree_leaves(module(*copy.deepcopy(inputs))) if torch.is_tensor(t)]
    needing = [tensor.pow(2).sum() for tensor in tensors if tensor.requires_grad]
    if needing:
        torch.autograd.backward(needing)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return [tensor.detach() for tensor in tensors], gradients
