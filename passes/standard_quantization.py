"""Says what frozen modules compute in PyTorch's standard quantization operators."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import fx, nn

from cgmq_fx.frozen import FrozenAttention, FrozenModule, FrozenQuantizer, FrozenWeight
from cgmq_fx.passes.base import GraphPass, Numerics
from cgmq_fx.passes.meta import MetaKey
from cgmq_fx.standard_modules import Clamp, StandardAttention, StandardQuantizer, StandardWeight

# Their weights have input channels first.
_TRANSPOSED: tuple[Any, ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)


@final
@dataclass(frozen=True)
class StandardQuantization(GraphPass):
    """Replace frozen modules by `cgmq_fx.standard_modules`, of the same names.

    Attributes:
        signed: codes of activations of up to 8 bits are int8, as XNNPACK has them.
        clamp: what is clamped where the codes of an activation are fewer than their type holds, see
            `cgmq_fx.standard_modules.StandardQuantizer`.

    Numerics: a value within float rounding of the middle between two codes may get the other one.
    """

    name: ClassVar[str] = "standard-quantization"
    numerics: ClassVar[Numerics] = Numerics.CHANGES
    invalidates: ClassVar[frozenset[MetaKey[Any]]] = frozenset()

    signed: bool = False
    clamp: Clamp = "codes"

    def run(self, gm: fx.GraphModule) -> bool:
        """Replace the frozen modules that `gm` reads; see `GraphPass.run`."""
        changed = False
        for node in gm.graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            held = _module_at(gm, str(node.target))
            if isinstance(held, FrozenModule):
                gm.set_submodule(str(node.target), self._standard(held, node))
                changed = True
        return changed

    def _standard(self, frozen: FrozenModule, node: fx.Node) -> nn.Module:
        match frozen:
            case FrozenWeight():
                transposed = any(user.target in _TRANSPOSED for user in node.users)
                return StandardWeight(frozen, axis=int(transposed))
            case FrozenAttention():
                return StandardAttention(frozen, signed=self.signed, clamp=self.clamp)
            case FrozenQuantizer():
                return StandardQuantizer(frozen, signed=self.signed, clamp=self.clamp)
        raise AssertionError(f"{type(frozen).__name__} has no standard form")


def _module_at(gm: fx.GraphModule, path: str) -> nn.Module | None:
    try:
        return gm.get_submodule(path)
    except AttributeError:  # a tensor
        return None
