"""torchvision can be imported and used, whatever variant of torch it was built for."""

import sys

import pytest
import torch

import torchvision_shim


def test_a_network_builds_and_runs():
    network = torchvision_shim.torchvision.models.resnet18(weights=None, num_classes=7).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_a_second_import_returns_the_same_module():
    assert torchvision_shim.import_torchvision() is sys.modules["torchvision"]


def test_another_failure_is_not_hidden(monkeypatch):
    def fail(name):
        raise RuntimeError(f"{name} is broken in another way")

    monkeypatch.setattr(torchvision_shim.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="torchvision is broken in another way"):
        torchvision_shim.import_torchvision()
