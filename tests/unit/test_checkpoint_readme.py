import os

import torch
import torch.nn.functional as F

import cgmq_fx
from cgmq_fx.checkpoint_file import read_checkpoint
from checkpoint_runs import differing, dropout_model
from small_training import small_data
from source_tree import ROOT


def test_the_lines_of_the_readme(tmp_path, monkeypatch):
    """They run, and stopped after two of four epochs they go on to the same end."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Stopping and going on")
    lines = section[2].partition("```python\n")[2].partition("```")[0]
    assert "range(first, epochs)" in lines
    monkeypatch.chdir(tmp_path)
    x, y = small_data(48)
    names = {"os": os, "torch": torch, "cgmq_fx": cgmq_fx, "loss_fn": F.cross_entropy}
    names |= {"loader": [(x, y)] * 3, "epochs": 4}
    found = []
    for stops in ((4,), (2, 4)):
        (tmp_path / "run.ckpt").unlink(missing_ok=True)
        for stop in stops:
            torch.manual_seed(0)
            part = lines.replace("range(first, epochs)", f"range(first, {stop})")
            exec(part, {**names, "model": dropout_model()})
        found.append(read_checkpoint("run.ckpt")["state"]["model"]["state_dict"]["entries"])
    assert differing(*found) == []
