"""`RestoreModules`: layers with a mode come back as calls of the layers."""

import pytest
import torch
from torch import nn

from cgmq_fx.passes import export_program
from cgmq_fx.passes.closed_layers import CLOSED_LAYER, ClosedLayers, is_closed
from cgmq_fx.passes.meta import MODULE_PATH
from cgmq_fx.passes.recurrent import is_recurrent
from cgmq_fx.passes.restore_modules import RestoreModules
from export_checks import assert_like_model, exported


class Layers(nn.Module):
    """Each kind of closed layer, one of them twice, and a recurrent one with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, eps=1e-2, momentum=0.3)
        self.own = nn.InstanceNorm1d(6, affine=True, track_running_stats=True)
        self.drop = nn.Dropout(0.4)
        self.cell = nn.GRU(4, 3, batch_first=True)
        self.long = nn.LSTM(3, 3, batch_first=True, dropout=0.2, num_layers=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(batch, 6, 3)``."""
        x = self.norm(self.drop(self.own(self.norm(x)))).tanh()
        state = torch.ones(1, x.shape[0], 3)
        y, state = self.cell(x, state)
        y, (hidden, _) = self.long(y)
        return y + state.mean() + hidden.sum()


X = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))


def called(prepared):
    return [node.target for node in prepared.graph.nodes if node.op == "call_module"]


def test_layers_are_called_under_their_paths():
    model = Layers()
    prepared = exported(model, (X,))
    assert_like_model(model, prepared, (X,), (1, 5))
    paths = [path for path in called(prepared) if path in dict(model.named_modules())]
    assert paths == ["norm", "own", "drop", "norm"]
    opened = [MODULE_PATH.find(node) for node in prepared.graph.nodes if is_recurrent(node)]
    assert opened == ["cell", "long"]
    for node in prepared.graph.nodes:
        if node.target in paths:
            assert MODULE_PATH.get(node) == node.target
    assert not [node for node in prepared.graph.nodes if node.target is CLOSED_LAYER]


def test_a_layer_of_the_user_is_not_closed():
    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) * 2

    assert is_closed(nn.BatchNorm1d(3))
    assert not is_closed(Own(3))
    model = nn.Sequential(nn.Linear(6, 6), Own(6))
    given = X[:, :, 0].contiguous()
    assert_like_model(model, exported(model, (given,)), (given,), (5,))


def test_the_model_is_as_it_was_after_recording():
    model = Layers()
    with ClosedLayers(model).recorded():
        assert "forward" in vars(model.norm)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_calls_restored_in_another_order_are_seen(monkeypatch):
    monkeypatch.setattr(export_program, "RestoreModules", lambda calls: RestoreModules(calls[::-1]))
    model = Layers()
    with pytest.raises(Exception, match=r".+"):
        assert_like_model(model, exported(model, (X,)), (X,))
