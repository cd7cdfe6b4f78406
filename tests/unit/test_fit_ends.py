"""Runs of `fit` that end otherwise than planned."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.fit import fit
from cgmq_fx.lower import lower
from fit_cases import QUIET, Scripted, is_met, run
from small_training import batches, small_data, small_prepared


@pytest.mark.parametrize("epoch", [2, 4])
def test_an_interrupt_in_the_callback_keeps_the_best(epoch):
    def stop(record):
        if record.epoch == epoch:
            raise KeyboardInterrupt

    scores = Scripted(0.1, 0.9, 0.2, 0.3, 0.4)
    prepared = small_prepared()
    result = run(prepared, epochs=5, val_loader=[small_data()], metric=scores, callback=stop)
    assert result.interrupted
    assert result.best_epoch == 2
    assert len(result.history) == epoch
    assert is_met(result.fixed)


class Stopping(list):
    """Batches that are interrupted after some of them, counted over all epochs."""

    def __init__(self, items, after, error=KeyboardInterrupt):
        super().__init__(items)
        self.left, self.error = after, error

    def __iter__(self):
        for item in super().__iter__():
            if self.left == 0:
                raise self.error
            self.left -= 1
            yield item


def test_an_interrupt_between_batches():
    prepared = small_prepared()
    result = run(prepared, Stopping(batches(), 14), epochs=5)
    assert result.interrupted
    assert result.best_epoch == 3
    assert is_met(result.fixed)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("priced", [False, True])
def test_an_interrupt_before_any_epoch_still_gives_a_module_within_the_budget(steps, priced):
    prepared = small_prepared("0.9%", priced=priced)
    result = run(prepared, Stopping(batches(), steps), epochs=20)
    assert result.interrupted
    assert result.best_epoch is None
    assert result.history == ()
    assert is_met(result.fixed)


@pytest.mark.parametrize("priced", [False, True])
def test_an_interrupt_before_any_step_is_passed_on(priced):
    prepared = small_prepared(priced=priced)
    with pytest.raises(KeyboardInterrupt):
        run(prepared, Stopping(batches(), 0))


def test_other_errors_leave_the_best_state():
    prepared = small_prepared()
    with pytest.raises(OSError, match="disk"):
        run(prepared, Stopping(batches(), 10, OSError("disk")))
    assert is_met(lower(prepared))
    assert int(prepared.plan.steps) == 8


def poisoned(good, bad_after):
    """Return a loss function that is NaN from some call on."""
    calls = iter(range(10**6))

    def loss_fn(output, target):
        loss = F.cross_entropy(output, target)
        return loss * math.nan if next(calls) >= bad_after else loss

    return loss_fn


def test_a_loss_that_is_nan():
    prepared, kept = small_prepared(), {}

    def keep(epoch):
        kept[epoch.epoch] = {k: v.clone() for k, v in prepared.state_dict().items()}

    with pytest.raises(
        TrainingError, match=r"epoch 3, batch 1: the loss is nan; .* back in the state of epoch 2"
    ):
        fit(prepared, batches(), poisoned(8, 9), epochs=5, callback=keep, **QUIET)
    state = prepared.state_dict()
    assert all(torch.equal(state[key], value) for key, value in kept[2].items())
    assert is_met(lower(prepared))


def test_a_loss_that_is_nan_before_any_epoch():
    prepared = small_prepared()
    with pytest.raises(TrainingError, match=r"epoch 1, batch 2: .* no epoch has met the budgets"):
        fit(prepared, batches(), poisoned(0, 2), epochs=3, **QUIET)
    assert is_met(lower(prepared))


def test_the_guide_is_detached_whatever_happens():
    for train in (batches(), Stopping(batches(), 2), Stopping(batches(), 2, OSError())):
        prepared = small_prepared()
        optimizer = torch.optim.Adam(prepared.parameters())
        with contextlib.suppress(OSError):
            run(prepared, train, optimizer=optimizer, epochs=2)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"x": 1}, "a batch is dict; fit takes"),
        (torch.zeros(3, 10), "a batch is Tensor; fit takes"),
        ([torch.zeros(3, 10)], "a batch is list of 1; fit takes"),
        ("text", "a batch is str of 4; fit takes"),
    ],
)
def test_a_batch_of_the_wrong_form(batch, text):
    with pytest.raises(UsageError, match=text):
        run(train=[batch])


def test_an_iterator_lasts_one_epoch():
    with pytest.raises(UsageError, match=r"train_loader is the iterator generator.* of 3 epochs"):
        run(train=(batch for batch in batches()), epochs=3)
    with pytest.raises(UsageError, match=r"val_loader is the iterator list_iterator"):
        run(val_loader=iter(batches()), epochs=2)
    result = run(train=(batch for batch in batches()), epochs=1)
    assert len(result.history) == 1


class OnceOnly:
    """Not an iterator itself, but one that is used up: what a careless wrapper is."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        return self.items


def test_a_loader_that_is_empty_in_the_second_epoch():
    prepared = small_prepared()
    with pytest.raises(UsageError, match="train_loader gave no batch in epoch 2"):
        run(prepared, OnceOnly(batches(60)))
    assert is_met(lower(prepared))
    with pytest.raises(UsageError, match="val_loader gave no batch"):
        run(val_loader=[])
