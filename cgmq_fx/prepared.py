"""The graph module that `prepare` returns."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode

from cgmq_fx.account import account, account_again
from cgmq_fx.accounting import Accounting
from cgmq_fx.compiled_call import compiler_of_calls, settle
from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.explain_budget import check_feasible
from cgmq_fx.input_shapes import describe
from cgmq_fx.passes.fuse_rectifiers import FuseRectifiers
from cgmq_fx.passes.insert_quantizers import QUANTIZERS
from cgmq_fx.passes.trace import adopt
from cgmq_fx.passes.values import map_tensors
from cgmq_fx.plan import Plan, Settings
from cgmq_fx.quantize_graph import account_otherwise
from cgmq_fx.quantizers import QuantizerSet
from cgmq_fx.unit_bits import counts_of

#: Name of the submodule that holds the plan.
PLAN = "plan"


class PreparedModule(fx.GraphModule):
    """A traced model with quantizers of learnable bit-width, under a budget.

    It trains like the model it was made from. Where `prepare` was not told shapes, the first batch
    tells them, and an infeasible budget is refused then.
    """

    plan: Plan
    quantizers: QuantizerSet
    #: What the Trainer of transformers asks: a graph takes none of the arguments of a loss.
    accepts_loss_kwargs = False

    def __init__(
        self, root: nn.Module, graph: fx.Graph, class_name: str = "PreparedModule"
    ) -> None:
        super().__init__(root, graph, class_name)
        adopt(self, root)
        plan = self._modules.get(PLAN)
        if not isinstance(plan, Plan) or not plan.is_priced:
            self._first_batch = self.register_forward_pre_hook(
                _price_on_first_batch, with_kwargs=True
            )

    def _deepcopy_init(self) -> Callable[..., None]:
        return PreparedModule.__init__

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph; where it runs compiled, after what quantizers have to see was shown."""
        if compiler_of_calls():
            settle(self, self._modules.get(QUANTIZERS), super().__call__, args, kwargs)
        return super().__call__(*args, **kwargs)

    def recompile(self) -> PythonCode:
        """Make the forward from the graph, with neighbours fused that one kernel can do together.

        The graph itself stays as it is, for all who read it.
        """
        graph = self._graph
        self._graph = FuseRectifiers().fused(self, graph)
        is_fused = self._graph is not graph
        try:
            code = super().recompile()
        finally:
            self._graph = graph
        if is_fused:
            self._lineno_map: dict[int, int | None] = {}  # places in another graph than `graph`
        return code

    def price(self, inputs: Sequence[Any]) -> None:
        """Price the graph for the shapes of `inputs`, one value for each placeholder.

        Raises:
            BudgetError: the budget is infeasible.
            CostTableError: a cost table cannot price the graph.
            UnsupportedModelError: the inputs do not fit the graph.
        """
        settings = self.plan.settings
        accounting = self._account(one_sample(inputs, settings.batch_axis), inputs)
        check_feasible(accounting, settings, partial(self._account_otherwise, inputs))
        self.plan.accounting, self.plan.inputs = accounting, describe(inputs)
        self.take_allowed_widths()

    def take_allowed_widths(self) -> None:
        """Give every quantizer whose bit-width no cost table has the widest one that they have."""
        for site in self.plan.accounting.sites:
            quantizer = self.quantizers[site.name]
            if site.learned and not set(counts_of(quantizer.bit_width)) <= set(site.allowed):
                quantizer.set_bit_width(site.allowed[-1])

    def _account(self, sample: Sequence[Any], inputs: Sequence[Any]) -> Any:
        settings = self.plan.settings
        try:
            return account(self, sample, settings.tables, settings.limits)
        except UnsupportedModelError:
            if settings.batch_axis is None:
                raise
            # A model that needs its whole batch (it reshapes by a constant) is priced for it.
            return account(self, inputs, settings.tables, settings.limits)

    def _account_otherwise(self, inputs: Sequence[Any], settings: Settings) -> Accounting:
        """Return what the accounting would be with other settings; nothing changes here."""
        own = self.plan.settings
        if replace(settings, tables=own.tables) == own:  # other prices for the same quantizers
            return account_again(self, settings.tables, settings.limits)
        return account_otherwise(self, settings, one_sample(inputs, settings.batch_axis))

    @property
    def bit_widths(self) -> dict[str, int]:
        """The current bit-width of every quantizer, by site."""
        return {name: quantizer.bit_width for name, quantizer in self.quantizers.items()}

    def set_bit_widths(self, bits: Sequence[int]) -> None:
        """Give every quantizer its bit-width, in the order of `bit_widths`.

        Raises:
            UsageError: a quantizer may not have its bit-width.
        """
        for quantizer, width in zip(self.quantizers.values(), bits, strict=True):
            if quantizer.bit_width != width:
                quantizer.set_bit_width(width)


def one_sample(inputs: Sequence[Any], batch_axis: int | None) -> tuple[Any, ...]:
    """Return `inputs` with the batch axis of every tensor that has one cut to one sample.

    The batch is the extent of the first tensor's `batch_axis`; tensors of another extent are kept,
    and so are those in lists, where each is often a sample.
    """
    tensors: list[torch.Tensor] = []
    map_tensors(tensors.append, inputs)
    tensors = [tensor for tensor in tensors if tensor.dim() > 0]
    if batch_axis is None or not tensors:
        return tuple(inputs)
    batch = tensors[0].shape[batch_axis]

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() > batch_axis and tensor.shape[batch_axis] == batch:
            return tensor.narrow(batch_axis, 0, min(1, batch))
        return tensor

    return map_tensors(cut, inputs)


def bind_inputs(graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return one value for each placeholder, from the arguments of a call.

    Raises:
        UnsupportedModelError: an argument is missing or has no placeholder.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    parameters: list[inspect.Parameter] = []
    for node in placeholders:
        parameters.append(_parameter(node, after=parameters))
    try:
        bound = inspect.Signature(parameters).bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedModelError(
            f"the model takes the inputs {[str(node.target) for node in placeholders]}: {error}; "
            f"call it as the float model is called"
        ) from error
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def _parameter(node: fx.Node, after: Sequence[inspect.Parameter]) -> inspect.Parameter:
    name = str(node.target)
    bare = name.lstrip("*")
    if name.startswith("**"):
        return inspect.Parameter(bare, inspect.Parameter.VAR_KEYWORD)
    if name.startswith("*"):
        return inspect.Parameter(bare, inspect.Parameter.VAR_POSITIONAL)
    starred = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in after)
    return inspect.Parameter(
        bare,
        inspect.Parameter.KEYWORD_ONLY if starred else inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=node.args[0] if node.args else inspect.Parameter.empty,
    )


def _price_on_first_batch(module: PreparedModule, args: Any, kwargs: Any) -> None:
    if not module.plan.is_priced:
        module.price(bind_inputs(module.graph, args, kwargs))
    module._first_batch.remove()


def is_prepared(model: nn.Module) -> bool:
    """Tell whether `model` was made by `prepare`."""
    return isinstance(model, PreparedModule) or isinstance(
        getattr(model, QUANTIZERS, None), QuantizerSet
    )
