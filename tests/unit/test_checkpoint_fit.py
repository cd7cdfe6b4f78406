import errno
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from cgmq_fx.checkpoint import save_checkpoint
from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.fit import fit
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from checkpoint_runs import OPTIMIZERS, differing, dropout_model, tensors_of
from fit_cases import Scripted
from small_training import small_data

EPOCHS = 6


class Killed(BaseException):
    """Ends a run as a kill does."""


class FailingLoss:
    """A cross entropy that stops the run at one of its calls."""

    def __init__(self, calls=math.inf, error=Killed):
        self.calls, self.error = calls, error

    def __call__(self, output, target):
        if output.requires_grad:
            self.calls -= 1
        if self.calls < 0:
            raise self.error
        return F.cross_entropy(output, target)


def run(path=None, kind=None, loss=F.cross_entropy, seed=0, epochs=EPOCHS, **options):
    """Fit on batches that a generator, or the global random state, shuffles."""
    torch.manual_seed(seed)
    prepared = prepare(dropout_model(), options.pop("budget", "3%"))
    options.pop("seen", []).append(prepared)
    data = TensorDataset(*small_data(48))
    generator = torch.Generator().manual_seed(seed) if options.pop("own", True) else None
    loader = DataLoader(data, 16, shuffle=True, generator=generator)
    if kind is not None:
        options["optimizer"] = OPTIMIZERS[kind](prepared.parameters())
    given = {"val_loader": [small_data(32, 5)], "progress": False, **options}
    result = fit(prepared, loader, loss, epochs=epochs, checkpoint=path, **given)
    return prepared, result


def same(first, second):
    return differing(tensors_of(first[0]), tensors_of(second[0])) == [] and (
        first[1].history == second[1].history and first[1].best_epoch == second[1].best_epoch
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.ckpt"


@pytest.mark.parametrize("kind", [None, "sgd", "adamw"])
@pytest.mark.parametrize(("every", "own"), [(None, True), (None, False), (2, True), (2, False)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(path, kind, every, own):
    whole = run(kind=kind, own=own)
    for seed, steps in enumerate((5, 4, 1)):  # what the others have before they resume is lost
        with pytest.raises(Killed):
            run(path, kind, FailingLoss(steps), seed=seed, every=every, own=own)
    assert same(whole, run(path, kind, every=every, seed=9, own=own))


def test_a_run_with_a_checkpoint_is_one_without(path):
    assert same(run(), run(path, every=1))


def test_a_run_that_is_over_is_not_run_again(path):
    first = run(path)
    assert same(first, run(path, loss=FailingLoss(0), seed=9))


def test_patience_goes_on(path):
    scores = {"patience": 2, "val_loader": [small_data()]}
    first = run(path, metric=Scripted(9, 5, 1, 1, 1, 1), **scores)
    assert len(first[1].history) < EPOCHS
    second = run(path, metric=Scripted(), loss=FailingLoss(0), **scores)
    assert first[1].history == second[1].history


def test_interrupted_by_hand_it_returns_and_goes_on_later(path):
    whole = run()
    _, stopped = run(path, loss=FailingLoss(10, KeyboardInterrupt))
    assert stopped.interrupted
    assert len(stopped.history) == 3
    assert same(whole, run(path, seed=9))


def test_the_last_step_of_an_epoch(path):
    """Killed between the write after it and the one after the epoch: no batch is left."""

    def stop(epoch):
        if epoch.epoch == 3:
            raise Killed

    with pytest.raises(Killed):
        run(path, every=3, callback=stop)
    assert same(run(), run(path, every=3, seed=9))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 7}, "fit's epochs differs: saved '6', given '7'"),
        ({"budget": "4%"}, "budget differs: saved 'bops: 3 %"),
        ({"kind": "sgd"}, r"schedulers differ: 1 saved, 0 given|optimizer differs"),
        ({"direction": "dir_1"}, "direction saved 'fisher', given 'dir_1'"),
        ({"own": False}, r"generators differ: saved \['train_loader.generator'\]"),
    ],
)
def test_another_run_is_refused_by_name(path, options, text):
    with pytest.raises(Killed):
        run(path, loss=FailingLoss(5))
    data = path.read_bytes()
    with pytest.raises(UsageError, match=text):
        run(path, **options)
    assert path.read_bytes() == data


def test_a_checkpoint_of_a_loop_is_refused(path):
    prepared = prepare(dropout_model(), "3%")
    save_checkpoint(path, prepared)
    with pytest.raises(UsageError, match="fit's epochs differs: none was saved"):
        run(path)


def test_a_write_that_fails_stops_the_run_with_the_best_state(path):
    path.mkdir()
    with pytest.raises(TrainingError, match="could not be read: Is a directory"):
        run(path)
    with pytest.raises(TrainingError, match="could not be written"):
        run(path / "none" / "run.ckpt")


def test_a_disk_that_fills_up_on_the_way_leaves_the_best_state(path, monkeypatch):
    """The model is back in its best epoch, the last whole file is there, and the run goes on."""
    whole, written, prepared_of = run(), [], []

    def full(*arguments):
        written.append(None)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return kept(*arguments)

    kept = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"run\.ckpt.*could not be written: No space left"):
        run(path, seen=prepared_of)
    monkeypatch.undo()
    [prepared] = prepared_of
    bits = list(prepared.bit_widths.values())
    assert prepared.plan.accounting.is_satisfied(bits)
    assert lower(prepared).bit_widths == prepared.bit_widths
    assert same(whole, run(path, seed=9))


def test_every_needs_a_file():
    with pytest.raises(UsageError, match="every=2 must be at least 1 and goes with checkpoint="):
        run(every=2)
    with pytest.raises(UsageError, match="every=0 must be at least 1"):
        run("file", every=0)
