"""The snippets of docs/granularity.md run, in their order."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cgmq_fx
from cgmq_fx.unit_bits import UnitBits

PAGE = Path(__file__).resolve().parents[2] / "docs" / "granularity.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def test_the_snippets_run(capsys):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 4),
    )  # fmt: skip
    x = torch.randn(8, 1, 8, 8)
    loader = [(x, torch.arange(8) % 4)] * 30
    scope = {"cgmq_fx": cgmq_fx, "torch": torch, "F": F, "model": model, "x": x, "loader": loader}
    for snippet in SNIPPETS:
        exec(snippet, scope)
    assert isinstance(scope["bits"], UnitBits)
    assert "within budget" in capsys.readouterr().out
    assert any(q.spec.unit_shape for q in scope["prepared"].quantizers.values())
