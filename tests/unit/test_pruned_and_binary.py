"""Tensors of 0 bits, which are 0 and cost nothing, and weights of 1 bit, which are -s or s."""

import runpy

import pytest
import torch
from torch import nn

from benchmark_scripts import script
from cgmq_fx.cost.load import get_table
from cgmq_fx.cost.operation import Operation
from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.export import export
from cgmq_fx.fit import fit
from cgmq_fx.frozen import FrozenQuantizer
from cgmq_fx.load_exported import load_exported
from cgmq_fx.lower import lower
from cgmq_fx.onnx_qdq import QdqWriter
from cgmq_fx.prepare import prepare
from cgmq_fx.quantizers import QParams, Quantizer, QuantizerSpec
from cgmq_fx.report import report
from cgmq_fx.standard_modules import StandardQuantizer
from cgmq_fx.verify import verify
from source_tree import ROOT

onnx_runs = script("onnx_runs")

X = torch.linspace(-1, 1, 4 * 2 * 8 * 8).reshape(4, 2, 8, 8)
BUDGET = {"bops": "100%", "weight_memory": "100%", "peak_activation_memory": "100%"}
FILES = ("model.safetensors", "model.onnx", "model.qonnx.onnx", "model.pt2")


class Net(nn.Module):
    """Two convolutions, the first with a batch norm that flips signs, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.grouped, self.head = nn.Conv2d(6, 6, 3, groups=2), nn.Linear(96, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5, 0.0]))

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(torch.relu(self.grouped(x)).flatten(1))


def lowered(bits=None, **options):
    torch.manual_seed(0)
    options = {"widths": (0, 1, 4, 8), "learn_input_bits": True, **options}
    made = prepare(Net(), BUDGET, example_inputs=(X,), **options).eval()
    with torch.no_grad():
        made(X)
        made.set_bit_widths([(bits or {}).get(name, 8) for name in made.bit_widths])
        made(X)
    return lower(made, allow_untrained=True)


SITES = ("conv_weight", "x", "grouped_weight", "relu", "head_weight", "flatten")


def test_binary_weights_are_their_mean_size_with_their_signs():
    quantizer = Quantizer(QuantizerSpec("weight", "symmetric", widths=(1,)))
    x = torch.tensor([-3.0, -1.0, 0.0, 2.0, 2.0])
    y = quantizer(x)
    scale = quantizer.qparams().scale
    assert torch.equal(y, torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0]) * scale)
    assert quantizer.quantize(x).tolist() == [-1, -1, 1, 1, 1]
    # The search over ranges is fine to a sixteenth of an octave.
    assert float(scale) == pytest.approx(8 / 5, rel=0.05)
    assert quantizer.qparams()[2:] == (-1, 1, 1)


def test_an_activation_has_no_grid_without_0():
    with pytest.raises(UsageError, match=r"has 1 on a symmetric grid of an activation.*affine"):
        QuantizerSpec("activation", "symmetric", widths=(1, 2))


def test_a_tensor_of_0_bits_is_0_and_its_error_its_size():
    quantizer = Quantizer(QuantizerSpec("activation", "affine", widths=(0, 8)))
    x = torch.tensor([-2.0, 1.0, 4.0], requires_grad=True)
    quantizer.calibrate(x)
    assert quantizer.expected_noise(0) == pytest.approx(7.0)
    quantizer.set_bit_width(0)
    y = quantizer(x)
    y.sum().backward()
    assert not y.any()
    assert not x.grad.any()
    assert not quantizer.multiplier.grad.any()


@pytest.mark.parametrize("name", ["bops", "energy_45nm", "mpic", "bit_serial", "macs"])
def test_nothing_is_computed_with_an_operand_of_0_bits_in_any_table(name):
    table = get_table(name)
    operation = Operation("conv", "conv2d", "f.conv2d", "weight", 100, 10, 10, 9, {"groups": 1})
    assert table.cost(operation, (0, 8)) == table.cost(operation, (8, 0)) == 0
    assert table.cost(operation, (8, 8)) > 0


def test_what_a_pruned_tensor_feeds_is_free_and_it_takes_no_memory():
    # conv: 36 outputs x 18 weights x 6 channels at 8 x 8 bits; head: 96 x 5 at 1 x 8 bits.
    fixed = lowered({"grouped_weight": 0, "head_weight": 1})
    costs = {row.name: row.cost["bops"] for row in report(fixed).rows if row.macs}
    assert costs == {"conv": 36 * 18 * 6 * 64, "grouped": 0, "head": 96 * 5 * 8}
    # 108 codes of 8 bits, none, 480 of 1 bit; biases 6 + 6 + 5, and 12 of the batch norm, in float.
    assert report(fixed).totals["weight_memory"] == 108 + 0 + 60 + 4 * (6 + 6 + 5 + 12)
    frozen = fixed.frozen
    assert (frozen.grouped_weight.packed.numel(), frozen.head_weight.packed.numel()) == (0, 60)
    without = lowered({"relu": 0})
    assert {row.name: row.cost["bops"] for row in report(without).rows if row.macs}["grouped"] == 0


@pytest.mark.parametrize("bits", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_every_format_holds_it(site, bits, tmp_path):
    fixed = lowered({site: bits})
    wanted = fixed(X)
    fixed.integer_reference(X)
    for name in FILES:
        path = export(fixed, tmp_path / name, example_inputs=(X,))
        assert verify(path).to_json() == report(fixed).to_json()
        if name == "model.onnx":  # where two roundings of one value differ, a code does
            (found,) = onnx_runs.run(path, (X,), onnx_runs.UNOPTIMIZED)
        elif name == "model.qonnx.onnx":
            (found,) = onnx_runs.run_qonnx(path, (X,))
        elif name == "model.pt2":
            found = load_exported(path)(X)
        else:
            continue
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5, msg=lambda m, n=name: n + m)


def test_the_reader_of_the_page_and_the_package_read_the_same(tmp_path):
    fixed = lowered({"conv_weight": 1, "grouped_weight": 0, "head_weight": 1})
    path = export(fixed, tmp_path / FILES[0])
    page = (ROOT / "docs/formats/safetensors.md").read_text()
    (tmp_path / "reader.py").write_text(
        page.partition("```python reader.py\n")[2].partition("```")[0]
    )
    _, found = runpy.run_path(str(tmp_path / "reader.py"))["read"](path)
    for name in ("conv_weight", "grouped_weight", "head_weight"):
        module = fixed.get_submodule(f"frozen.{name}")
        assert torch.equal(torch.from_numpy(found[f"frozen.{name}"]).float(), module())


def test_a_binary_tensor_that_is_no_constant_has_no_standard_operator():
    qparams = QParams(torch.tensor(0.5), torch.tensor(0), -1, 1, 1)
    frozen = FrozenQuantizer("site", "weight", qparams, None)
    assert frozen(torch.tensor([-3.0, -0.0, 0.2])).tolist() == [-0.5, 0.5, 0.5]
    with pytest.raises(UnsupportedModelError, match=r"'site' has 1 bit, -1 or 1, .*\.qonnx\.onnx"):
        StandardQuantizer(frozen)
    with pytest.raises(UnsupportedModelError, match="'site' has 1 bit, -1 or 1"):
        QdqWriter.activation(None, "x", "y", "site", frozen)


def test_a_budget_that_nothing_wider_meets_is_met_by_training():
    torch.manual_seed(0)
    made = prepare(Net(), "0.2%", example_inputs=(X,), widths=(0, 1, 2, 4, 8))
    target = torch.tensor([0, 1, 2, 3])
    loader = [(X, target)] * 10
    result = fit(made, loader, nn.functional.cross_entropy, epochs=3)
    found = report(result.fixed)
    assert found.satisfied
    assert found.totals["bops"] * 1000 <= 2 * made.plan.accounting.resources["bops"].reference
    assert min(result.fixed.bit_widths.values()) < 2
