"""The graph module that `prepare` returns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from cgmq_fx.account import account, account_again
from cgmq_fx.accounting import Accounting
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.explain_budget import check_feasible
from cgmq_fx.passes.insert_quantizers import QUANTIZERS
from cgmq_fx.plan import Plan
from cgmq_fx.quantizer_spec import QuantizerSpec
from cgmq_fx.quantizers import QuantizerSet

#: Name of the submodule that holds the plan.
PLAN = "plan"


class PreparedModule(fx.GraphModule):
    """A traced model with quantizers of learnable bit-width, under a budget.

    It trains like the model it was made from. Where `prepare` was not told shapes, the first batch
    tells them, and an infeasible budget is refused then.
    """

    plan: Plan
    quantizers: QuantizerSet

    def __init__(
        self, root: nn.Module, graph: fx.Graph, class_name: str = "PreparedModule"
    ) -> None:
        super().__init__(root, graph, class_name)
        for kind in ("_modules", "_parameters", "_buffers"):
            getattr(self, kind).update(getattr(root, kind))
        self._non_persistent_buffers_set |= root._non_persistent_buffers_set
        plan = self._modules.get(PLAN)
        if not isinstance(plan, Plan) or not plan.is_priced:
            self._first_batch = self.register_forward_pre_hook(
                _price_on_first_batch, with_kwargs=True
            )

    def _deepcopy_init(self) -> Callable[..., None]:
        return PreparedModule.__init__

    def price(self, inputs: Sequence[Any]) -> None:
        """Price the graph for the shapes of `inputs`, one value for each placeholder.

        Raises:
            BudgetError: the budget is infeasible.
            CostTableError: a cost table cannot price the graph.
            UnsupportedModelError: the inputs do not fit the graph.
        """
        settings = self.plan.settings
        accounting = self._account(one_sample(inputs, settings.batch_axis), inputs)
        check_feasible(accounting, settings, self._account_again)
        for site in accounting.sites:
            quantizer = self.quantizers[site.name]
            if site.learned and quantizer.bit_width not in site.allowed:
                quantizer.set_bit_width(site.allowed[-1])
        self.plan.accounting = accounting

    def _account(self, sample: Sequence[Any], inputs: Sequence[Any]) -> Any:
        settings = self.plan.settings
        try:
            return account(self, sample, settings.tables, settings.limits)
        except UnsupportedModelError:
            if settings.batch_axis is None:
                raise
            # A model that needs its whole batch (it reshapes by a constant) is priced for it.
            return account(self, inputs, settings.tables, settings.limits)

    def _account_again(
        self, tables: Mapping[str, CostTable], respec: Callable[[QuantizerSpec], QuantizerSpec]
    ) -> Accounting:
        return account_again(self, tables, self.plan.settings.limits, respec)

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

    The batch is the extent of the first tensor's `batch_axis`; tensors of another extent are kept.
    """
    tensors = [value for value in inputs if isinstance(value, torch.Tensor) and value.dim() > 0]
    if batch_axis is None or not tensors:
        return tuple(inputs)
    batch = tensors[0].shape[batch_axis]

    def cut(value: Any) -> Any:
        if (
            isinstance(value, torch.Tensor)
            and value.dim() > batch_axis
            and value.shape[batch_axis] == batch
        ):
            return value.narrow(batch_axis, 0, min(1, batch))
        return value

    return tuple(cut(value) for value in inputs)


def bind_inputs(graph: fx.Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return one value for each placeholder, from the arguments of a call.

    Raises:
        UnsupportedModelError: an argument is missing or has no placeholder.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [str(node.target).lstrip("*") for node in placeholders]
    unknown = sorted(set(kwargs) - set(names))
    if len(args) > len(names) or unknown:
        raise UnsupportedModelError(
            f"the model takes the inputs {names}, but was given {len(args)} positional and "
            f"{unknown or 'no'} unknown keyword inputs; call it as the float model is called"
        )
    values = []
    for position, (node, name) in enumerate(zip(placeholders, names, strict=True)):
        if position < len(args):
            values.append(args[position])
        elif name in kwargs:
            values.append(kwargs[name])
        elif node.args:
            values.append(node.args[0])
        else:
            raise UnsupportedModelError(
                f"the model takes the inputs {names}, and '{name}' is missing; give a value for it"
            )
    return tuple(values)


def _price_on_first_batch(module: PreparedModule, args: Any, kwargs: Any) -> None:
    if not module.plan.is_priced:
        module.price(bind_inputs(module.graph, args, kwargs))
    module._first_batch.remove()


def is_prepared(model: nn.Module) -> bool:
    """Tell whether `model` was made by `prepare`."""
    return isinstance(model, PreparedModule) or isinstance(
        getattr(model, QUANTIZERS, None), QuantizerSet
    )
