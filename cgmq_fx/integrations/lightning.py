"""A callback that trains a part of a `LightningModule` to a budget."""

from typing import Any

from torch import nn

from cgmq_fx.carried_state import carried_state, check_guide, restore_carried
from cgmq_fx.errors import UsageError
from cgmq_fx.guide import Guide, attach, check_prepared
from cgmq_fx.integrations.figures import figures
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule

try:
    import lightning
except ModuleNotFoundError as error:
    raise UsageError(
        f"cgmq_fx.integrations.lightning needs the package {error.name!r}; install it with "
        f"pip install 'cgmq-fx[lightning]'"
    ) from error

_KEY = "cgmq_fx"


class QuantizationCallback(lightning.Callback):
    """Prepares a network before training, guides its optimizer, and lowers it at the end.

    Checkpoints of the trainer carry what the guide and the quantizers know, so that
    ``trainer.fit(..., ckpt_path=...)`` goes on; one of another budget is refused by name. Costs as
    shares of their budgets, and bit-widths, are logged each epoch as ``cgmq/...``.

    Args:
        budget: as for `prepare`; None where the attribute holds a prepared model already.
        attribute: the name of the network in the `LightningModule`.
        direction: as for `attach`.
        optimizer: which of several optimizers is guided: one that steps once for each batch.
        lower_at_end: whether ``fixed`` is made when training ends.
        log_bit_widths: whether each bit-width is logged, beside the costs.
        **options: further arguments of `prepare`, such as ``example_inputs``.

    Attributes:
        prepared: the prepared network, once training or evaluation was set up.
        fixed: the lowered module, once training has ended.
    """

    def __init__(
        self,
        budget: Any = None,
        *,
        attribute: str = "model",
        direction: str = "fisher",
        optimizer: int = 0,
        lower_at_end: bool = True,
        log_bit_widths: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.budget, self.attribute, self.options = budget, attribute, options
        self.direction, self.optimizer, self.lower_at_end = direction, optimizer, lower_at_end
        self.prepared: PreparedModule | None = None
        self.log_bit_widths = log_bit_widths
        self.fixed: LoweredModule | None = None
        self._guide: Guide | None = None
        self._saved_guide: dict[str, Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the prepared network in the place of the float one."""
        network = getattr(pl_module, self.attribute, None)
        if not isinstance(network, nn.Module):
            raise UsageError(
                f"{type(pl_module).__name__} has no network {self.attribute!r}, it is "
                f"{type(network).__name__}; name it with QuantizationCallback(attribute=...)"
            )
        if not isinstance(network, PreparedModule):
            if self.budget is None:
                raise UsageError(
                    f"{type(pl_module).__name__}.{self.attribute} is a float model; give "
                    f"QuantizationCallback(budget=...), or prepare it before"
                )
            network = prepare(network, self.budget, **self.options)
            setattr(pl_module, self.attribute, network)
        self.prepared = network

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the guide, once the optimizers are there."""
        optimizers = trainer.optimizers
        if not 0 <= self.optimizer < len(optimizers):
            raise UsageError(
                f"QuantizationCallback(optimizer={self.optimizer}): {type(pl_module).__name__} "
                f"configures {len(optimizers)} optimizer(s), counted from 0"
            )
        steps = trainer.estimated_stepping_batches
        total = int(steps) if 0 < steps < float("inf") else None
        prepared = check_prepared(self.prepared, "QuantizationCallback")
        self._guide = attach(
            prepared, optimizers[self.optimizer], direction=self.direction, total_steps=total
        )
        check_guide("the checkpoint", self._guide, self._saved_guide)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log costs and bit-widths."""
        prepared = check_prepared(self.prepared, "QuantizationCallback")
        pl_module.log_dict(figures(prepared, bit_widths=self.log_bit_widths))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the optimizer alone, and lower."""
        if self._guide is not None:
            self._guide.detach()
        if self.lower_at_end:
            self.fixed = lower(check_prepared(self.prepared, "QuantizationCallback"))

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what the state dict of the module does not hold."""
        prepared = check_prepared(self.prepared, "QuantizationCallback")
        checkpoint[_KEY] = carried_state(prepared, self._guide)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        if _KEY not in checkpoint:
            raise UsageError(
                "the checkpoint was saved without QuantizationCallback, so that it does not hold "
                "what the guide knows; train from the start, or load its state dict alone"
            )
        saved = checkpoint[_KEY]
        prepared = check_prepared(self.prepared, "QuantizationCallback")
        restore_carried("of the trainer", prepared, saved)
        self._saved_guide = saved["guide"]
