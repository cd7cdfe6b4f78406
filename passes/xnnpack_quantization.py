"""Says what frozen modules compute in the form that ExecuTorch and its XNNPACK backend match."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cgmq_fx.frozen import FrozenAttention, FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.passes.base import GraphPass, Numerics
from cgmq_fx.passes.moving_calls import pools_images
from cgmq_fx.standard_modules import StandardAttention, StandardQuantizer
from cgmq_fx.xnnpack_modules import (
    ValueWeight,
    WideQuantizer,
    XnnpackWeight,
    clamps,
    fineness,
    is_eight_bit,
)

_PLAIN: tuple[Any, ...] = (F.conv1d, F.conv2d, torch.conv1d, torch.conv2d, F.linear)
_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose2d, torch.conv_transpose2d)
_RECTIFIERS: tuple[Any, ...] = (F.relu, F.relu6, torch.relu)
_RECTIFIER_MODULES = (nn.ReLU, nn.ReLU6)
#: Ends the paths of quantizers behind maximum pooling, which clamp nothing.
POOLED = "_pooled"
#: XNNPACK refuses larger ratios of the grid of the sums to that of the output.
_MAX_RATIO = 256.0
_MAX_BIAS = float(2**31 - 1)
#: A bias moves by half a step of the sums at most; that is an eighth of a step of the output.
_MAX_BIAS_STEP = 0.25


@final
@dataclass(frozen=True)
class XnnpackQuantization(GraphPass):
    """Replace frozen modules by those of `cgmq_fx.xnnpack_modules`, of the same names.

    A weight of up to 8 bits stays integers where all that reads it are convolutions and linear
    layers whose input and output are on grids of up to 8 bits, which XNNPACK computes in int8; any
    other becomes real values.

    Attributes:
        values: weights, by the paths of their modules, that become real values in any case.

    Numerics: a value within float rounding of the middle between two codes may get the other one.
    """

    name: ClassVar[str] = "xnnpack-quantization"
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    values: frozenset[str] = frozenset()

    def run(self, gm: fx.GraphModule) -> bool:
        """Replace the frozen modules that `gm` reads; see `GraphPass.run`."""
        found: dict[str, nn.Module] = {}
        pooled = []
        for node in gm.graph.nodes:
            held = _frozen_at(gm, node)
            if held is not None:
                found[str(node.target)] = self._standard(gm, held, node)
            if isinstance(held, FrozenQuantizer) and _is_pooled(gm, held, node):
                pooled.append(node)
                found[f"{node.target}{POOLED}"] = StandardQuantizer(held, signed=True, clamp=None)
        for path, module in found.items():
            gm.set_submodule(path, module)
        for node in pooled:
            node.target = f"{node.target}{POOLED}"
        return bool(found)

    def _standard(self, gm: fx.GraphModule, frozen: FrozenModule, node: fx.Node) -> nn.Module:
        match frozen:
            case FrozenWeight():
                if str(node.target) not in self.values and _is_integer(gm, frozen, node):
                    transposed = any(user.target in _TRANSPOSED for user in node.users)
                    return XnnpackWeight(frozen, axis=int(transposed))
                return ValueWeight(frozen)
            case FrozenAttention():
                return StandardAttention(frozen, signed=True, clamp="values")
            case FrozenQuantizer():
                if is_eight_bit(frozen):
                    return StandardQuantizer(frozen, signed=True, clamp="values")
                return WideQuantizer(frozen)
        raise AssertionError(f"{type(frozen).__name__} has no form for XNNPACK")


def _is_pooled(gm: fx.GraphModule, held: FrozenQuantizer, node: fx.Node) -> bool:
    """Tell whether a quantizer reads the maxima of values that lie on its grid."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not pools_images(gm, source) or not is_eight_bit(held):
        return False
    before = source.all_input_nodes
    return len(before) == 1 and (before[0].op, before[0].target) == (node.op, node.target)


def _frozen_at(gm: fx.GraphModule, node: object) -> FrozenModule | None:
    """Return the frozen module that a node calls; None where it calls none."""
    if not isinstance(node, fx.Node) or node.op not in ("call_module", "get_attr"):
        return None
    try:
        held = gm.get_submodule(str(node.target))
    except AttributeError:  # a tensor
        return None
    return held if isinstance(held, FrozenModule) else None


def _is_integer(gm: fx.GraphModule, weight: FrozenWeight, node: fx.Node) -> bool:
    """Tell whether XNNPACK computes with the codes of a weight wherever it is read."""
    is_called = node.op == "call_module" and bool(node.users)
    return (
        is_called
        and is_eight_bit(weight)
        and all(_is_int8_layer(gm, weight, node, user) for user in node.users)
    )


def _is_int8_layer(gm: fx.GraphModule, weight: FrozenWeight, node: fx.Node, layer: fx.Node) -> bool:
    if layer.op != "call_function" or layer.args[1:2] != (node,):
        return False
    if layer.target in _PLAIN:
        axis = 0
    elif layer.target in _TRANSPOSED:
        axis = 1
    else:
        return False
    if weight.scale.numel() > 1 and weight.channel_axis != axis:
        return False
    source = _activation(gm, layer.args[0])
    output = _output_grid(gm, layer)
    if source is None or output is None:
        return False
    bias = _bias(gm, layer)
    return bias is not None and _sums_fit(weight, source, output, bias.detach().double())


def _sums_fit(
    weight: FrozenWeight, source: FrozenQuantizer, output: FrozenQuantizer, bias: Tensor
) -> bool:
    """Tell whether XNNPACK computes sums and a bias as integers, and rounds that closely."""
    step = weight.scale.double() / fineness(weight) * source.scale.double()
    ratio = step / output.scale.double()
    is_normal = bool((step.float() >= torch.finfo(torch.float32).tiny).all())
    fits = bool((bias.abs() / step < _MAX_BIAS).all()) and bool((ratio < _MAX_RATIO).all())
    is_close = not bool(bias.any()) or bool((ratio <= _MAX_BIAS_STEP).all())
    return is_normal and fits and is_close


def _activation(gm: fx.GraphModule, node: object) -> FrozenQuantizer | None:
    """Return the quantizer of up to 8 bits that a node calls; None where it calls none."""
    held = _frozen_at(gm, node)
    if not isinstance(held, FrozenQuantizer) or isinstance(held, FrozenAttention):
        return None
    return held if is_eight_bit(held) else None


def _output_grid(gm: fx.GraphModule, layer: fx.Node) -> FrozenQuantizer | None:
    """Return the quantizer of a layer's output, behind at most one activation."""
    (user,) = layer.users if len(layer.users) == 1 else (None,)
    rectified = user is not None and _is_rectifier(gm, user) and len(user.users) == 1
    if user is not None and rectified:
        (user,) = user.users
    grid = _activation(gm, user)
    # Of two activations, a ReLU and the clamp of a narrow grid, XNNPACK takes one for its own.
    return None if grid is None or (rectified and clamps(grid)) else grid


def _is_rectifier(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))) in _RECTIFIER_MODULES
    return node.op == "call_function" and node.target in _RECTIFIERS


def _bias(gm: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    """Return the bias of a layer, 0 where it has none; None where it is computed."""
    given = layer.args[2] if len(layer.args) > 2 else layer.kwargs.get("bias")
    if given is None:
        return torch.zeros(1)
    if not isinstance(given, fx.Node) or given.op != "get_attr":
        return None
    held: Any = gm
    for part in str(given.target).split("."):
        held = getattr(held, part)
    return held if isinstance(held, Tensor) else None
