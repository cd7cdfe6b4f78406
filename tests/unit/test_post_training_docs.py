"""The snippets of docs/post-training.md run, in their order."""

import re
from pathlib import Path

import pytest
import torch

from cgmq_fx import report
from small_training import batches, small_data, small_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "post-training.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
SUPPOSED, *OTHERS = SNIPPETS


@pytest.mark.parametrize("snippet", OTHERS)
def test_snippet(snippet):
    model, x = small_model().eval(), small_data()[0]

    def score(fixed):
        with torch.no_grad():
            return -float((fixed(x) - model(x)).square().mean())

    scope = {"model": model, "x": x, "loader": batches(8), "score": score}
    exec(SUPPOSED, scope)
    exec(snippet, scope)
    made = [scope[name] for name in ("mixed", "fixed", "smallest") if name in scope]
    assert made
    assert all(report(fixed).satisfied for fixed in made)
