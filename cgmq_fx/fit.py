"""`fit`: guided training without a loop of one's own."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from cgmq_fx.checkpoint import training_run
from cgmq_fx.checkpoint_file import Place
from cgmq_fx.epoch import Epoch
from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.fit_checkpoint import FitCheckpoint, Position, generators_of
from cgmq_fx.guide import attach, check_prepared
from cgmq_fx.identity import FIT
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.model_state import as_state_dict, plain_state_dict
from cgmq_fx.passes.freeze_bit_widths import settle_ranges
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.ranks import Ranks

Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[Any, Any], Tensor | float]


@dataclass(frozen=True)
class FitResult:
    """The result of `fit`.

    Attributes:
        fixed: the lowered module of the best epoch; within every budget.
        history: one record for each epoch.
        best_epoch: the epoch that `fixed` is of; None where none met the budgets and lowering did.
        interrupted: whether Ctrl-C ended the run.
    """

    fixed: LoweredModule
    history: tuple[Epoch, ...]
    best_epoch: int | None
    interrupted: bool


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Return for each sample whether the largest of its logits is its class's.

    Args:
        output: ``(samples, classes)``.
        target: ``(samples,)``, integer.
    """
    return (output.argmax(dim=-1) == target).float()


def fit(
    prepared: PreparedModule,
    train_loader: Iterable[Any],
    loss_fn: Loss,
    *,
    epochs: int,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    val_loader: Iterable[Any] | None = None,
    metric: Metric | None = None,
    direction: str = "fisher",
    patience: int | None = None,
    progress: bool = True,
    callback: Callable[[Epoch], None] | None = None,
    checkpoint: Place | None = None,
    every: int | None = None,
) -> FitResult:
    """Train `prepared` to its budgets and return the best epoch that met them, lowered.

    The best epoch is the one of the highest validation metric, or the last without a `val_loader`.
    Ctrl-C ends the run and keeps what was best. `prepared` is left in the state of the best epoch.

    Args:
        prepared: what `prepare` returned.
        train_loader: batches ``(*inputs, target)``, iterated once an epoch.
        loss_fn: ``loss_fn(output, target)``, a scalar.
        epochs: passes over the loader.
        optimizer: over the parameters of `prepared`; by default Adam at 1e-3, falling to 0 on a
            cosine, step by step where the loader knows its length.
        scheduler: a learning-rate scheduler of `optimizer`, stepped after each epoch;
            `ReduceLROnPlateau` with the mean training loss.
        val_loader: batches like the training ones, for the choice of the best epoch.
        metric: ``metric(output, target)``, higher is better, one number or one for each sample; by
            default minus the loss.
        direction: the rule that moves the gates, see `attach`.
        patience: stop after this many epochs that met the budgets without a better metric.
        progress: show a progress bar.
        callback: called with each epoch's record.
        checkpoint: a file that is written after each epoch, whole or not at all. Where it is there
            already, the run that it is of goes on, as if it had not stopped; then the other
            arguments are those of that run.
        every: write the checkpoint after so many steps too.

    Raises:
        BudgetError: the budgets are infeasible for the shapes of the first batch.
        TrainingError: the loss is not finite; `prepared` is in the best state that met the budgets,
            if there was one. Or the checkpoint cannot be written or read.
        UsageError: arguments make no sense, or the checkpoint is of another run.
    """
    _check_is_alone(prepared)
    _check_run(epochs, patience, train_loader, val_loader, checkpoint, every)
    batches = _length(train_loader)
    steps = None if batches is None else max(1, epochs * batches)
    schedules_steps = optimizer is None and steps is not None
    if optimizer is None:
        if scheduler is not None:
            raise UsageError(
                f"{type(scheduler).__name__} schedules an optimizer that fit was not given; give "
                f"optimizer= too, or neither"
            )
        learned = [p for p in prepared.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learned, lr=1e-3)
        scheduler = CosineAnnealingLR(optimizer, epochs if steps is None else steps)
    guide = attach(prepared, optimizer, direction=direction, total_steps=steps)
    run = _Run(prepared, optimizer, scheduler, loss_fn, metric, patience, callback)
    run.schedules_steps = schedules_steps
    was_training = prepared.training
    generators = generators_of(train_loader=train_loader, val_loader=val_loader)
    parts = training_run("fit", prepared, optimizer, scheduler, guide, generators)
    also = {f"{FIT}epochs": str(epochs), f"{FIT}batches in an epoch": str(batches)}
    keeper = FitCheckpoint(checkpoint, every, parts, also, run.state)
    try:
        run.resume(keeper)
        with _bar(progress) as bar:
            run.train(train_loader, val_loader, epochs, bar)
    except KeyboardInterrupt:
        run.interrupted = True
        if int(prepared.plan.steps) == 0:
            raise
    finally:
        guide.detach()
        run.restore_best()
        prepared.train(was_training)
    return FitResult(lower(prepared), tuple(run.history), run.best_epoch, run.interrupted)


def _check_is_alone(prepared: PreparedModule) -> None:
    ranks = Ranks().size
    if check_prepared(prepared, "fit") is not prepared or ranks > 1:
        raise UsageError(
            f"fit calls the prepared model itself, in one process; it got "
            f"{type(prepared).__name__} in a run of {ranks}. Under DistributedDataParallel, "
            f"fully_shard or torch.compile use a loop of your own with attach, or a trainer of "
            f"cgmq_fx.integrations"
        )


def _check_run(
    epochs: int,
    patience: int | None,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None,
    checkpoint: Place | None,
    every: int | None,
) -> None:
    faults = []
    if every is not None and (every < 1 or checkpoint is None):
        faults.append(
            f"every={every} must be at least 1 and goes with checkpoint=, the file to write"
        )
    if epochs < 1:
        faults.append(f"epochs={epochs} must be at least 1")
    if patience is not None and patience < 1:
        faults.append(f"patience={patience} must be at least 1, or None to run all epochs")
    loaders = {"train_loader": train_loader, "val_loader": val_loader}
    for name, loader in loaders.items():
        if isinstance(loader, Iterator) and epochs > 1:
            faults.append(
                f"{name} is the iterator {type(loader).__name__}, which is used up after one of "
                f"{epochs} epochs; give a DataLoader or a list of batches"
            )
    if faults:
        raise UsageError("fit: " + "; ".join(faults))


def _length(loader: Iterable[Any]) -> int | None:
    """Return the number of batches, where the loader knows it."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # also a DataLoader over a stream, which has a __len__ that raises
        return None


class _Run:
    """One call of `fit`: its loop, its records, and the best state so far."""

    def __init__(
        self,
        prepared: PreparedModule,
        optimizer: Optimizer,
        scheduler: Any,
        loss_fn: Loss,
        metric: Metric | None,
        patience: int | None,
        callback: Callable[[Epoch], None] | None,
    ) -> None:
        self.prepared = prepared
        self.optimizer, self.scheduler = optimizer, scheduler
        self.loss_fn, self.metric = loss_fn, metric
        self.patience, self.callback = patience, callback
        self.history: list[Epoch] = []
        self.best_epoch: int | None = None
        self.interrupted = False
        #: Whether the scheduler is stepped with the optimizer, and not after each epoch.
        self.schedules_steps = False
        self.position = Position()
        self._best_metric = -math.inf
        self._best_state: dict[str, Any] | None = None
        first = next(prepared.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device

    def resume(self, keeper: FitCheckpoint) -> None:
        """Take up the run of a checkpoint, if there is one; `keeper` goes on writing it."""
        self.keeper = keeper
        self.position, saved = keeper.resume()
        if saved is not None:
            self.history = [Epoch.from_plain(item) for item in saved["history"]]
            self.best_epoch, self._best_metric = saved["best_epoch"], saved["best_metric"]
            best = saved["best_state"]
            self._best_state = None if best is None else as_state_dict(best)

    def state(self) -> dict[str, Any]:
        """Return what `resume` needs besides the model and the optimizer, as plain data."""
        best = self._best_state
        return {
            "history": [epoch.to_plain() for epoch in self.history],
            "best_epoch": self.best_epoch,
            "best_metric": self._best_metric,
            "best_state": None if best is None else plain_state_dict(best),
        }

    def train(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        epochs: int,
        bar: Progress | None,
    ) -> None:
        """Run the epochs, or fewer where patience ends."""
        for number in range(self.position.epoch, epochs + 1):
            if self._is_patient_no_more():
                return
            self.position.epoch = number
            loss = self._train_epoch(train_loader, epochs, bar)
            metric = None if val_loader is None else self._validate(val_loader)
            self._record(number, loss, metric)
            if isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(loss)
            elif self.scheduler is not None and not self.schedules_steps:
                self.scheduler.step()
            self.position = Position(number + 1)
            self.keeper.write(self.position)

    def _train_epoch(self, loader: Iterable[Any], epochs: int, bar: Progress | None) -> float:
        self.prepared.train()
        at = self.position
        title = f"epoch {at.epoch}/{epochs}"
        total = _length(loader)
        task = None if bar is None else bar.add_task(title, total=total, completed=at.batches)
        for batch in self.keeper.batches(loader, at):
            at.loss += self._step(batch, at.epoch, at.batches)
            at.batches += 1
            self.keeper.after_step(at)
            if bar is not None and task is not None:
                status = self._status(at.loss / at.batches)
                bar.update(task, advance=1, description=f"{title}  {status}")
        if bar is not None and task is not None:
            bar.refresh()  # an epoch may be over before the bar draws itself
            bar.remove_task(task)
        if at.batches == 0:
            raise UsageError(
                f"train_loader gave no batch in epoch {at.epoch}; give a DataLoader or a list that "
                f"is not empty and can be iterated every epoch"
            )
        return at.loss / at.batches

    def _step(self, batch: Any, number: int, position: int) -> float:
        inputs, target = self._unpack(batch)
        self.optimizer.zero_grad()
        loss = self.loss_fn(self.prepared(*inputs), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = (
                f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            )
            raise UsageError(
                f"loss_fn returned {given}; it must return one number as a tensor, such as a mean"
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"epoch {number}, batch {position}: the loss is {value}; the optimizer has not "
                f"stepped on it. Check the data for NaN, lower the learning rate, or clip "
                f"gradients; {self._kept()}"
            )
        torch.autograd.backward(loss)
        self.optimizer.step()
        if self.schedules_steps:
            self.scheduler.step()
        return value

    def _kept(self) -> str:
        if self._best_state is None:
            return "no epoch has met the budgets yet"
        return f"prepared is back in the state of epoch {self.best_epoch}, which met every budget"

    def _status(self, loss: float) -> str:
        accounting, bits = self.prepared.plan.accounting, list(self.prepared.bit_widths.values())
        shares = ", ".join(
            f"{name} {float(total / accounting.limits[name]):.2f} of budget"
            for name, total in accounting.totals(bits).items()
            if name in accounting.limits
        )
        return f"loss {loss:.4f}  {shares}"

    @torch.no_grad()
    def _validate(self, loader: Iterable[Any]) -> float:
        self.prepared.eval()
        total, count = 0.0, 0
        for batch in loader:
            inputs, target = self._unpack(batch)
            output = self.prepared(*inputs)
            if self.metric is None:
                score = torch.as_tensor(-self.loss_fn(output, target))
            else:
                score = torch.as_tensor(self.metric(output, target))
            first = inputs[0]
            samples = first.shape[0] if isinstance(first, Tensor) and first.dim() else 1
            total, count = total + float(score.double().mean()) * samples, count + samples
        if count == 0:
            raise UsageError(
                "val_loader gave no batch; give a DataLoader or a list that is not empty and can "
                "be iterated every epoch"
            )
        return total / count

    def _record(self, number: int, loss: float, metric: float | None) -> None:
        accounting, bits = self.prepared.plan.accounting, self.prepared.bit_widths
        values = list(bits.values())
        satisfied, totals = accounting.is_satisfied(values), accounting.totals(values)
        epoch = Epoch(number, loss, metric, satisfied, totals, bits)
        self.history.append(epoch)
        score = -math.inf if metric is None or math.isnan(metric) else metric
        if satisfied and score >= self._best_metric:
            # A state dict has no samples of tensors: what is due on them has to be done before.
            settle_ranges(self.prepared)
            self._best_state = copy.deepcopy(self.prepared.state_dict())
            self._best_metric, self.best_epoch = score, number
        if self.callback is not None:
            self.callback(epoch)

    def _is_patient_no_more(self) -> bool:
        if self.patience is None or self.best_epoch is None:
            return False
        worse = [epoch for epoch in self.history[self.best_epoch :] if epoch.satisfied]
        return len(worse) >= self.patience

    def restore_best(self) -> None:
        """Put `prepared` into the best state that met the budgets, if there is one."""
        if self._best_state is not None:
            self.prepared.load_state_dict(self._best_state)

    def _unpack(self, batch: Any) -> tuple[tuple[Any, ...], Any]:
        if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) < 2:
            size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
            raise UsageError(
                f"a batch is {type(batch).__name__}{size}; fit takes batches (*inputs, target): "
                f"for others write the loop yourself and use cgmq_fx.attach"
            )
        moved = [item.to(self._device) if isinstance(item, Tensor) else item for item in batch]
        return tuple(moved[:-1]), moved[-1]


def _bar(show: bool) -> AbstractContextManager[Progress | None]:
    if not show:
        return nullcontext()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        transient=True,
    )
