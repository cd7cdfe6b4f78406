"""Packed files take what the weight-memory budget counts, within 3 % and 8 KiB."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.export import export
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from cgmq_fx.verify import verify
from torchvision_shim import torchvision

WIDTHS = (2, 3, 4, 5, 7, 8)


def lenet5():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


def resnet20():
    plan = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Block(*sizes) for sizes in plan),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


@pytest.mark.parametrize("width", [2, None], ids=["2bit", "mixed"])
@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        (lenet5, (1, 28, 28)),
        (resnet20, (3, 32, 32)),
        pytest.param(torchvision.models.mobilenet_v2, (3, 64, 64), marks=pytest.mark.slow),
    ],
    ids=["lenet5", "resnet20", "mobilenet_v2"],
)
def test_file_size(factory, shape, width, tmp_path, capsys):
    torch.manual_seed(0)
    inputs = torch.randn(1, *shape)
    bounds = {"weight_memory": "100%"}
    prepared = prepare(factory(), bounds, example_inputs=(inputs,), widths=WIDTHS).eval()
    with torch.no_grad():
        prepared(inputs)
        sites = range(len(prepared.bit_widths))
        prepared.set_bit_widths(
            [
                item.bit_width if not item.spec.learned else width or WIDTHS[site % len(WIDTHS)]
                for site, item in zip(sites, prepared.quantizers.values(), strict=True)
            ]
        )
        prepared(inputs)
    fixed = lower(prepared, allow_untrained=True)
    path = export(fixed, tmp_path / "model.safetensors")
    size, budgeted = path.stat().st_size, report(fixed).totals["weight_memory"]
    assert verify(path).totals["weight_memory"] == budgeted
    with capsys.disabled():
        share = float(size / budgeted - 1)
        print(f"\n{factory.__name__}: {size:,} bytes, counted {int(budgeted):,} ({share:+.1%})")
    assert size <= budgeted * 103 / 100 + 8 * 1024
