"""Everything that a training run is made of, taken at one moment and put back."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from cgmq_fx.accounting import Accounting
from cgmq_fx.guide import Guide
from cgmq_fx.model_state import model_faults, model_state, restore_model
from cgmq_fx.optimizer_state import optimizer_faults, optimizer_state, restore_optimizer
from cgmq_fx.plain_data import plain
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.random_state import random_state, restore_random_state

State = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A moment of a run in memory: its state, and what was known of costs."""

    state: State
    accounting: Accounting | None
    inputs: list[Any] | None


@dataclass(frozen=True)
class TrainingRun:
    """The objects of a run.

    Attributes:
        prepared: the model.
        optimizers: in the caller's order.
        schedulers: likewise.
        guide: what moves the bit-widths, if anything.
        generators: sources of random numbers besides the global ones, by name.
    """

    prepared: PreparedModule
    optimizers: tuple[Optimizer, ...] = ()
    schedulers: tuple[Any, ...] = ()
    guide: Guide | None = None
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)

    def state(self, *, copy: bool = False) -> State:
        """Return the state of all of it as plain data.

        Raises:
            UsageError: an optimizer or a scheduler holds what no file can.
        """
        return {
            "model": model_state(self.prepared, copy=copy),
            "optimizers": [
                optimizer_state(item, self.prepared, place, copy=copy)
                for place, item in _placed("optimizer", self.optimizers)
            ],
            "schedulers": [
                {
                    "class": type(item).__qualname__,
                    "state": plain(item.state_dict(), place, copy=copy),
                }
                for place, item in _placed("scheduler", self.schedulers)
            ],
            "guide": None if self.guide is None else self.guide.settings,
            "random": random_state(self.generators),
        }

    def faults(self, saved: State) -> list[str]:
        """Return why `saved` cannot be put into these objects; empty where it can."""
        return [
            *model_faults(self.prepared, saved["model"]),
            *self._optimizer_faults(saved["optimizers"]),
            *self._scheduler_faults(saved["schedulers"]),
            *self._guide_faults(saved["guide"]),
            *self._generator_faults(saved["random"]["generators"]),
        ]

    def restore(self, saved: State) -> None:
        """Put every object into the state `saved`, which has no faults."""
        restore_model(self.prepared, saved["model"])
        # Schedulers go first: some write learning rates while they are loaded.
        for scheduler, entry in zip(self.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(entry["state"])
        for optimizer, entry in zip(self.optimizers, saved["optimizers"], strict=True):
            restore_optimizer(optimizer, self.prepared, entry)
        restore_random_state(saved["random"], self.generators)

    def snapshot(self) -> Snapshot:
        """Return this moment, for `go_back`."""
        plan = self.prepared.plan
        accounting = plan.accounting if plan.is_priced else None
        return Snapshot(self.state(copy=True), accounting, plan.inputs)

    def go_back(self, moment: Snapshot) -> None:
        """Make everything as it was at `moment`."""
        plan = self.prepared.plan
        plan.forget_accounting()
        if moment.accounting is not None:
            plan.accounting, plan.inputs = moment.accounting, moment.inputs
        self.restore(moment.state)

    def _optimizer_faults(self, saved: Sequence[State]) -> list[str]:
        if len(saved) != len(self.optimizers):
            return [_count_fault("optimizer", len(saved), len(self.optimizers))]
        pairs = zip(_placed("optimizer", self.optimizers), saved, strict=True)
        return [
            fault
            for (place, item), entry in pairs
            for fault in optimizer_faults(item, self.prepared, entry, place)
        ]

    def _scheduler_faults(self, saved: Sequence[State]) -> list[str]:
        if len(saved) != len(self.schedulers):
            return [_count_fault("scheduler", len(saved), len(self.schedulers))]
        return [
            f"{place} differs: saved {entry['class']}, given {type(item).__qualname__}"
            for (place, item), entry in zip(
                _placed("scheduler", self.schedulers), saved, strict=True
            )
            if entry["class"] != type(item).__qualname__
        ]

    def _guide_faults(self, saved: State | None) -> list[str]:
        given = None if self.guide is None else self.guide.settings
        if saved == given:
            return []
        if saved is None:
            return ["guide differs: none was saved, one is given (call attach after resume)"]
        wanted = f"attach(prepared, optimizer, direction={saved['direction']!r}, "
        wanted += f"total_steps={saved['total_steps']})"
        if given is None:
            return [f"guide differs: one was saved, none is given (call {wanted} before resume)"]
        changed = [key for key in saved if saved[key] != given.get(key)]
        listed = ", ".join(
            f"{key} saved {saved[key]!r}, given {given.get(key)!r}" for key in changed
        )
        return [f"guide differs: {listed} ({wanted} makes the one that was saved)"]

    def _generator_faults(self, saved: Mapping[str, Any]) -> list[str]:
        if set(saved) == set(self.generators):
            return []
        return [f"generators differ: saved {sorted(saved)}, given {sorted(self.generators)}"]


def _placed(kind: str, items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for index, item in enumerate(items):
        yield kind if len(items) == 1 else f"{kind} {index}", item


def _count_fault(kind: str, saved: int, given: int) -> str:
    return f"{kind}s differ: {saved} saved, {given} given"
