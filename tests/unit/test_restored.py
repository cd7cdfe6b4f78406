import torch
from torch import nn

from cgmq_fx.passes.restored import attributes_restored
from cgmq_fx.prepare import prepare


class Capturing(nn.Module):
    """Installs hooks when it first runs, and hands out what they caught."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(12, 2)
        self.installed = False
        self.caught: list[torch.Tensor] = []

    def forward(self, x):
        if not self.installed:
            self.installed = True
            for layer in self.layers:
                layer.register_forward_hook(lambda _, __, out: self.caught.append(out))
        self.caught.clear()
        for layer in self.layers:
            x = layer(x)
            if self.training:
                x = x * 2
        return self.head(torch.cat(self.caught, 1))


def test_hooks_that_a_forward_installs_are_the_same_in_both_modes():
    torch.manual_seed(0)
    model, x = Capturing(), torch.randn(5, 4)
    prepared = prepare(model, "100%", example_inputs=(x,))
    assert not model.installed
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(32)
    for training in (True, False):
        assert torch.equal(prepared.train(training)(x), model.train(training)(x))


def test_what_a_forward_leaves_behind_is_undone():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.kept, model.counts = [1], {"a": 1}
    hooks = model[0]._forward_hooks
    with attributes_restored(model):
        model.kept.append(2)
        model.counts = {}
        model[1].new = "text"
        model[1].table = torch.ones(2)
        handle = model[0].register_forward_hook(lambda *_: None)
    assert model.kept == [1]
    assert model.counts == {"a": 1}
    assert not hasattr(model[1], "new")
    assert model[0]._forward_hooks is hooks
    assert not hooks
    assert torch.equal(model[1].table, torch.ones(2))
    handle.remove()
