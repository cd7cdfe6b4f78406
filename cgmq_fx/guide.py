"""`attach`: the one line that puts an existing training loop under a budget."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cgmq_fx.directions import GATE_DIRECTIONS, direction_named
from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.fake_quantize import PROBE_SCALE
from cgmq_fx.passes.freeze_bit_widths import settle_ranges
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.ranks import Ranks, is_sharded, stacked
from cgmq_fx.step_statistics import FiniteWatch, HostCount
from cgmq_fx.undecayed import Undecayed
from cgmq_fx.wrapped import check_sharding, is_model_sharded, unwrapped

# The descent takes this part of a run whose length is known, else this many steps.
_DESCENT_SHARE, _DESCENT_STEPS = 0.2, 400
_CHECKS = 10
# Weight of a new step in the running means of the gradients' statistics.
_MEMORY = 0.02


def attach(
    prepared: PreparedModule,
    optimizer: Optimizer,
    *,
    direction: str = "fisher",
    total_steps: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> "Guide":
    """Guide the training of `prepared` to its budgets, from the next step of `optimizer` on.

    In a distributed run every rank calls it, and all have the same bit-widths at every step. Ranges
    are not decayed, whatever the optimizer's groups say. Of several optimizers give it one; that
    steps once for each pass through the loop.

    Args:
        prepared: what `prepare` returned, or `DistributedDataParallel` or `torch.compile` of it.
        optimizer: an optimizer over the parameters of `prepared`.
        direction: the rule that moves the gates: ``fisher``, or ``dir_1``, ``dir_2``, ``dir_3``.
        total_steps: optimizer steps of the whole run, where known: the bit-widths then take a fifth
            of it to fall, and the weights the rest to adapt. Otherwise they fall in 400 steps.
        process_group: the ranks that train this model together; by default all ranks of
            `torch.distributed`, where it is initialized.

    Raises:
        UsageError: `prepared` is not a prepared model, the optimizer does not train it or is guided
            already, or another argument makes no sense.
    """
    prepared = check_prepared(prepared, "attach")
    check_sharding(prepared, "attach")
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"attach got the optimizer {type(optimizer).__name__}; give a torch.optim.Optimizer "
            f"over prepared.parameters()"
        )
    if total_steps is not None and total_steps < 1:
        raise UsageError(f"total_steps={total_steps} must be at least 1, or None where unknown")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(parameter) in trained for parameter in prepared.parameters()):
        raise UsageError(
            "the optimizer holds none of the prepared model's parameters: prepare works on a copy "
            "of the model; make the optimizer from prepared.parameters()"
        )
    if guide_of(prepared, optimizer) is not None:
        raise UsageError(
            f"{type(optimizer).__name__} is guided for this prepared model already; attach once, "
            f"or call detach() on the guide of before"
        )
    _check_granularity(prepared, direction)
    return Guide(prepared, optimizer, direction, total_steps, Ranks(process_group))


def _check_granularity(prepared: PreparedModule, direction: str) -> None:
    several = [name for name, item in prepared.quantizers.items() if item.spec.unit_shape]
    if several and is_model_sharded(prepared):
        raise UsageError(
            f"the weights {several[:5]} have several gates, and after fully_shard no rank has all "
            f"of them; use DistributedDataParallel, or prepare with granularity='layer'"
        )
    if several and direction in GATE_DIRECTIONS:
        raise UsageError(
            f"direction={direction!r} moves one gate of a tensor, and the weights {several[:5]} "
            f"have several; leave the direction out, or prepare with granularity='layer'"
        )


def check_prepared(prepared: object, caller: str) -> PreparedModule:
    """Return what `prepare` returned, out of the wrappers of training.

    Raises:
        UsageError: it is something else; the message names `caller`.
    """
    inner = unwrapped(prepared)
    if not isinstance(inner, PreparedModule):
        raise UsageError(
            f"{caller} got {type(prepared).__name__}, which prepare did not return; call "
            f"prepared = cgmq_fx.prepare(model, budget) and {caller}(prepared, ...)"
        )
    return inner


def guide_of(prepared: PreparedModule, optimizer: Optimizer) -> "Guide | None":
    """Return the guide that was attached for `prepared` and this optimizer, or None."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        guide = getattr(hook, "__self__", None)
        if isinstance(guide, Guide) and guide.prepared is prepared:
            return guide
    return None


class Guide:
    """Moves the bit-widths of a prepared model while an optimizer trains it.

    Before each step it takes the statistics of the gradients and refuses ones that are not finite,
    so that nothing is lost; after each step it checks, at fixed points of the run, the budgets
    exactly and moves the gates.
    """

    def __init__(
        self,
        prepared: PreparedModule,
        optimizer: Optimizer,
        direction: str = "fisher",
        total_steps: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.prepared = prepared
        self._ranks = Ranks() if ranks is None else ranks
        self._undecayed = Undecayed()
        self._is_compiled = False
        self._direction = direction_named(direction)
        self._settles = direction == "fisher"
        descent = _DESCENT_STEPS if total_steps is None else round(total_steps * _DESCENT_SHARE)
        checks = min(_CHECKS, max(1, descent))
        self._every = max(1, descent // checks)
        self._descent = self._every * checks
        #: What decides its course, with the plan of the prepared model; plain data.
        self.settings: dict[str, str | int | None] = {
            "direction": direction,
            "total_steps": total_steps,
            "every": self._every,
            "descent": self._descent,
        }
        self._watch, self._steps = FiniteWatch(), HostCount()
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def is_satisfied(self) -> bool:
        """Whether the present bit-widths meet every budget; False while shapes are not known."""
        bits = list(self.prepared.bit_widths.values())
        return self.prepared.plan.is_priced and self.prepared.plan.accounting.is_satisfied(bits)

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._undecayed.put_back()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the gradients' statistics; with a closure, whenever that has computed gradients."""
        ranges = (quantizer.multiplier for quantizer in self.prepared.quantizers.values())
        if callable(kwargs.get("closure")):
            self._undecayed.take_out(optimizer, ranges)
            return args, {**kwargs, "closure": self._followed(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer
            self._undecayed.take_out(optimizer, ranges)
            return (args[0], self._followed(args[1]), *args[2:]), kwargs
        self._follow_gradients()
        self._undecayed.take_out(optimizer, ranges)
        return None

    def _followed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            try:
                loss = closure()
                self._follow_gradients()
            except BaseException:
                self._undecayed.put_back()
                raise
            return loss

        return evaluate

    def _follow_gradients(self) -> None:
        self._take_statistics()
        self._share_ranges()

    def _share_ranges(self) -> None:
        """Make ranges and samples those of all ranks, where they were found and before a check.

        That is in the two steps after a check: a quantizer that several tensors share needs both.
        """
        steps = self._steps.of(self.prepared.plan.steps)
        if steps == 0:
            self._ranks.check_same("the guide's settings", self.settings)
        place = steps % self._every
        is_near = place < 2 or place == self._every - 1
        if self._ranks.size > 1 or any(map(is_sharded, self.prepared.quantizers.probes()[:1])):
            self._share_news(pools=is_near)
        if is_near:
            self._catch_up_compiled()

    def _share_news(self, *, pools: bool) -> None:
        quantizers = self.prepared.quantizers.values()
        for quantizer in quantizers:
            if quantizer.has_news and is_sharded(quantizer.multiplier):
                quantizer.reset_multiplier()  # the forward did that to the gathered copy alone
        if pools:
            self._ranks.pool(quantizers)
        for quantizer in quantizers:
            quantizer.has_news = False

    def _catch_up_compiled(self) -> None:
        """Fit ranges that a forward should have fitted, which compiled code does not."""
        pending = [item for item in self.prepared.quantizers.values() if item.is_behind]
        if pending:
            self._is_compiled = True
            settle_ranges(self.prepared)

    def _take_statistics(self) -> None:
        """Clear the probes, so that no optimizer moves them, and keep what they say."""
        plan, probes = self.prepared.plan, self.prepared.quantizers.probes()
        if not probes:
            return
        zero = torch.zeros_like(probes[0])
        gradients = [zero if (grad := probe.grad) is None else grad for probe in probes]
        for probe in probes:
            probe.grad = None
        now = stacked(gradients).detach().to(plan.statistics) / PROBE_SCALE
        wrong = self._watch.not_finite(now)
        if wrong is not None:
            self._refuse(wrong)
        if now.device.type != "cpu":  # what is wrong is known later: keep what was right till then
            now = torch.where(now.isfinite().all(), now, plan.statistics)
        if self._steps.of(plan.steps) == 0:
            plan.statistics.copy_(now)
        else:
            plan.statistics.lerp_(now, _MEMORY)

    def _refuse(self, statistics: torch.Tensor) -> None:
        names = list(self.prepared.quantizers)
        wrong = [names[int(i)] for i in (~torch.isfinite(statistics).all(1)).nonzero().flatten()]
        listed = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        is_now = self.prepared.plan.statistics.device.type == "cpu"
        state = (
            "the optimizer has not stepped, so weights and bit-widths are as before"
            if is_now
            else "on an accelerator that is known a step later, so that weights may have taken "
            "them in; go back to a checkpoint"
        )
        raise TrainingError(
            f"step {int(self.prepared.plan.steps)}: the gradients at {len(wrong)} of {len(names)} "
            f"quantizers are not finite ({listed}); {state}. Check the loss and the inputs for "
            f"NaN, lower the learning rate, or clip gradients; cgmq_fx.lower still works on the "
            f"present state"
        )

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._undecayed.put_back()
        plan = self.prepared.plan
        steps = self._steps.add_one(plan.steps)
        if steps % self._every or not plan.is_priced:
            return
        progress = steps / self._descent
        # At twice the descent it solves once more, with what was learned of the narrow widths.
        is_settled = self._settles and progress > 1 and steps != 2 * self._descent
        if not (is_settled and self.is_satisfied):
            self._direction.update(self.prepared, min(1.0, progress))
            if self._is_compiled:
                settle_ranges(self.prepared)
