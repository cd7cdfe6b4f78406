"""The passes that turn a traced model into a quantized graph, as settings ask."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from cgmq_fx.account import WEIGHT_MEMORY, account
from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.operation import OP_CLASSES
from cgmq_fx.cost.peak_memory import PEAK_ACTIVATION_MEMORY
from cgmq_fx.passes.annotate_nonnegative import AnnotateNonnegative
from cgmq_fx.passes.annotate_operations import AnnotateOperations
from cgmq_fx.passes.annotate_shapes import AnnotateShapes
from cgmq_fx.passes.base import GraphPass
from cgmq_fx.passes.candidates import Wanted
from cgmq_fx.passes.close_batch_norm import CloseBatchNorm
from cgmq_fx.passes.functionalize import Functionalize
from cgmq_fx.passes.insert_quantizers import InsertQuantizers
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.select_operands import SelectOperands
from cgmq_fx.passes.share_quantizers import ShareQuantizers
from cgmq_fx.passes.without_quantizers import without_quantizers
from cgmq_fx.plan import Settings

# Operations whose weights a bound on memory makes worth quantizing.
_WEIGHT_OPS = frozenset(op for op in OP_CLASSES if op.startswith("conv")) | {
    "linear",
    "embedding",
    "matmul",
}


def quantizing_passes(
    settings: Settings, sample: Sequence[Any] | None, whole: tuple[Any, ...] | None = None
) -> list[GraphPass]:
    """Return the passes from a traced graph to one with quantizers.

    Args:
        settings: the arguments of `prepare`.
        sample: the inputs of one sample; None where shapes are not known.
        whole: the inputs of a batch, for models that do not take one sample.
    """
    choices = settings.choices
    # With shapes known, operands that are not floating-point tensors are left alone.
    shapes = [] if sample is None else [AnnotateShapes(tuple(sample), whole)]
    return [
        CloseBatchNorm(),
        Functionalize(),
        AnnotateOperations(),
        AnnotateNonnegative(),
        *shapes,
        SelectOperands(_wanted(settings), choices.skip, choices.overrides),
        ShareQuantizers(_shared(settings)),
        InsertQuantizers(
            settings.widths, settings.input_bits, settings.per_channel, settings.granularity
        ),
    ]


def account_otherwise(
    prepared: fx.GraphModule, settings: Settings, sample: Sequence[Any]
) -> Accounting:
    """Return the accounting that a prepared graph would have with other settings.

    `prepared` stays as it is.

    Raises:
        CgmqError: with these settings it cannot be prepared or priced.
    """
    twin = without_quantizers(prepared)
    Pipeline(quantizing_passes(settings, sample)).run(twin)
    return account(twin, sample, settings.tables, settings.limits)


def _wanted(settings: Settings) -> Wanted:
    bounding = [settings.tables[name] for name in settings.limits if name in settings.tables]
    return Wanted(
        frozenset(op for table in bounding for row in table.rows for op in row.op),
        _WEIGHT_OPS if WEIGHT_MEMORY in settings.limits else frozenset(),
        frozenset(
            op for table in bounding for row in table.rows if row.depends_on_bits for op in row.op
        ),
        # Activations that memory holds as codes must be read through quantizers by every operation.
        frozenset(OP_CLASSES if PEAK_ACTIVATION_MEMORY in settings.limits else ()),
    )


def _shared(settings: Settings) -> frozenset[str]:
    """Return the classes whose operands share a quantizer: as called, else as the tables ask."""
    if settings.choices.share is not None:
        return frozenset(settings.choices.share)
    tables = [settings.tables[name] for name in settings.limits if name in settings.tables]
    return frozenset(op for table in tables for op in table.share)
