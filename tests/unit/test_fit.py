import importlib
import io
import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from cgmq_fx.errors import BudgetError, UsageError
from cgmq_fx.fit import accuracy, fit
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from fit_cases import QUIET, Scripted, is_met, run
from small_training import batches, small_data, small_model, small_prepared


def test_the_history():
    prepared = small_prepared()
    seen = []
    result = run(prepared, val_loader=batches(seed=2), metric=accuracy, callback=seen.append)
    assert [epoch.epoch for epoch in result.history] == [1, 2, 3, 4]
    assert seen == list(result.history)
    assert all(math.isfinite(epoch.train_loss) for epoch in seen)
    assert all(0 <= epoch.val_metric <= 1 for epoch in seen)
    accounting = prepared.plan.accounting
    for epoch in seen:
        bits = list(epoch.bit_widths.values())
        assert epoch.totals == accounting.totals(bits)
        assert epoch.satisfied == accounting.is_satisfied(bits)
    assert result.best_epoch is not None
    assert not result.interrupted
    assert is_met(result.fixed)


def test_it_learns():
    train, test, prepared = batches(20), small_data(200, seed=9), small_prepared("5%")
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    options = {"val_loader": [test], "metric": accuracy, "optimizer": optimizer}
    result = run(prepared, train, epochs=12, **options)
    assert float(accuracy(result.fixed(test[0]), test[1]).mean()) > 0.7


def test_the_metric_of_uneven_batches_is_a_mean_over_samples():
    x, y = small_data(10)
    uneven = [(x[:9], y[:9]), (x[9:], y[9:])]
    even = [(x, y)]
    scores = []
    for loader in (uneven, even):
        torch.manual_seed(0)
        result = run(epochs=1, val_loader=loader, metric=lambda out, target: accuracy(out, target))
        scores.append(result.history[0].val_metric)
    assert scores[0] == pytest.approx(scores[1])


def test_without_a_metric_it_is_minus_the_loss():
    result = run(epochs=1, val_loader=batches(seed=2))
    assert result.history[0].val_metric < 0


def test_the_best_epoch_is_returned_not_the_last():
    """Epoch 3 has the best metric; its weights come back, though two more epochs follow."""
    prepared, kept = small_prepared("3%"), {}

    def keep(epoch):
        kept[epoch.epoch] = {k: v.clone() for k, v in prepared.state_dict().items()}

    scores = Scripted(0.5, 0.6, 0.9, 0.2, 0.8)
    result = run(prepared, epochs=5, val_loader=[small_data()], metric=scores, callback=keep)
    assert [epoch.satisfied for epoch in result.history] == [True] * 5
    assert result.best_epoch == 3
    state = prepared.state_dict()
    assert all(torch.equal(state[key], value) for key, value in kept[3].items())
    assert not torch.equal(kept[5]["0.weight"], kept[3]["0.weight"])
    assert result.fixed.bit_widths == result.history[2].bit_widths
    x, _ = small_data()
    assert torch.allclose(result.fixed(x), lower(prepared)(x))


def test_an_epoch_over_budget_is_never_the_best():
    """The best metric comes while the widths are still falling."""
    scores = Scripted(9.0, *[0.1] * 9)
    prepared = small_prepared("0.9%")
    result = run(prepared, batches(1), epochs=10, val_loader=[small_data()], metric=scores)
    over = [epoch.epoch for epoch in result.history if not epoch.satisfied]
    assert over[:1] == [1]
    assert result.best_epoch not in over
    assert is_met(result.fixed)


def test_without_a_val_loader_the_last_that_met_the_budgets():
    result = run(epochs=5)
    assert [epoch.val_metric for epoch in result.history] == [None] * 5
    assert result.best_epoch == 5


def test_a_metric_that_is_nan_is_worst():
    scores = Scripted(math.nan, 0.4, math.nan)
    result = run(small_prepared(), epochs=3, val_loader=[small_data()], metric=scores)
    assert result.best_epoch == 2
    scores = Scripted(math.nan, math.nan)
    assert run(epochs=2, val_loader=[small_data()], metric=scores).best_epoch == 2


def test_patience():
    scores = Scripted(0.1, 0.5, 0.4, 0.3, 0.9, 1.0)
    result = run(epochs=6, val_loader=[small_data()], metric=scores, patience=2)
    assert len(result.history) == 4
    assert result.best_epoch == 2


def test_patience_does_not_count_what_is_over_budget():
    scores = Scripted(*[1.0 - 0.1 * n for n in range(10)])
    prepared = small_prepared("0.9%")
    result = run(
        prepared, batches(1), epochs=10, val_loader=[small_data()], metric=scores, patience=1
    )
    first = next(epoch.epoch for epoch in result.history if epoch.satisfied)
    assert first > 1
    assert result.best_epoch == first
    assert len(result.history) == first + 1


class Stream(IterableDataset):
    """Data without a length; a DataLoader over it has a __len__ that raises."""

    def __iter__(self):
        yield from zip(*small_data(64), strict=True)


def test_loaders_of_torch():
    for dataset in (TensorDataset(*small_data(64)), Stream()):
        result = run(train=DataLoader(dataset, batch_size=16), epochs=2)
        assert int(result.fixed.plan.steps) == 8


def test_own_optimizer_and_scheduler():
    prepared = small_prepared()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    run(prepared, optimizer=optimizer, scheduler=scheduler, epochs=3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


@pytest.mark.parametrize("has_length", [True, False])
def test_the_default_rate_falls_with_every_step_where_their_number_is_known(
    has_length, monkeypatch
):
    made, rates = [], []
    kind = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *a, **k: made.append(kind(*a, **k)) or made[0])

    def loss(output, target):
        rates.append(made[0].param_groups[0]["lr"])
        return F.cross_entropy(output, target)

    dataset = TensorDataset(*small_data(64)) if has_length else Stream()
    fit(small_prepared(), DataLoader(dataset, batch_size=16), loss, epochs=2, progress=False)
    places = range(8) if has_length else [0, 0, 0, 0, 4, 4, 4, 4]
    wanted = [0.5e-3 * (1 + math.cos(math.pi * place / 8)) for place in places]
    assert rates == pytest.approx(wanted)


def test_own_optimizer_without_a_scheduler_keeps_its_rate():
    prepared = small_prepared()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    run(prepared, optimizer=optimizer, epochs=3)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_scheduler_that_wants_a_metric():
    prepared = small_prepared()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    run(prepared, optimizer=optimizer, scheduler=scheduler, epochs=3)
    assert scheduler.last_epoch == 3


def test_shapes_from_the_first_batch():
    prepared = small_prepared("3%", priced=False)
    assert is_met(run(prepared).fixed)
    with pytest.raises(BudgetError, match=r"below the floor"):
        run(small_prepared("0.1%", priced=False))


def test_several_inputs():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = torch.nn.Linear(10, 3), torch.nn.Linear(10, 3)

        def forward(self, a, b):
            return self.left(a) + self.right(b)

    x, y = small_data()
    prepared = prepare(Two(), "10%", example_inputs=(x, x))
    assert is_met(run(prepared, [[x, x, y]] * 4).fixed)


def test_ranges_are_settled_in_what_is_kept():
    """With one batch in all the widths change at the very end, with no forward after it."""
    prepared = small_prepared("0.9%")
    result = run(prepared, batches(1), epochs=1)
    assert result.best_epoch == 1
    assert is_met(lower(prepared))
    assert not any(quantizer.refit_pending for quantizer in prepared.quantizers.values())


def test_the_mode_is_left_as_it_was():
    for mode in (True, False):
        prepared = small_prepared()
        prepared.train(mode)
        run(prepared, epochs=1, val_loader=batches(1))
        assert prepared.training == mode


def test_arguments_that_make_no_sense():
    prepared = small_prepared()
    with pytest.raises(UsageError, match=r"epochs=0 must be at least 1; patience=0 must be"):
        run(prepared, epochs=0, patience=0)
    with pytest.raises(UsageError, match=r"fit got Sequential, which prepare did not return"):
        run(small_model())
    with pytest.raises(UsageError, match=r"direction='up' is unknown"):
        run(prepared, direction="up")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(UsageError, match=r"StepLR schedules an optimizer that fit was not given"):
        run(prepared, scheduler=scheduler)
    with pytest.raises(UsageError, match=r"loss_fn returned shape \(16,\)"):
        fit(prepared, batches(), lambda a, b: F.cross_entropy(a, b, reduction="none"), epochs=1)
    with pytest.raises(UsageError, match=r"loss_fn returned float"):
        fit(prepared, batches(), lambda a, b: 0.5, epochs=1, **QUIET)


def test_progress_on_something_that_is_not_a_terminal_is_quiet(capsys):
    fit(small_prepared(), batches(30), F.cross_entropy, epochs=3)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) <= 4


def test_progress_in_a_pipe_is_quiet():
    code = """
        import sys, torch.nn.functional as F
        sys.path[:0] = sys.argv[1:]
        from small_training import batches, small_prepared
        from cgmq_fx.fit import fit
        fit(small_prepared(), batches(30), F.cross_entropy, epochs=3)
    """
    support = next(path for path in sys.path if path.endswith("support"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), support],
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) <= 4
    assert "\\x1b" not in done.stdout


def test_progress_on_a_terminal(monkeypatch):
    module = importlib.import_module("cgmq_fx.fit")  # the package has the function of that name
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    original = module.Progress

    def progress(*columns, **options):
        return original(*columns, console=console, **options)

    monkeypatch.setattr(module, "Progress", progress)
    fit(small_prepared(), batches(), F.cross_entropy, epochs=2)
    shown = screen.getvalue()
    assert "epoch 2/2" in shown
    assert "of budget" in shown
