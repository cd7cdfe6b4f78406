"""What the products of a network are given, and the float network to compare them with."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from cgmq_fx.calibrate import unseen
from cgmq_fx.calibration_data import Inputs
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.prepared import PreparedModule

#: Products with a weight, called as ``target(x, weight, bias, ...)``.
_LINEAR: frozenset[Callable[..., Any]] = frozenset({F.linear, torch._C._nn.linear})
_CONVOLUTIONS: frozenset[Callable[..., Any]] = frozenset(
    {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
)
_NAMES = ("input", "weight", "bias")


@dataclass(frozen=True)
class Product:
    """A linear layer or a convolution of a prepared graph.

    Attributes:
        node: the call.
        site: name of the quantizer of its weight.
        is_convolution: else it is linear.
    """

    node: fx.Node
    site: str
    is_convolution: bool

    def operand(self, name: str) -> Any:
        """Return what the graph gives it as ``input``, ``weight`` or ``bias``."""
        return _bound(self.node.args, self.node.kwargs)[0].get(name)

    @property
    def channel_axis(self) -> int:
        """The axis of its result that counts output channels, from the end."""
        return -1 - _SPATIAL.get(self.node.target, 0)

    def patches(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], groups: int) -> Tensor:
        """Return the values that each number of the result is a product of a weight row with.

        Shape ``(groups, positions, values)``. Those of a convolution are what it makes of kernels
        that each pick one value.
        """
        known, rest, named = _given(args, kwargs)
        x, weight = known["input"], known["weight"]
        values = weight[0].numel()
        if not self.is_convolution:
            flat: Tensor = x.reshape(1, -1, values)
            return flat
        picks = torch.eye(values, dtype=x.dtype, device=x.device).reshape(values, *weight.shape[1:])
        picks = picks.repeat(groups, *[1] * (weight.ndim - 1))
        found: Tensor = self.node.target(x, picks, None, *rest, **named)  # type: ignore[operator]
        found = found.movedim(self.channel_axis, 0)
        return found.reshape(groups, values, -1).transpose(1, 2)

    def result(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the result of the call."""
        made: Tensor = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return made


_SPATIAL: Mapping[Any, int] = {
    function: int(str(function.__name__)[4]) for function in _CONVOLUTIONS
}


def products(prepared: PreparedModule) -> Iterator[Product]:
    """Yield the linear layers and convolutions with quantized weights, in order."""
    for node in prepared.graph.nodes:
        if node.op != "call_function" or node.target not in _LINEAR | _CONVOLUTIONS:
            continue
        weight = _bound(node.args, node.kwargs)[0].get("weight")
        if isinstance(weight, fx.Node) and is_quantizer(prepared, weight):
            site = str(weight.target).rpartition(".")[2]
            if prepared.quantizers[site].spec.role == "weight":
                yield Product(node, site, node.target in _CONVOLUTIONS)


def float_twin(prepared: PreparedModule) -> PreparedModule:
    """Return a copy in which every tensor passes its quantizer unchanged, in evaluation mode."""
    twin = copy.deepcopy(prepared).eval()
    for quantizer in twin.quantizers.values():
        quantizer.tap = unseen
    return twin


def arguments_at(
    prepared: PreparedModule, node: fx.Node, inputs: Inputs
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return what a call of the graph is given, where the model has `inputs`.

    Args:
        prepared: the model, or a copy of the one that `node` is of.
        node: the call.
        inputs: one value for each placeholder.
    """
    try:
        _Until(prepared, node.name).run(*inputs)
    except _Found as found:
        return found.given
    raise AssertionError(f"{node.name} is not in the graph")


class _Found(Exception):  # noqa: N818 - it carries a result
    def __init__(self, given: tuple[tuple[Any, ...], Mapping[str, Any]]) -> None:
        super().__init__()
        self.given = given


class _Until(fx.Interpreter):
    """Runs a graph up to one node."""

    def __init__(self, gm: fx.GraphModule, name: str) -> None:
        super().__init__(gm)
        self._name = name
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        if n.name == self._name:
            raise _Found(self.fetch_args_kwargs_from_env(n))
        return super().run_node(n)


def _bound(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    known = {
        **dict(zip(_NAMES, args, strict=False)),
        **{k: kwargs[k] for k in _NAMES if k in kwargs},
    }
    return known, args[len(_NAMES) :]


def _given(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]:
    known, rest = _bound(args, kwargs)
    return known, rest, {key: value for key, value in kwargs.items() if key not in _NAMES}
