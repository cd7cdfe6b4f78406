"""The snippets of docs/training.md run, in their order."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from small_training import batches, small_data, small_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
SUPPOSED, *OTHERS = SNIPPETS


def names(**more):
    """The names that the page supposes."""
    return {"model": small_model(), "x": small_data()[0], "loader": batches(8), **more}


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("snippet", [s for s in OTHERS if "lightning" not in s])
def test_snippet(snippet, one_rank):
    torch.compiler.reset()
    scope = names()
    exec(SUPPOSED, scope)
    exec(snippet, scope)
    assert int(scope["prepared"].plan.steps) > 0
    assert scope["guide"].is_satisfied


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_snippet_of_lightning():
    example = importlib.import_module("lightning_digits")
    [snippet] = [s for s in OTHERS if "lightning" in s]
    module = example.Classifier()
    module.model = small_model()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
    loader = DataLoader(TensorDataset(*small_data(64)), 16)
    scope = names(
        loader=loader,
        lightning=example.lightning,
        module=module,
        quiet=quiet,
        cgmq_fx=example.cgmq_fx,
    )
    exec(snippet, scope)
    assert scope["quantization"].fixed is not None
