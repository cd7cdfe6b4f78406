"""Optimizers and schedulers of torch: each goes on from a checkpoint as if it had not stopped."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from cgmq_fx.checkpoint import resume, save_checkpoint
from cgmq_fx.errors import UsageError
from cgmq_fx.prepare import prepare
from checkpoint_runs import differing, dropout_model, example, tensors_of
from small_training import small_data

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, torch.tensor(1e-2)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, history_size=4),
}
SCHEDULERS = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=2),
    "function": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[3],
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.9),
}


class Run:
    def __init__(self, optimizer, scheduler=None):
        torch.manual_seed(0)
        self.prepared = prepare(dropout_model(), "50%", example_inputs=(example(),))
        self.optimizer = OPTIMIZERS[optimizer](list(self.prepared.parameters()))
        self.scheduler = None if scheduler is None else SCHEDULERS[scheduler](self.optimizer)

    def train(self, steps):
        x, y = small_data()

        def closure():
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.prepared(x), y)
            torch.autograd.backward(loss)
            return loss

        for _ in range(steps):
            self.optimizer.step(closure)
            if self.scheduler is not None:
                plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
                self.scheduler.step(*([1.0] if plateau else []))


def stops_and_goes_on(path, *kinds):
    whole = Run(*kinds)
    whole.train(7)
    first = Run(*kinds)
    first.train(4)
    save_checkpoint(path, first.prepared, first.optimizer, scheduler=first.scheduler)
    second = Run(*kinds)
    resume(path, second.prepared, second.optimizer, scheduler=second.scheduler)
    second.train(3)
    return differing(tensors_of(whole.prepared), tensors_of(second.prepared)) == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers(tmp_path, kind):
    assert stops_and_goes_on(tmp_path / "run.ckpt", kind)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(tmp_path, kind):
    assert stops_and_goes_on(tmp_path / "run.ckpt", "sgd", kind)


def test_an_optimizer_that_joins_its_parameters_needs_their_order(tmp_path):
    run, path = Run("lbfgs"), tmp_path / "run.ckpt"
    run.train(2)
    save_checkpoint(path, run.prepared, run.optimizer)
    turned = OPTIMIZERS["lbfgs"](list(run.prepared.parameters())[::-1])
    with pytest.raises(UsageError, match="LBFGS joins its parameters, and their order changed"):
        resume(path, run.prepared, turned)


def test_a_scheduler_that_holds_an_object_is_named(tmp_path):
    class Rule:
        def __init__(self):
            self.layer = nn.ReLU()

        def __call__(self, step):
            return 1.0

    run = Run("sgd")
    scheduler = lr_scheduler.LambdaLR(run.optimizer, Rule())
    with pytest.raises(UsageError, match=r"scheduler\['lr_lambdas'\]\[0\]\['layer'\] is torch.nn"):
        save_checkpoint(tmp_path / "run.ckpt", run.prepared, run.optimizer, scheduler=scheduler)
