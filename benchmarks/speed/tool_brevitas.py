"""Brevitas: int8 of every layer that its graph mode knows, and learned bit-widths.

Learned bit-widths are a choice of its layers, not of its graph mode: convolutions and linear layers
are replaced, each with a learned width for its weight and one for its input. Sums and products of
activations stay float there.

Environment: ``pip install torch==2.13.0 brevitas==0.13.4``.
"""

from collections.abc import Mapping
from typing import Any

import brevitas.nn as qnn
from brevitas.graph.quantize import preprocess_for_quantize, quantize
from brevitas.inject.enum import BitWidthImplType
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat
from networks import Workload
from torch import Tensor, nn
from training import Step, optimizer_of, step_of

PACKAGES = ("brevitas",)


class LearnedWeight(Int8WeightPerTensorFloat):
    """A weight whose bit-width is a parameter."""

    bit_width_impl_type = BitWidthImplType.PARAMETER


class LearnedActivation(Int8ActPerTensorFloat):
    """An activation whose bit-width is a parameter."""

    bit_width_impl_type = BitWidthImplType.PARAMETER


LEARNED = {"weight_quant": LearnedWeight, "input_quant": LearnedActivation}


def contenders(
    workload: Workload, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Step]:
    """Return the steps at learned bit-widths, and at 8 bits by its graph mode."""
    models = {
        "learned w and a": _replaced(workload.model()),
        "w8a8 graph": quantize(preprocess_for_quantize(workload.model(), merge_bn=False)),
    }
    return {
        name: step_of(model.train(), optimizer_of(model), images, labels)
        for name, model in models.items()
    }


def _replaced(model: nn.Module) -> nn.Module:
    """Put quantized layers in the place of convolutions and linear layers."""
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d):
            own = qnn.QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                layer.padding, layer.dilation, layer.groups, bias=layer.bias is not None, **LEARNED,
            )  # fmt: skip
        elif isinstance(layer, nn.Linear):
            has_bias = layer.bias is not None
            own = qnn.QuantLinear(layer.in_features, layer.out_features, has_bias, **LEARNED)
        else:
            _replaced(layer)
            continue
        own.load_state_dict(layer.state_dict(), strict=False)
        setattr(model, name, own)
    return model
