"""The graph module that `lower` returns."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import fx, nn

from cgmq_fx.errors import UsageError
from cgmq_fx.frozen import FrozenModule
from cgmq_fx.gates import FLOAT_WIDTH
from cgmq_fx.integer_products import Kernels
from cgmq_fx.integer_reference import AccumulatorRecorder, IntegerInterpreter
from cgmq_fx.plan import Plan
from cgmq_fx.prepared import PLAN


class LoweredModule(fx.GraphModule):
    """A network of fixed bit-widths, within every budget of its plan.

    It is always in evaluation mode. Its state holds what inference reads and the plan, nothing
    else. It copies, moves between devices and saves its state dict like any module; its numbers are
    fixed, so that it refuses other floating-point types.

    Attributes:
        plan: budgets, cost tables and the accounting that the bit-widths were chosen by.
    """

    plan: Plan

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "LoweredModule") -> None:
        super().__init__(root, graph, class_name)
        for node in graph.nodes:
            if node.op == "get_attr":
                self._keep_persistence(root, str(node.target))
        plan = root.get_submodule(PLAN)
        assert isinstance(plan, Plan)
        self.plan = plan
        self.train(False)

    def _keep_persistence(self, root: nn.Module, target: str) -> None:
        path, _, name = target.rpartition(".")
        if name in root.get_submodule(path)._non_persistent_buffers_set:
            self.get_submodule(path)._non_persistent_buffers_set.add(name)

    def _deepcopy_init(self) -> Callable[..., None]:
        return partial(_copy_init, type(self).__name__)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever `mode` is: nothing here can be trained."""
        return super().train(False)

    @property
    def bit_widths(self) -> dict[str, int]:
        """The bit-width of every site, read off the modules of the graph; 32 where it has none."""
        widths = dict.fromkeys(self.plan.accounting.site_names, FLOAT_WIDTH)
        found: dict[str, int] = {}
        for module in self.modules():
            if isinstance(module, FrozenModule):
                found[module.site] = max(module.bit_width, found.get(module.site, 0))
        return widths | found

    def integer_reference(
        self,
        *args: Any,
        kernels: Kernels = "int64",
        accumulators: bool = False,
        integer_bias: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return what the module returns, with its products computed on integer codes, exactly.

        An operation whose two factors have codes (convolutions, linear layers, matrix products,
        both products of attention, those of recurrent layers) sums products of integers. What
        follows the sum is computed in float64 and rounded once; what has no codes is computed as
        the module does. ``docs/integer-reference.md`` says how far the two can be apart.

        Args:
            args: of the call, as of the module itself; by position those that are called as an
                option here is.
            kernels: ``int64``: integer arithmetic, on the CPU. ``float``: the same integers in
                float32 where no partial sum can pass 2**24, else in float64; faster, on any device.
                Both give the same numbers, bit for bit.
            accumulators: return them too.
            integer_bias: add biases as integers on the grid of the sums, as integer-only runtimes
                do; a result moves by half a unit of that grid at most.
            kwargs: of the call.

        Returns:
            The outputs. With `accumulators`: a pair of these and, by the name of the operation in
            the report, the int64 sums before bias and scale. What an operation computes in several
            steps, as a recurrent layer does, is stacked along a new first axis.
        """
        given = inspect.signature(self.forward).bind(*args, **kwargs)
        given.apply_defaults()
        kind = AccumulatorRecorder if accumulators else IntegerInterpreter
        run = kind(self, kernels, integer_bias=integer_bias)
        with torch.no_grad():
            outputs = run.run(*given.args)
        return (outputs, run.accumulators) if isinstance(run, AccumulatorRecorder) else outputs

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        fixed = {
            tensor.dtype
            for name, tensor in (*self.named_parameters(), *self.named_buffers())
            if tensor.is_floating_point() and not name.startswith(f"{PLAN}.")
        }
        for dtype in sorted(fixed, key=str):
            wanted = fn(torch.empty(0, dtype=dtype)).dtype
            if wanted != dtype:
                raise UsageError(
                    f"{type(self).__name__} is lowered and has numbers of type {dtype}, which "
                    f"cannot become {wanted}: scales and codes are fixed together; convert the "
                    f"float model before cgmq_fx.prepare, or move this one with .to(device)"
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _copy_init(class_name: str, copied: LoweredModule, root: nn.Module, graph: fx.Graph) -> None:
    LoweredModule.__init__(copied, root, graph, class_name)
