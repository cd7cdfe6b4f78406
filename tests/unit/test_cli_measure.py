"""The commands that make cost tables."""

import pytest
import torch
from torch import nn

from cgmq_fx.cli import main
from cgmq_fx.cli_measure import RUNTIMES
from cgmq_fx.cost.load import load_table
from cgmq_fx.errors import UsageError
from cgmq_fx.measure import measure as measuring
from cgmq_fx.measure import runtimes
from cgmq_fx.measure.runtimes import runtime
from fake_runtime import FakeClock, FakeRuntime

MODEL = """
import torch
from torch import nn

def tiny():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

class Product(nn.Module):
    def forward(self, x):
        return torch.matmul(x, x)

def product():
    return nn.Sequential(Product(), nn.Linear(8, 8))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "measured_models.py").write_text(MODEL)
    clock = FakeClock()
    monkeypatch.setattr("cgmq_fx.measure.runtimes.runtime", lambda name: FakeRuntime(clock))
    monkeypatch.setattr("cgmq_fx.measure.timing.TimingPlan", clock.plan)
    assert measuring  # imported before its names are others
    return tmp_path


def measure(model, shape, *more):
    arguments = ["tables", "measure", f"measured_models:{model}", "--runtime", "onnxruntime"]
    return main([*arguments, "--input-shape", shape, "--output", "board.toml", *more])


@pytest.mark.filterwarnings("ignore::cgmq_fx.cost.monotone.CostTableWarning")
def test_measure_writes_a_table_and_tells_what_it_did(folder, capsys):
    assert measure("tiny", "1,8", "--name", "mine") == 0
    captured = capsys.readouterr()
    table = load_table(folder / "board.toml")
    assert (table.name, table.unit) == ("mine", "ms")
    assert "Sequential w8 a8: measured 0.0221 ms, table 0.0076" in captured.out
    assert "3 operations; 0 of " in captured.out
    assert "[3/3] 2: w8 a8 0.000936 ms, w32 a32 0.000872 ms" in captured.err


def test_measure_says_what_it_could_not_time(folder, capsys):
    assert measure("product", "1,8,8") == 0
    assert "warning: 'matmul' (matmul, 512 MACs) was not timed" in capsys.readouterr().err


def test_nothing_is_measured_that_could_not_be_written(folder, capsys):
    arguments = ["tables", "measure", "measured_models:tiny", "--runtime", "onnxruntime"]
    assert main([*arguments, "--input-shape", "1,8", "--output", "no/board.toml"]) == 1
    error = capsys.readouterr().err
    assert "--output 'no/board.toml' is not a .toml file in a folder that is there" in error
    assert "[1/" not in error


def test_too_few_rounds_are_refused(folder, capsys):
    with pytest.raises(SystemExit):
        measure("tiny", "1,8", "--rounds", "2")
    assert "'2' is not a whole number of at least 3" in capsys.readouterr().err


def test_the_command_offers_the_runtimes_that_there_are():
    assert [runtime(name).name for name in RUNTIMES] == list(RUNTIMES)
    known = "there is onnxruntime, inductor, executorch"
    with pytest.raises(UsageError, match=f"no runtime 'tvm'; {known}"):
        runtime("tvm")


def test_a_runtime_that_is_not_installed_is_named(monkeypatch):
    def missing(package):
        raise runtimes.PackageNotFoundError(package)

    monkeypatch.setattr(runtimes, "version", missing)
    with pytest.raises(UsageError, match=r"needs the package onnxruntime.*pip install onnxruntime"):
        assert runtime("onnxruntime").version


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_runs_what_is_exported_for_it():
    from cgmq_fx.measure.fixing import fixed_at

    model, inputs = nn.Sequential(nn.Linear(8, 4)), (torch.ones(1, 8),)
    fixed = fixed_at(model, inputs, 32, 32)
    call = runtime("inductor").export(fixed, inputs).whole()
    assert torch.allclose(call(), model(*inputs), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 32])
def test_executorch_runs_what_is_lowered_for_it_and_parts_of_it(bits):
    from cgmq_fx.measure.fixing import fixed_at

    pytest.importorskip("executorch")

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, x):
            return self.first(x), self.second(x)

    inputs = (torch.linspace(-1, 1, 8).reshape(1, 8),)
    fixed = fixed_at(Pair(), inputs, bits, bits)
    made = runtime("executorch").export(fixed, inputs)
    wanted = fixed(*inputs)
    for found, theirs in zip(made.whole()(), wanted, strict=True):
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)
    (second,) = made.part([1])()
    torch.testing.assert_close(second, wanted[1], rtol=0, atol=1e-4)
