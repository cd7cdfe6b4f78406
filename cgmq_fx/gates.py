"""Gates: the learned values that select bit-widths.

A gate is a float. Of the allowed widths w_0 < ... < w_k, a gate in (i, i + 1] selects w_i, a gate
above k selects w_k and a gate at or below 0 selects w_0. With the default widths that is how
constraint-guided quantization (arXiv 2409.20138) is read here: 2, 4, 8, 16, 32 for (0, 1], (1, 2],
(2, 3], (3, 4] and (4, inf).
"""

import math

import torch
from torch import Tensor

from cgmq_fx.errors import UsageError

DEFAULT_WIDTHS = (2, 4, 8, 16, 32)
FLOAT_WIDTH = 32
"""The width at which nothing is quantized: a tensor passes through bit for bit."""
PRUNED_WIDTH = 0
"""The width at which a tensor is 0 everywhere: it stores nothing, and nothing computes with it."""
BINARY_WIDTH = 1
MAX_INTEGER_WIDTH = 16
WIDTHS_TEXT = "0 to 16, or 32"


def is_width(bit_width: object) -> bool:
    """Return whether `bit_width` is one that a quantizer can have: 0 to 16, or 32."""
    if not isinstance(bit_width, int) or isinstance(bit_width, bool):
        return False
    return PRUNED_WIDTH <= bit_width <= MAX_INTEGER_WIDTH or bit_width == FLOAT_WIDTH


def bit_width_of(gate: float, widths: tuple[int, ...] = DEFAULT_WIDTHS) -> int:
    """Return the width that `gate` selects among `widths`, which rise.

    Raises:
        UsageError: the gate is not a number.

    >>> bit_width_of(0.5), bit_width_of(1.0), bit_width_of(1.01), bit_width_of(5.5)
    (2, 2, 4, 32)
    """
    if math.isnan(gate):
        raise UsageError(
            "a gate is nan and selects no bit-width; a gate is a number "
            f"({gate_for(widths[0], widths)} selects {widths[0]} bits): "
            "check the direction that moved it for a division by zero"
        )
    if gate <= 0:
        return widths[0]
    return widths[-1] if gate > len(widths) else widths[math.ceil(gate) - 1]


def gate_for(bit_width: int, widths: tuple[int, ...] = DEFAULT_WIDTHS) -> float:
    """Return the middle of the band of gates that select `bit_width`.

    Raises:
        UsageError: the width is not one of `widths`.

    >>> gate_for(2), gate_for(32)
    (0.5, 4.5)
    """
    if bit_width not in widths:
        raise UsageError(
            f"bit_width={bit_width} is not an allowed width; "
            f"choose one of {', '.join(map(str, widths))}"
        )
    return widths.index(bit_width) + 0.5


def width_index(gates: Tensor, num_widths: int | Tensor) -> Tensor:
    """Return, as int64, which of its widths each gate selects: 0 for the lowest.

    `num_widths` may be a tensor that broadcasts with `gates`, for gates with different sets of
    widths. No gate is NaN.

    >>> width_index(torch.tensor([-3.0, 0.5, 1.0, 4.2, 99.0]), 5).tolist()
    [0, 0, 0, 4, 4]
    """
    index = torch.ceil(gates).sub_(1).clamp_(min=0)
    top = torch.as_tensor(num_widths, device=gates.device) - 1
    return torch.minimum(index, top.to(index.dtype)).to(torch.int64)
