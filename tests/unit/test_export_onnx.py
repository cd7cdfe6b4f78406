"""ONNX files, QDQ and QONNX: runtimes agree with the module, and `verify` with its report."""

import onnx
import pytest
import torch
from torch import nn

from benchmark_scripts import script
from cgmq_fx.errors import UsageError
from cgmq_fx.export import export
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from cgmq_fx.verify import verify

onnx_runs = script("onnx_runs")

X = torch.linspace(-1, 1, 3 * 2 * 8 * 8).reshape(3, 2, 8, 8)
FILES = ("model.onnx", "model.qonnx.onnx")


class Residual(nn.Module):
    """Convolutions, a sum, pools and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(6, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.conv(x) + x)
        return self.head(x.mean((2, 3)))


def lowered(model=None, bits=None, x=X, **options):
    torch.manual_seed(0)
    model = Residual() if model is None else model
    budget = {"bops": "100%", "weight_memory": "100%"}
    made = prepare(model, budget, example_inputs=(x,), **options).eval()
    with torch.no_grad():
        made(x)
        made.set_bit_widths(bits or [site.allowed[0] for site in made.plan.accounting.sites])
        made(x)
    return lower(made, allow_untrained=True)


def widths(bits):
    """Return options with one width for everything but the input."""
    return {"widths": (bits, 32)}


@pytest.mark.parametrize(
    ("name", "bits"),
    [*((FILES[0], bits) for bits in (2, 5, 8, 11, 16)), *((FILES[1], bits) for bits in (3, 8))],
)
def test_every_width_computes_what_the_module_does(name, bits, tmp_path):
    fixed = lowered(**widths(bits))
    path = export(fixed, tmp_path / name, example_inputs=(X,))
    assert str(verify(path)) == str(report(fixed))
    run = onnx_runs.run_qonnx if "qonnx" in name else onnx_runs.run
    for x in (X, X[:1], X[:2]):  # any batch size
        (found,) = run(path, (x,))
        torch.testing.assert_close(found, fixed(x), rtol=0, atol=2e-5)


def test_products_with_floats_are_not_rounded_by_the_runtime(tmp_path):
    """ONNX Runtime would take 8-bit weights into a kernel that rounds the other operand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    x = torch.randn(3, 5, 32)
    for bits in (32, 4, 8):  # of the other operands
        made = prepare(
            model, "100%", example_inputs=(x,), widths=(4, 8, 32), learn_input_bits=True
        ).eval()
        with torch.no_grad():
            made(x)
            made.set_bit_widths([8 if "weight" in name else bits for name in made.bit_widths])
            made(x)
        fixed = lower(made, allow_untrained=True)
        path = export(fixed, tmp_path / "model.onnx", example_inputs=(x,))
        (found,) = onnx_runs.run(path, (x,))
        torch.testing.assert_close(found, fixed(x), rtol=0, atol=2e-5)


def test_float_weights_behind_8_bit_operands_stay_float_in_the_runtime(tmp_path):
    """ONNX Runtime would quantize them itself."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 5, 3), nn.MaxPool2d(2), nn.ConvTranspose2d(5, 4, 3), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(4 * 5 * 5, 7), nn.Linear(7, 7))
    x = torch.randn(2, 3, 8, 8)
    made = prepare(model, "100%", example_inputs=(x,), widths=(8, 32), learn_input_bits=True).eval()
    with torch.no_grad():
        made(x)
        made.set_bit_widths([32 if "weight" in name else 8 for name in made.bit_widths])
        made(x)
    fixed = lower(made, allow_untrained=True)
    path = export(fixed, tmp_path / "model.onnx", example_inputs=(x,))
    assert str(verify(path)) == str(report(fixed))
    (found,) = onnx_runs.run(path, (x,))
    torch.testing.assert_close(found, fixed(x), rtol=0, atol=2e-5)


def test_the_file_is_sound_onnx_and_stores_integers(tmp_path):
    path = export(lowered(**widths(4)), tmp_path / "model.onnx", example_inputs=(X,))
    onnx.checker.check_model(str(path), full_check=True)
    kinds = {item.name: item.data_type for item in onnx.load(path).graph.initializer}
    assert kinds["frozen.conv_weight.codes"] == onnx.TensorProto.INT4
    assert kinds["frozen.x.zero_point"] == onnx.TensorProto.UINT8


@pytest.mark.parametrize("name", FILES)
def test_inputs_are_needed(name, tmp_path):
    with pytest.raises(UsageError, match=r"give it some: cgmq_fx\.export\(fixed, path, exam"):
        export(lowered(), tmp_path / name)


def test_a_format_may_be_named(tmp_path):
    fixed = lowered()
    path = export(fixed, tmp_path / "model.onnx", example_inputs=(X,), format="qonnx")
    assert "Quant" in {node.op_type for node in onnx.load(path).graph.node}
    with pytest.raises(UsageError, match=r"no format 'tflite'; there is onnx, pt2, pte, qonnx"):
        export(fixed, tmp_path / "model.onnx", format="tflite")
