"""Passes that ship with torch and torchao, as functions, with what each of them promises."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx
from torch.ao.quantization.quantize_fx import fuse_fx
from torch.fx.experimental import const_fold, merge_matmul, normalize, optimization
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops
from torch.fx.passes.shape_prop import ShapeProp

from cgmq_fx.passes.base import Numerics
from cgmq_fx.testing import Case, exported_programs, graph_modules

EXACT, REASSOCIATED = Numerics.EXACT, Numerics.REASSOCIATED


@dataclass(frozen=True)
class Target:
    """A pass and what it is held to.

    Attributes:
        make: returns the pass for a case.
        numerics: how far the numbers of the result may be from those of the model.
        training: hold them in training mode too.
        promise: where that comes from.
        cases: what is drawn.
        graph: exports the model of a drawn case; None where it is traced.
        needs: a package without which the pass cannot be imported.
        verdicts: what reading the code of the pass showed, and mostly a run without the kit, by
            words of the fault.
    """

    make: Callable[[Case], Callable[[fx.GraphModule], Any]]
    numerics: Numerics
    training: bool
    promise: str
    cases: st.SearchStrategy[Case]
    graph: Callable[[Case], Case] | None = None
    needs: str = "torch"
    verdicts: tuple[tuple[str, str], ...] = ()


def fuse(gm: fx.GraphModule) -> Any:
    """Fold batch norms into convolutions and linear layers."""
    return optimization.fuse(gm)


def remove_dropout(gm: fx.GraphModule) -> Any:
    """Remove dropout layers."""
    return optimization.remove_dropout(gm)


def optimize_for_inference(gm: fx.GraphModule) -> Any:
    """Fuse, remove dropout, and put what oneDNN does into its layout."""
    return optimization.optimize_for_inference(gm)


def quantization_fuse(gm: fx.GraphModule) -> Any:
    """Fuse as `torch.ao.quantization` does before it quantizes."""
    return fuse_fx(gm)


def common_subexpressions(gm: fx.GraphModule) -> Any:
    """Merge calls of one function on the same arguments."""
    return CSEPass(banned_ops=get_CSE_banned_ops())(gm)  # type: ignore[no-untyped-call]


def normalize_args(gm: fx.GraphModule) -> Any:
    """Give every argument by keyword."""
    return normalize.NormalizeArgs(gm).transform()


def normalize_operators(gm: fx.GraphModule) -> Any:
    """Call functions of torch that have an operator as that operator."""
    return normalize.NormalizeOperators(gm).transform()  # type: ignore[no-untyped-call]


def fold_constants(gm: fx.GraphModule) -> Any:
    """Compute what depends on no input once."""
    return const_fold.split_const_subgraphs(gm)


def fold_constants_now(gm: fx.GraphModule) -> fx.GraphModule:
    """Compute what depends on no input, and return a module of the ordinary class."""
    folded = const_fold.split_const_subgraphs(gm)
    folded.run_folding()
    return fx.GraphModule(folded, folded.graph)


def merge_products(gm: fx.GraphModule) -> Any:
    """Make one product of several that share their right operand."""
    return merge_matmul.merge_matmul(gm)


def eliminate_dead_code(gm: fx.GraphModule) -> bool:
    """Remove what nobody reads."""
    changed = gm.graph.eliminate_dead_code()
    gm.recompile()
    return changed


def propagate_shapes(case: Case) -> Callable[[fx.GraphModule], None]:
    """Return the analysis that runs the graph on the inputs of a case and notes shapes."""

    def shape_prop(gm: fx.GraphModule) -> None:
        inputs = list(case.inputs())
        named = case.kwargs()
        rest = gm.graph.find_nodes(op="placeholder")[len(inputs) :]
        inputs += [named.get(n.target, n.args[0] if n.args else None) for n in rest]
        with torch.random.fork_rng(devices=()):
            ShapeProp(gm).propagate(*inputs)

    return shape_prop


def torchao_fold(gm: fx.GraphModule) -> None:
    """Fold batch norms into convolutions of an exported graph, as `prepare_pt2e` does."""
    importlib.import_module("torchao.quantization.pt2e.utils")._fuse_conv_bn_(gm)


def torchao_modes(gm: fx.GraphModule) -> None:
    """Move an exported graph to evaluation mode and back."""
    pt2e = importlib.import_module("torchao.quantization.pt2e")
    pt2e.move_exported_model_to_eval(gm)
    pt2e.move_exported_model_to_train(gm)


def in_evaluation(case: Case) -> Case:
    """Return a case of the model exported in evaluation mode."""
    return _exported(case, training=False)


def in_training(case: Case) -> Case:
    """Return a case of the model exported in training mode."""
    return _exported(case, training=True)


def functional(case: Case) -> Case:
    """Return a case of the model exported in evaluation mode, without in-place operations."""
    return _exported(case, training=False, decomposed=True)


def _exported(case: Case, *, training: bool, decomposed: bool = False) -> Case:
    model, inputs, kwargs = case.model().train(training), case.inputs(), case.kwargs()
    program = torch.export.export(model, inputs, kwargs)
    gm = (program.run_decompositions() if decomposed else program).module()
    assert isinstance(gm, fx.GraphModule)
    # A module of this class has train() and eval(), which that of an exported program refuses.
    return Case.of(fx.GraphModule(gm, gm.graph), inputs, kwargs)


def _always(pass_: Callable[[fx.GraphModule], Any]) -> Callable[[Case], Any]:
    return lambda case: pass_


REUSED = {"reused", "reused_shapes", "tied"}
INFERENCE = "its docstring: for inference"
SAME = "nothing but the form of the calls changes"
NORMS = exported_programs(max_layers=4, require={"conv_bn"})
BATCH_NORMS = graph_modules(require={"batch_norm"})
# A batch norm right behind a linear layer, which a free draw seldom has.
FLAT = graph_modules(
    max_layers=3, require={"batch_norm", "linear", "no_affine"}, exclude={"conv", "transposed"}
)
SUMS = graph_modules(max_layers=3, require={"residual"})

GROUPS = (
    "Defect, known (pytorch#180995): for a transposed convolution with groups the factor meets the "
    "wrong axis of the weight."
)
READ_TWICE = "Defect, known (pytorch#104593, #197539): the folded layer is also called elsewhere."
NO_AFFINE = "Defect: a batch norm without weight and bias behind a linear layer is not handled."
ONEDNN = "Limit: layers of oneDNN hold their weights as buffers; made for inference only."
CHECK = "The check is stricter than the promise of the pass"

TARGETS = {
    "optimization.fuse": Target(
        *(_always(fuse), REASSOCIATED, False, INFERENCE, BATCH_NORMS | FLAT),
        verdicts=(("numerics", READ_TWICE), ("raises TypeError", NO_AFFINE)),
    ),
    "optimization.fuse, reused layers left out": Target(
        *(_always(fuse), REASSOCIATED, False, INFERENCE),
        graph_modules(require={"batch_norm"}, exclude=REUSED),
        verdicts=(("raises TypeError", NO_AFFINE),),
    ),
    "optimization.remove_dropout": Target(
        *(_always(remove_dropout), EXACT, False, "dropout does nothing in evaluation"),
        graph_modules(require={"dropout"}),
    ),
    "optimization.optimize_for_inference": Target(
        *(_always(optimize_for_inference), REASSOCIATED, False, INFERENCE),
        graph_modules(require={"conv"}),
        verdicts=(
            ("numerics", READ_TWICE),
            ("raises TypeError", NO_AFFINE),
            ("affine=True", "Defect: an ordinary batch norm without weight and bias is refused."),
            ("is a buffer", ONEDNN),
            (
                "track_running_stats",
                "By its message: a batch norm that has no statistics is refused.",
            ),
            ("mkldnn_reorder_conv", "By its message: padding given as a word is not handled."),
        ),
    ),
    "quantize_fx.fuse_fx": Target(
        *(_always(quantization_fuse), REASSOCIATED, False, INFERENCE),
        graph_modules(require={"conv_bn"}),
        verdicts=(
            ("idempotent", f"{CHECK}: a second run nests the fused layers once more."),
            ("torch.float", GROUPS + " Here the shapes broadcast, and the fused layer cannot run."),
            ("RuntimeError", GROUPS),
            ("running_mean", "Defect: a batch norm without statistics is not left as it is."),
            ("numerics", READ_TWICE),
        ),
    ),
    "CSEPass on exported graphs": Target(
        *(_always(common_subexpressions), EXACT, False, "its docstring: functional graphs"),
        *(exported_programs(max_layers=3), functional),
        verdicts=(
            (
                "signature",
                "Defect: the new graph loses the code generator of the old one, so that "
                "an exported model returns a flat tuple, not its dict.",
            ),
        ),
    ),
    "NormalizeArgs": Target(_always(normalize_args), EXACT, True, SAME, graph_modules()),
    "NormalizeOperators": Target(
        *(_always(normalize_operators), EXACT, True, SAME, graph_modules() | SUMS),
        verdicts=(
            (
                "numerics",
                "Defect: keyword arguments such as alpha are dropped with the function "
                "that took them; torch.div loses its rounding_mode the same way.",
            ),
        ),
    ),
    "split_const_subgraphs": Target(
        *(_always(fold_constants), EXACT, False, "the same operations, once"),
        graph_modules(max_layers=3, require={"bare_parameter"}),
        verdicts=(("has_folding_been_run", "Defect: a deep copy of the result cannot run."),),
    ),
    "split_const_subgraphs, folded": Target(
        *(_always(fold_constants_now), EXACT, False, "the same operations, once"),
        graph_modules(require={"bare_parameter"}),
    ),
    "merge_matmul": Target(
        *(_always(merge_products), REASSOCIATED, False, "its docstring"),
        graph_modules(require={"matmul"}),
        verdicts=(
            (
                "runs",
                "Limit that the docstring draws as a picture of matrices but the pass does "
                "not check: for stacks of matrices the result cannot run.",
            ),
        ),
    ),
    "Graph.eliminate_dead_code": Target(
        *(_always(eliminate_dead_code), EXACT, True, "what is removed has no effect"),
        graph_modules(),
        verdicts=(
            (
                "numerics",
                "Documented limit: the graph has to be functional; an in-place method "
                "whose result nobody reads is removed.",
            ),
        ),
    ),
    "ShapeProp": Target(
        *(propagate_shapes, EXACT, True, "an analysis changes no tensor", graph_modules()),
        verdicts=(
            ("state", "Limit: it runs the module, in training mode with batch norms' statistics."),
        ),
    ),
    "torchao fold of batch norms": Target(
        *(_always(torchao_fold), REASSOCIATED, False, "batch norm in evaluation is a factor"),
        *(NORMS, in_evaluation, "torchao"),
        (
            (
                "numerics",
                "Defect: that the convolution, or its weight, is also read elsewhere is "
                "not checked.",
            ),
            ("torch.float", GROUPS + " Here the shapes broadcast, and the result cannot run."),
            ("RuntimeError", GROUPS),
        ),
    ),
    "torchao move to evaluation and back, dropout": Target(
        *(_always(torchao_modes), EXACT, False, "there and back changes nothing"),
        exported_programs(max_layers=2, require={"dropout"}),
        *(in_training, "torchao"),
        (
            (
                "numerics",
                "Defect, known (ao#2980, ao#4790): p becomes 0.5, and a batch norm's eps "
                "1e-5 and momentum 0.1.",
            ),
        ),
    ),
    "torchao move to evaluation and back, batch norm": Target(
        *(_always(torchao_modes), EXACT, False, "there and back changes nothing"),
        exported_programs(
            max_layers=2,
            require={"batch_norm"},
            exclude={"dropout", "functional_dropout", "batch_statistics", "attention"},
        ),
        *(in_training, "torchao"),
        (("numerics", "Defect, known (ao#4107, ao#4758): eps becomes 1e-5 and momentum 0.1."),),
    ),
}
