"""The checkpoint of a call of `fit`: when it is written, and how an epoch is entered midway."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cgmq_fx.checkpoint import read_run, write_run
from cgmq_fx.checkpoint_file import Place
from cgmq_fx.errors import UsageError
from cgmq_fx.random_state import random_state, restore_random_state
from cgmq_fx.training_state import TrainingRun

_SECTION = "fit"


@dataclass
class Position:
    """How far a run is.

    Attributes:
        epoch: the epoch under way, from 1.
        batches: how many of its batches were trained on.
        loss: the sum of their losses.
    """

    epoch: int = 1
    batches: int = 0
    loss: float = 0.0


@dataclass
class FitCheckpoint:
    """Writes and reads the checkpoint of one run of `fit`; without a path it does nothing.

    Attributes:
        path: the file.
        every: write after so many steps too, not only after each epoch.
        run: the objects of the run.
        also: parts of its identity that `fit` knows.
        state: returns what `fit` itself keeps, as plain data.
    """

    path: Place | None
    every: int | None
    run: TrainingRun
    also: dict[str, str]
    state: Callable[[], dict[str, Any]]
    _epoch_start: dict[str, Any] = field(default_factory=dict)
    _now: dict[str, Any] | None = None

    def resume(self) -> tuple[Position, dict[str, Any] | None]:
        """Take up the run of the file, if there is one; else begin.

        Returns:
            How far it is, and what `state` returned when it was written.

        Raises:
            TrainingError: the file cannot be read.
            UsageError: it is of another run.
        """
        if self.path is None or not Path(self.path).exists():
            return Position(), None
        saved = read_run(self.path, self.run, self.also)[_SECTION]
        position = Position(**saved["progress"])
        if position.batches:
            self._epoch_start, self._now = saved["epoch_start"], self._random()
        return position, saved["state"]

    def batches(self, loader: Iterable[Any], position: Position) -> Iterator[Any]:
        """Yield the batches of an epoch that are to be trained on.

        In an epoch that was entered in its middle the random states are put back to its start, so
        that the loader shuffles as it did, and to the present ones where it goes on.
        """
        if self._now is None:
            self._epoch_start = self._random() if self.every is not None else {}
            yield from loader
            return
        restore_random_state(self._epoch_start, self.run.generators)
        rest = iter(loader)
        for _ in range(position.batches):
            if next(rest, self) is self:
                raise UsageError(
                    f"train_loader gave fewer than the {position.batches} batches of epoch "
                    f"{position.epoch} that were trained on before; give the loader of the run "
                    f"that wrote {str(self.path)!r}"
                )
        restore_random_state(self._now, self.run.generators)
        self._now = None
        yield from rest

    def after_step(self, position: Position) -> None:
        """Write where it is time. Raises as `write`."""
        if self.every is not None and int(self.run.prepared.plan.steps) % self.every == 0:
            self.write(position)

    def write(self, position: Position) -> None:
        """Write the checkpoint, if there is to be one.

        Raises:
            TrainingError: it cannot be written.
        """
        if self.path is None:
            return
        content = {
            "progress": vars(position).copy(),
            "epoch_start": self._epoch_start if position.batches else {},
            "state": self.state(),
        }
        write_run(self.path, self.run, {_SECTION: content}, self.also)

    def _random(self) -> dict[str, Any]:
        return random_state(self.run.generators)


def generators_of(**loaders: Iterable[Any] | None) -> dict[str, torch.Generator]:
    """Return the generators that data loaders and their samplers draw from, by place."""
    found: dict[str, torch.Generator] = {}
    for name, loader in loaders.items():
        for path in ("generator", "sampler.generator", "batch_sampler.sampler.generator"):
            item: Any = loader
            for attribute in path.split("."):
                item = getattr(item, attribute, None)
            if isinstance(item, torch.Generator) and all(item is not old for old in found.values()):
                found[f"{name}.{path}"] = item
    return found
