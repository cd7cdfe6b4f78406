"""Graph passes: a `torch.fx.GraphModule` in, the same one changed or annotated out."""

if __name__ != "cgmq_fx.passes":
    raise ImportError(f"import cgmq_fx.passes, not {__name__}")
from cgmq_fx.passes.annotate_nonnegative import AnnotateNonnegative as AnnotateNonnegative
from cgmq_fx.passes.annotate_operations import AnnotateOperations as AnnotateOperations
from cgmq_fx.passes.annotate_shapes import AnnotateShapes as AnnotateShapes
from cgmq_fx.passes.annotate_work import AnnotateWork as AnnotateWork
from cgmq_fx.passes.base import GraphPass as GraphPass
from cgmq_fx.passes.base import Numerics as Numerics
from cgmq_fx.passes.close_batch_norm import CloseBatchNorm as CloseBatchNorm
from cgmq_fx.passes.export_program import trace_exported as trace_exported
from cgmq_fx.passes.fold_batch_norm import FoldBatchNorm as FoldBatchNorm
from cgmq_fx.passes.freeze_bit_widths import FreezeBitWidths as FreezeBitWidths
from cgmq_fx.passes.functionalize import Functionalize as Functionalize
from cgmq_fx.passes.fuse_rectifiers import FuseRectifiers as FuseRectifiers
from cgmq_fx.passes.insert_quantizers import InsertQuantizers as InsertQuantizers
from cgmq_fx.passes.pipeline import Pipeline as Pipeline
from cgmq_fx.passes.price_operations import PriceOperations as PriceOperations
from cgmq_fx.passes.raise_aten import RaiseAten as RaiseAten
from cgmq_fx.passes.restore_modules import RestoreModules as RestoreModules
from cgmq_fx.passes.select_operands import SelectOperands as SelectOperands
from cgmq_fx.passes.share_quantizers import ShareQuantizers as ShareQuantizers
from cgmq_fx.passes.specialize_evaluation import SpecializeEvaluation as SpecializeEvaluation
from cgmq_fx.passes.trace import trace as trace

#: Every pass, in the order in which `prepare` and `lower` run them.
PASSES: tuple[type[GraphPass], ...] = (
    RestoreModules,
    RaiseAten,
    CloseBatchNorm,
    Functionalize,
    AnnotateOperations,
    AnnotateNonnegative,
    AnnotateShapes,
    SelectOperands,
    ShareQuantizers,
    InsertQuantizers,
    FuseRectifiers,
    AnnotateWork,
    PriceOperations,
    SpecializeEvaluation,
    FreezeBitWidths,
    FoldBatchNorm,
)
