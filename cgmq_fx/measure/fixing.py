"""Models at given bit-widths, untrained: how long they take matters, what they compute does not."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.operation import AVERAGING_CLASSES
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.price_model import nearest

WEIGHT_CLASSES = (
    *(f"conv{n}d" for n in (1, 2, 3)),
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
    "linear",
)
PAIR_CLASSES = ("add", "cat", "mul")
#: A table that prices what measured tables price, so that the same tensors have quantizers.
_TABLE = CostTable(
    name="timing",
    unit="BOP",
    rows=(
        Row(op=WEIGHT_CLASSES, per="mac", cost={"formula": "weight_bits * activation_bits"}),  # type: ignore[arg-type]
        Row(op=PAIR_CLASSES, per="output_element", cost={"formula": "lhs_bits * rhs_bits"}),  # type: ignore[arg-type]
        Row(op=tuple(AVERAGING_CLASSES), per="input_element", cost={"formula": "activation_bits"}),  # type: ignore[arg-type]
        Row(op=("matmul", "attention", "bilinear", "rnn", "opaque"), per="mac", cost=1024),  # type: ignore[arg-type]
    ),
    unpriced="zero",
)


def prepared_for_timing(
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    widths: Sequence[int] = (8,),
    table: CostTable = _TABLE,
) -> PreparedModule:
    """Return `model` with quantizers wherever the rows of `table` read tensors.

    Raises:
        CgmqError: it cannot be prepared.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubts about the table were told when it was read
        return prepare(
            model.eval(),
            {table.name: "100%"},
            example_inputs=tuple(inputs),
            cost_table=table,
            widths=widths,
            learn_input_bits=True,
        )


def fixed_at(
    model: nn.Module, inputs: Sequence[torch.Tensor], weights: int, activations: int
) -> LoweredModule:
    """Return `model` lowered with every weight and every activation at these bit-widths.

    Raises:
        CgmqError: it cannot be prepared or lowered.
    """
    prepared = prepared_for_timing(model, inputs, sorted({weights, activations}))
    prepared.set_bit_widths(uniform_bits(prepared.plan.accounting, weights, activations))
    prepared.eval()
    with torch.no_grad():
        prepared(*inputs)
    return lower(prepared, allow_untrained=True)


def uniform_bits(accounting: Accounting, weights: int, activations: int) -> list[int]:
    """Return these bit-widths for each site, or the next wider ones that it may have."""
    asked = (weights if site.role == "weight" else activations for site in accounting.sites)
    return [nearest(site, bits) for site, bits in zip(accounting.sites, asked, strict=True)]
