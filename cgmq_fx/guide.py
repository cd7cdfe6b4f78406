"""`attach`: the one line that puts an existing training loop under a budget."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from cgmq_fx.directions import direction_named
from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.fake_quantize import PROBE_SCALE
from cgmq_fx.prepared import PreparedModule

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
) -> "Guide":
    """Guide the training of `prepared` to its budgets, from the next step of `optimizer` on.

    Args:
        prepared: what `prepare` returned.
        optimizer: an optimizer over the parameters of `prepared`.
        direction: the rule that moves the gates: ``fisher``, or ``dir_1``, ``dir_2``, ``dir_3``.
        total_steps: optimizer steps of the whole run, where known: the bit-widths then take a fifth
            of it to fall, and the weights the rest to adapt. Otherwise they fall in 400 steps.

    Raises:
        UsageError: `prepared` is not a prepared model, the optimizer does not train it or is guided
            already, or another argument makes no sense.
    """
    check_prepared(prepared, "attach")
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
    if any(_guides(hook, prepared) for hook in optimizer._optimizer_step_pre_hooks.values()):
        raise UsageError(
            f"{type(optimizer).__name__} is guided for this prepared model already; attach once, "
            f"or call detach() on the guide of before"
        )
    return Guide(prepared, optimizer, direction, total_steps)


def check_prepared(prepared: object, caller: str) -> None:
    """Refuse what `prepare` did not return.

    Raises:
        UsageError: it is something else; the message names `caller`.
    """
    if not isinstance(prepared, PreparedModule):
        raise UsageError(
            f"{caller} got {type(prepared).__name__}, which prepare did not return; call "
            f"prepared = cgmq_fx.prepare(model, budget) and {caller}(prepared, ...)"
        )


def _guides(hook: object, prepared: PreparedModule) -> bool:
    guide = getattr(hook, "__self__", None)
    return isinstance(guide, Guide) and guide.prepared is prepared


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
    ) -> None:
        self.prepared = prepared
        self._direction = direction_named(direction)
        self._settles = direction == "fisher"
        descent = _DESCENT_STEPS if total_steps is None else round(total_steps * _DESCENT_SHARE)
        checks = min(_CHECKS, max(1, descent))
        self._every = max(1, descent // checks)
        self._descent = self._every * checks
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

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the gradients' statistics; with a closure, whenever that has computed gradients."""
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._followed(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first is the optimizer
            return (args[0], self._followed(args[1]), *args[2:]), kwargs
        self._take_statistics()
        return None

    def _followed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def evaluate() -> Any:
            loss = closure()
            self._take_statistics()
            return loss

        return evaluate

    def _take_statistics(self) -> None:
        """Clear the probes, so that no optimizer moves them, and keep what they say."""
        plan, quantizers = self.prepared.plan, self.prepared.quantizers.values()
        probes = [quantizer.probe for quantizer in quantizers]
        gradients = [
            torch.zeros_like(probe) if probe.grad is None else probe.grad for probe in probes
        ]
        for probe in probes:
            probe.grad = None
        if not gradients:
            return
        now = torch.stack(gradients).to(plan.statistics) / PROBE_SCALE
        if not bool(torch.isfinite(now).all()):
            self._refuse(now)
        if int(plan.steps) == 0:
            plan.statistics.copy_(now)
        else:
            plan.statistics.lerp_(now, _MEMORY)

    def _refuse(self, statistics: torch.Tensor) -> None:
        names = list(self.prepared.quantizers)
        wrong = [names[int(i)] for i in (~torch.isfinite(statistics).all(1)).nonzero().flatten()]
        listed = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise TrainingError(
            f"step {int(self.prepared.plan.steps)}: the gradients at {len(wrong)} of {len(names)} "
            f"quantizers are not finite ({listed}); the optimizer has not stepped, so weights and "
            f"bit-widths are as before. Check the loss and the inputs for NaN, lower the learning "
            f"rate, or clip gradients; cgmq_fx.lower still works on the present state"
        )

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        plan = self.prepared.plan
        plan.steps += 1
        steps = int(plan.steps)
        if steps % self._every or not plan.is_priced:
            return
        progress = steps / self._descent
        # At twice the descent it solves once more, with what was learned of the narrow widths.
        is_settled = self._settles and progress > 1 and steps != 2 * self._descent
        if not (is_settled and self.is_satisfied):
            self._direction.update(self.prepared, min(1.0, progress))
