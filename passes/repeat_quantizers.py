"""Puts a quantizer in front of what moves values, too."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from cgmq_fx.frozen import FrozenAttention, FrozenQuantizer
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.moving_calls import moves_values
from cgmq_fx.xnnpack_modules import is_eight_bit


@final
@dataclass(frozen=True)
class RepeatQuantizers(GraphPass):
    """Call a frozen quantizer of up to 8 bits in front of what moves values, besides behind it.

    That are reshapes, permutations and maximum pooling, which commute with rounding to a grid.
    Compilers then see a quantize operator right behind the convolution that computes the values,
    and move integers.

    Numerics: exact.
    """

    name: ClassVar[str] = "repeat-quantizers"

    def run(self, gm: fx.GraphModule) -> bool:
        """Repeat the quantizers; see `GraphPass.run`."""
        waiting = [node for node in gm.graph.nodes if _quantizes(gm, node)]
        changed = False
        while waiting:
            added = _repeat(gm, waiting.pop())
            if added is not None:
                waiting.append(added)
                changed = True
        return changed


def _repeat(gm: fx.GraphModule, quantizer: fx.Node) -> fx.Node | None:
    """Call the quantizer in front of what moves its input; None where nothing does."""
    moving = quantizer.args[0]
    if not isinstance(moving, fx.Node) or not moves_values(gm, moving):
        return None
    if any(user.target != quantizer.target or user.op != "call_module" for user in moving.users):
        return None
    source = moving.args[0]
    assert isinstance(source, fx.Node)
    if source.op == quantizer.op and source.target == quantizer.target:
        return None
    with gm.graph.inserting_before(moving):
        added = gm.graph.call_module(str(quantizer.target), (source,))
    added.meta = dict(source.meta)
    moving.replace_input_with(source, added)
    return added


def _quantizes(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = gm.get_submodule(str(node.target))
    if not isinstance(module, FrozenQuantizer) or isinstance(module, FrozenAttention):
        return False
    return is_eight_bit(module)
