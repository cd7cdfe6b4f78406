"""A callback that lets Hugging Face's `Trainer` train a prepared model to its budget."""

from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from cgmq_fx.carried_state import carried_state, check_guide, restore_carried
from cgmq_fx.checkpoint_file import read_checkpoint, write_checkpoint
from cgmq_fx.errors import UsageError
from cgmq_fx.guide import Guide, attach, check_prepared
from cgmq_fx.integrations.figures import figures
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise UsageError(
        f"cgmq_fx.integrations.transformers needs the package {error.name!r}; install it with "
        f"pip install 'cgmq-fx[transformers]'"
    ) from error

FILE = "cgmq_fx.ckpt"
"""The name of the file that is added to each checkpoint folder of the trainer."""


class QuantizationCallback(TrainerCallback):
    """Guides the trainer's optimizer, and lowers the model at the end.

    The trainer gets what `prepare` returned: ``Trainer(model=prepared, args=..., callbacks=[
    QuantizationCallback()])``. Its checkpoints carry what the guide and the quantizers know, so
    that ``trainer.train(resume_from_checkpoint=...)`` goes on; one of another budget is refused by
    name. Costs as shares of their budgets, and bit-widths, go to the logs as ``cgmq/...``.

    Args:
        direction: as for `attach`.
        resume_from: the checkpoint folder given to ``trainer.train``, where it is not one of the
            run's own output folder.
        lower_at_end: whether ``fixed`` is made when training ends.
        log_bit_widths: whether each bit-width is logged, beside the costs.

    Attributes:
        fixed: the lowered module, once training has ended.
    """

    def __init__(
        self,
        *,
        direction: str = "fisher",
        resume_from: str | Path | None = None,
        lower_at_end: bool = True,
        log_bit_widths: bool = True,
    ) -> None:
        self.direction, self.lower_at_end = direction, lower_at_end
        self.resume_from = resume_from
        self.log_bit_widths = log_bit_widths
        self.fixed: LoweredModule | None = None
        self._guide: Guide | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any
    ) -> None:
        """Attach the guide; where the trainer resumed, take up what it knew."""
        prepared = check_prepared(model, "QuantizationCallback")
        optimizer = rest["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        assert isinstance(inner, Optimizer)
        self._guide = attach(prepared, inner, direction=self.direction, total_steps=state.max_steps)
        if state.global_step:
            folder = self.resume_from or _folder(args, state)
            file = Path(folder) / FILE
            if not file.exists():
                raise UsageError(
                    f"the trainer resumed at step {state.global_step}, and {str(file)!r} is not "
                    f"there; give QuantizationCallback(resume_from=...) the folder of the "
                    f"checkpoint, which has to be one that was saved with this callback"
                )
            saved = read_checkpoint(file)
            check_guide(str(file), self._guide, saved["guide"])
            restore_carried(str(file), prepared, saved)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """Add to the trainer's checkpoint what the state dict of the model does not hold."""
        if state.is_world_process_zero:
            prepared = check_prepared(model, "QuantizationCallback")
            write_checkpoint(_folder(args, state) / FILE, carried_state(prepared, self._guide))

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **rest: Any,
    ) -> None:
        """Add costs and bit-widths to what is logged."""
        prepared = check_prepared(model, "QuantizationCallback")
        shown = figures(prepared, bit_widths=self.log_bit_widths)
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None:
                record.update(shown)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any
    ) -> None:
        """Leave the optimizer alone, and lower."""
        if self._guide is not None:
            self._guide.detach()
        if self.lower_at_end:
            self.fixed = lower(model)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
