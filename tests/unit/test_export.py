"""Packed files: what goes in comes out, other readers agree, wrong calls are refused."""

import copy
import runpy
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cgmq_fx import export_packed
from cgmq_fx.container import open_container
from cgmq_fx.cost.computed import computed_cost
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import BudgetError, CostTableError, FileFormatError, UsageError
from cgmq_fx.export import export
from cgmq_fx.load_packed import load_packed
from cgmq_fx.lower import lower
from cgmq_fx.manifest import MANIFEST
from cgmq_fx.prepare import prepare
from cgmq_fx.verify import verify
from source_tree import ROOT

PAGE = ROOT / "docs" / "formats" / "safetensors.md"
X = torch.linspace(-1, 1, 2 * 2 * 6 * 6).reshape(2, 2, 6, 6)


def network(*, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=bias), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)
    )


def prepared_network(model=None, bits=None, x=X, **options):
    budget = options.pop("budget", {"bops": "100%", "weight_memory": "100%"})
    made = prepare(model or network(), budget, example_inputs=(x,), **options).eval()
    made(x)
    made.set_bit_widths(bits or [site.allowed[0] for site in made.plan.accounting.sites])
    made(x)
    return made


def lowered(*args, **options):
    return lower(prepared_network(*args, **options), allow_untrained=True)


@pytest.fixture
def fixed():
    return lowered(widths=(3, 5, 8, 32), bits=[3, 8, 5, 8])


def test_a_weight_takes_its_bits_and_no_more(fixed, tmp_path):
    path = export(fixed, tmp_path / "model.safetensors")
    tensors = load_file(path)
    assert tensors["frozen.0_weight_.codes"].numel() == -(-5 * 2 * 9 * 3 // 8)
    assert tensors["frozen.4_weight_.codes"].numel() == 3 * 80 * 5 // 8


def test_outputs_are_the_same_after_a_round_trip(fixed, tmp_path):
    path = export(fixed, tmp_path / "model.safetensors")
    wanted = fixed(X)
    other = copy.deepcopy(fixed)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.zero_()
    load_packed(path).load_into(other)
    assert torch.equal(other(X), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types(dtype, tmp_path):
    model, x = network().to(dtype), X.to(dtype)
    fixed = lowered(model, x=x, widths=(4, 8))
    path = export(fixed, tmp_path / "model.safetensors")
    state = load_packed(path)
    for name, tensor in fixed.named_buffers():
        if not name.startswith("plan."):
            assert torch.equal(state.tensors[name], tensor)
            assert state.tensors[name].dtype == tensor.dtype
    arrays = state.arrays()
    weight = fixed.get_submodule("frozen.4_weight_")()
    np.testing.assert_array_equal(arrays["frozen.4_weight_"], weight.to(torch.float64).numpy())


def test_the_reader_of_the_page_reads_the_same(fixed, tmp_path):
    page = PAGE.read_text()
    source = page.partition("```python reader.py\n")[2].partition("```")[0]
    (tmp_path / "reader.py").write_text(source)
    read = runpy.run_path(str(tmp_path / "reader.py"))["read"]
    manifest, tensors = read(export(fixed, tmp_path / "model.safetensors"))
    own = load_packed(tmp_path / "model.safetensors").arrays()
    assert own.keys() == tensors.keys()
    for name, value in own.items():
        np.testing.assert_array_equal(tensors[name], value)
    for field in manifest:
        assert f"`{field}`" in page
    for kind in ("weights", "quantizers", "operations", "sites", "resources", "tables"):
        for field in manifest[kind][0]:
            assert f"`{field}`" in page, field


def test_affine_weights_keep_their_zero_points(tmp_path):
    fixed = lowered(overrides={"0": {"affine": True, "role": "weight"}}, widths=(4, 8))
    path = export(fixed, tmp_path / "model.safetensors")
    arrays = load_packed(path).arrays()
    module = fixed.get_submodule("frozen.0_weight_")
    assert module.zero_point is not None
    np.testing.assert_array_equal(arrays["frozen.0_weight_"], module().numpy())


# -- the container ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*export_packed.TYPE_NAMES])
def test_both_readers_read_what_the_package_writes(dtype, tmp_path):
    tensors = {"a.b": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.empty(0, 2).to(dtype)}
    save_file(tensors, tmp_path / "file.safetensors", metadata={"who": "someone"})
    found = open_container(tmp_path / "file.safetensors")
    assert found.metadata == {"who": "someone"}
    for name, tensor in tensors.items():
        stored = found.tensors[name]
        assert stored.shape == tuple(tensor.shape)
        assert stored.dtype == export_packed.TYPE_NAMES[dtype]
        assert stored.data.tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_a_file_of_others_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(FileFormatError, match=f"has no manifest, a tensor '{MANIFEST}'"):
        load_packed(tmp_path / "other.safetensors")


# -- wrong calls -----------------------------------------------------------------------------------


def test_other_suffixes_are_refused(fixed, tmp_path):
    for name in ("model.pt", "model", "model.SAFETENSORS"):
        with pytest.raises(
            UsageError,
            match=r"no format has the suffix .*; there is \.onnx, \.pt2, .*tensors",
        ):
            export(fixed, tmp_path / name)
    with pytest.raises(UsageError, match="there is no folder"):
        export(fixed, tmp_path / "no" / "model.safetensors")


def test_only_what_lower_returned_is_exported(tmp_path):
    path = tmp_path / "model.safetensors"
    for given, text in (
        (prepared_network(), "a prepared model, whose bit-widths may still change"),
        (network(), "Sequential, a float model; it takes what cgmq_fx.lower returned"),
        (3, "int, not a model"),
    ):
        with pytest.raises(UsageError, match=text):
            export(given, path)
    assert list(tmp_path.iterdir()) == []


def test_an_over_budget_module_is_never_written(fixed, tmp_path):
    fixed.plan.accounting.limits["weight_memory"] = Fraction(1)
    with pytest.raises(BudgetError, match="exceeds its budgets on weight_memory"):
        export(fixed, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_where_the_new_one_is_wrong(fixed, tmp_path):
    path = export(fixed, tmp_path / "model.safetensors")
    before = path.read_bytes()
    fixed.get_submodule("frozen.0_weight_").packed = torch.zeros(7, dtype=torch.uint8)
    with pytest.raises(FileFormatError, match=r"takes .* bytes at 3 bits, and its codes have 7"):
        export(fixed, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_tables_of_code_have_no_file(tmp_path):
    @computed_cost(op=["conv2d", "linear"], per="mac")
    def price(operation, weight_bits, activation_bits):
        return weight_bits * activation_bits

    table = CostTable(name="mine", unit="cycle", rows=(price,))
    fixed = lowered(budget="100%", cost_table=table)
    with pytest.raises(CostTableError, match="cannot be written to a file"):
        export(fixed, tmp_path / "model.safetensors")


def test_without_safetensors_it_says_how_to_get_it(fixed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match=r"pip install 'cgmq-fx\[export\]'"):
        export(fixed, tmp_path / "model.safetensors")


def test_reading_and_verifying_need_no_safetensors(fixed, tmp_path, monkeypatch):
    path = export(fixed, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert verify(path).satisfied
    assert load_packed(path).bit_widths == fixed.bit_widths


def test_tensors_of_another_module_are_refused(fixed, tmp_path):
    state = load_packed(export(fixed, tmp_path / "model.safetensors"))
    other = lowered(widths=(3, 5, 8, 32), bits=[5, 8, 5, 8])
    with pytest.raises(UsageError, match=r"'frozen.0_weight_' has bits, .* \(3, -3, 3, 0\)"):
        state.load_into(other)
    with pytest.raises(UsageError, match=r"'0\.bias' is only in the file|is only in the module"):
        state.load_into(lowered(nn.Sequential(network(bias=False)), widths=(8,)))
    with pytest.raises(UsageError, match="Sequential is not lowered"):
        state.load_into(network())


def test_names_that_could_be_paths_are_refused(tmp_path):
    model = network()
    model.add_module("a/b", nn.Linear(3, 2))
    with pytest.raises(UsageError, match=r"'a/b.* have names that no packed file holds"):
        export(lowered(model, widths=(8,)), tmp_path / "model.safetensors")


def test_what_was_counted_by_a_run_is_noted(tmp_path):
    x = torch.rand(2, 3, 4)
    model = nn.Sequential(nn.Linear(4, 4), Distances())
    path = export(lowered(model, x=x, widths=(8,)), tmp_path / "model.safetensors")
    (note,) = verify(path).notes
    assert "48 MACs of 1 operations were counted by running the model" in note or "cdist" in note


class Distances(nn.Module):
    def forward(self, x):
        return torch.cdist(x, x)
