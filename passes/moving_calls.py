"""Which calls move the values of a tensor and compute no others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_POOLING: tuple[Any, ...] = (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d)
_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout,
)  # fmt: skip
_FUNCTIONS: tuple[Any, ...] = (
    F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d,
    torch.max_pool3d, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
    torch.unsqueeze,
)  # fmt: skip
_METHODS = (
    "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous",
)  # fmt: skip


def pools_images(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a call is maximum pooling of images."""
    held: Any = node.target
    if node.op == "call_module":
        held = type(gm.get_submodule(str(node.target)))
    return held in _POOLING


def moves_values(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether every value that a call returns is one of those of its only tensor.

    That are reshapes, permutations and maximum pooling; each commutes with a function that rises.
    """
    inputs = node.all_input_nodes
    if len(inputs) != 1 or node.args[:1] != (inputs[0],) or node.kwargs.get("return_indices"):
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        hooked = module._forward_hooks or module._forward_pre_hooks
        is_plain = type(module) in _MODULES and not module.training and not hooked
        return is_plain and not getattr(module, "return_indices", False)
    if node.op == "call_method":
        return node.target in _METHODS
    return node.op == "call_function" and node.target in _FUNCTIONS
