"""Folds batch norm in evaluation mode into the layer in front of it."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn import Parameter

from cgmq_fx.frozen import FrozenWeight
from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.base import GraphPass, Numerics
from cgmq_fx.passes.meta import (
    MODULE_PATH,
    OPERATION_KEYS,
    VALUE,
    MetaKey,
    OperandRef,
    TensorInfo,
)
from cgmq_fx.passes.unused import delete_unread, erase_unused
from cgmq_fx.passes.values import find_attribute

# Exact types: a subclass may compute something else.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_REGULAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_REGULAR_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED_FUNCTIONS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

_WEIGHT = OperandRef(1, "weight", is_weight=True)
_BIAS = OperandRef(2, "bias", is_weight=True)
_GROUPS = OperandRef(6, "groups", is_weight=False)


@final
@dataclass(frozen=True)
class FoldBatchNorm(GraphPass):
    """Fold each batch norm that alone reads a convolution, its transpose, or a linear layer.

    The norm multiplies each output channel by a factor and adds a shift. The factor goes into the
    scale of a `FrozenWeight`, whose codes stay as they are (mirrored where it is negative, so that
    scales stay positive), or into a float weight; the shift goes into the bias. Layers are given as
    modules or as functions. Batch norms stay that use the statistics of the batch, and those behind
    a weight that something else reads too. A linear layer is folded where `VALUE` says that its
    output has two axes: over three, batch norm runs along another axis than its channels.

    Numerics: reassociated. With quantized activations behind it, a value at a rounding boundary may
    fall to the next code.
    """

    name: ClassVar[str] = "fold-batch-norm"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    invalidates: ClassVar[frozenset[MetaKey[Any]]] = OPERATION_KEYS

    def run(self, gm: fx.GraphModule) -> bool:
        """Fold what can be folded in `gm`; see `GraphPass.run`."""
        folder = _Folder(gm)
        spent: list[str] = []
        changed = False
        for node in list(gm.graph.nodes):
            changed |= folder.fold(node, spent)
        delete_unread(gm, spent)
        return changed


@dataclass(frozen=True)
class _Affine:
    """What a batch norm does to `source`: ``factor * x + shift``, float64 of shape (channels,)."""

    source: fx.Node
    factor: Tensor
    shift: Tensor


@dataclass(frozen=True)
class _Layer:
    """The layer that makes a batch norm's input.

    Attributes:
        shape: of its weight.
        channel_axis: the axis of the weight that runs over output channels of a group.
        groups: groups of a transposed convolution; 1 for others, whose first axis runs over all.
    """

    shape: torch.Size
    channel_axis: int
    groups: int

    @property
    def num_channels(self) -> int:
        return self.shape[self.channel_axis] * self.groups

    def along_weight(self, factor: Tensor) -> Tensor:
        """Return a factor for each output channel in a shape that broadcasts with the weight."""
        ones = [1] * (len(self.shape) - 2)
        if self.channel_axis == 0:
            return factor.reshape(-1, 1, *ones)
        if self.groups == 1:
            return factor.reshape(1, -1, *ones)
        # Input channel i belongs to group i // (in_channels / groups), and with it its outputs do.
        per_group = self.shape[0] // self.groups
        rows = factor.reshape(self.groups, 1, -1).expand(-1, per_group, -1)
        return rows.reshape(self.shape[0], -1, *ones)


class _Folder:
    """Folds batch norms of one graph, and knows who reads which tensor."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._readers: dict[int, set[fx.Node]] = {}
        self._kept: list[Tensor] = []  # so that identities stay taken
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                self._add(find_attribute(gm, str(node.target)), set(node.users))
            elif node.op == "call_module":
                module = gm.get_submodule(str(node.target))
                for tensor in (*module.parameters(), *module.buffers()):
                    self._add(tensor, {node})

    def _add(self, tensor: Tensor, readers: set[fx.Node]) -> None:
        self._readers.setdefault(id(tensor), set()).update(readers)
        self._kept.append(tensor)

    def _is_only_read_by(self, tensor: Tensor, node: fx.Node) -> bool:
        return self._readers.get(id(tensor)) == {node}

    def fold(self, node: fx.Node, spent: list[str]) -> bool:
        """Fold `node`, if it is a batch norm that can be, and add to `spent` what it read."""
        norm = _affine_of(self.gm, node)
        if norm is None or set(norm.source.users) != {node}:
            return False
        source = norm.source
        apply = self._of_module if source.op == "call_module" else self._of_function
        if not apply(source, norm):
            return False
        node.replace_all_uses_with(source)
        spent.extend(erase_unused(node))
        return True

    def _fits(self, layer: _Layer, norm: _Affine) -> bool:
        value = VALUE.find(norm.source)
        if isinstance(value, TensorInfo):
            has_rank = len(value.shape) == len(layer.shape)
        else:
            has_rank = len(layer.shape) > 2
        return has_rank and layer.num_channels == norm.factor.numel()

    # -- layers that are modules -----------------------------------------------------------------

    def _of_module(self, source: fx.Node, norm: _Affine) -> bool:
        target = str(source.target)
        module = self.gm.get_submodule(target)
        if type(module) not in _REGULAR + _TRANSPOSED or _is_hooked(module):
            return False
        assert isinstance(module.weight, Tensor)
        transposed = type(module) in _TRANSPOSED
        groups = int(getattr(module, "groups", 1)) if transposed else 1
        layer = _Layer(module.weight.shape, int(transposed), groups)
        if not self._is_only_read_by(module.weight, source) or not self._fits(layer, norm):
            return False
        # A copy: the module may be shared with the model that was traced.
        folded = copy.deepcopy(module)
        folded.weight = _parameter(layer.along_weight(norm.factor), module.weight)
        bias: Any = module.bias
        folded.bias = _shifted(norm, bias, module.weight.dtype)
        self.gm.set_submodule(target, folded)
        for tensor in folded.parameters():
            self._add(tensor, {source})
        return True

    # -- layers that are functions ---------------------------------------------------------------

    def _of_function(self, source: fx.Node, norm: _Affine) -> bool:
        transposed = source.target in _TRANSPOSED_FUNCTIONS
        if not transposed and source.target not in _REGULAR_FUNCTIONS:
            return False
        weight, bias = operand_of(source, _WEIGHT), operand_of(source, _BIAS)
        held = self._weight_of(source, weight)
        if held is None or not (bias is None or _is_attribute(bias)):
            return False
        groups = (operand_of(source, _GROUPS) or 1) if transposed else 1
        layer = _Layer(held.shape, int(transposed), groups)
        if not self._fits(layer, norm):
            return False
        factor = layer.along_weight(norm.factor)
        if isinstance(held, FrozenWeight):
            held.rescale(factor, layer.channel_axis)
        else:
            self._set(str(weight.target), _parameter(factor, held), source)
        self._shift_bias(source, weight, bias, norm, held.dtype)
        return True

    def _weight_of(self, source: fx.Node, weight: Any) -> FrozenWeight | Tensor | None:
        """Return the weight, if `source` alone reads it, and only as its weight."""
        if not isinstance(weight, fx.Node) or set(weight.users) != {source}:
            return None
        if source.all_input_nodes.count(weight) != 1 or operand_of(source, _BIAS) is weight:
            return None
        if weight.op == "get_attr":
            tensor = find_attribute(self.gm, str(weight.target))
            return tensor if self._is_only_read_by(tensor, source) else None
        if weight.op != "call_module":
            return None
        module = self.gm.get_submodule(str(weight.target))
        if not isinstance(module, FrozenWeight) or not self._is_only_read_by(module.packed, weight):
            return None
        return module

    def _shift_bias(
        self, source: fx.Node, weight: fx.Node, bias: Any, norm: _Affine, dtype: torch.dtype
    ) -> None:
        held = None if bias is None else find_attribute(self.gm, str(bias.target))
        shifted = _shifted(norm, held, dtype)
        if held is not None and self._is_only_read_by(held, source):
            self._set(str(bias.target), shifted, source)
            return
        path = self._bias_path(source, weight)
        self._set(path, shifted, source)
        with self.gm.graph.inserting_before(source):
            new = self.gm.graph.get_attr(path)
        _set_operand(source, _BIAS, new)
        if bias is not None:
            erase_unused(bias)

    def _bias_path(self, source: fx.Node, weight: fx.Node) -> str:
        """Return where the layer would have its bias; else a free name."""
        owner = str(weight.target).rpartition(".")[0] if weight.op == "get_attr" else None
        owner = MODULE_PATH.find(source) if owner is None else owner
        if owner and self._has_room_for_bias(owner):
            return f"{owner}.bias"
        name, count = f"{source.name}_bias", 1
        while hasattr(self.gm, name):
            count += 1
            name = f"{source.name}_bias_{count}"
        return name

    def _has_room_for_bias(self, owner: str) -> bool:
        try:
            layer = self.gm.get_submodule(owner)
        except AttributeError:  # a path of the traced model that the graph has no part of
            return False
        return type(layer) in _REGULAR + _TRANSPOSED and getattr(layer, "bias", None) is None

    def _set(self, path: str, value: Parameter, reader: fx.Node) -> None:
        owner, _, name = path.rpartition(".")
        setattr(self.gm.get_submodule(owner), name, value)
        self._add(value, {reader})


def _parameter(factor: Tensor, value: Tensor) -> Parameter:
    scaled = value.detach().to(factor) * factor
    return Parameter(scaled.to(value), requires_grad=False)


def _shifted(norm: _Affine, bias: Tensor | None, dtype: torch.dtype) -> Parameter:
    shift = norm.shift
    if bias is not None:
        shift = shift + norm.factor * bias.detach().to(norm.factor)
    return Parameter(shift.to(dtype), requires_grad=False)


def _set_operand(node: fx.Node, ref: OperandRef, value: fx.Node) -> None:
    if ref.keyword in node.kwargs or ref.index >= len(node.args):
        node.kwargs = {**node.kwargs, ref.keyword: value}
    else:
        node.update_arg(ref.index, value)


def _is_attribute(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


# -- what a batch norm does ----------------------------------------------------------------------


def _affine_of(gm: fx.GraphModule, node: fx.Node) -> _Affine | None:
    """Return what `node` does if it is a batch norm by running statistics."""
    if node.op == "call_module":
        return _affine_of_module(gm.get_submodule(str(node.target)), node)
    return _affine_of_function(gm, node) if node.target is F.batch_norm else None


def _affine_of_module(module: nn.Module, node: fx.Node) -> _Affine | None:
    if type(module) not in _NORMS or module.training or _is_hooked(module):
        return None
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    source = node.args[0] if node.args else node.kwargs["input"]
    mean, var = module.running_mean, module.running_var
    return _affine(source, mean, var, module.weight, module.bias, module.eps)


def _affine_of_function(gm: fx.GraphModule, node: fx.Node) -> _Affine | None:
    given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    source, *tensors, training, _, eps = given.arguments.values()
    if training is not False or not all(t is None or _is_attribute(t) for t in tensors):
        return None
    mean, var, weight, bias = (
        None if t is None else find_attribute(gm, str(t.target)) for t in tensors
    )
    return _affine(source, mean, var, weight, bias, eps)


def _affine(
    source: Any,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> _Affine | None:
    if mean is None or var is None or not isinstance(source, fx.Node):
        return None
    factor = (var.detach().double() + eps).rsqrt()
    if weight is not None:
        factor = factor * weight.detach()
    shift = -mean.detach() * factor
    if bias is not None:
        shift = shift + bias.detach()
    return _Affine(source, factor, shift)
