"""ONNX files, QDQ and QONNX: runtimes agree with the module, and `verify` with its report."""

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from benchmark_scripts import script
from cgmq_fx.errors import FileFormatError, UsageError
from cgmq_fx.export import export
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from cgmq_fx.verify import verify

onnx_runs = script("onnx_runs")
script("mutated_files")  # it makes the modules beside it known
mutated_onnx = script("mutated_onnx")

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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stretch", [1.0, 0.6, 1.5])
def test_a_relu6_in_front_of_a_grid_that_ends_within_it_is_left_out(bits, stretch, tmp_path):
    """With it ONNX Runtime would compute the convolution in float."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU6(), nn.Conv2d(6, 4, 3), nn.ReLU6())
    with torch.no_grad():
        model[0].weight.mul_(20)  # the grid of the ReLU6 ends at 6
    fixed = lowered(model, **widths(bits))
    grid = fixed.frozen.get_submodule("_1")
    grid.scale.fill_(stretch * 6 / grid.quant_max)
    path = export(fixed, tmp_path / "model.onnx", example_inputs=(X,))
    nodes = onnx.load(path).graph.node
    on_values = [n for n in nodes if n.op_type == "Clip" and "codes" not in n.input[0]]
    assert len(on_values) == (2 if stretch > 1 else 1), "the last one has no grid behind it"
    (found,) = onnx_runs.run(path, (X,), onnx_runs.UNOPTIMIZED)
    torch.testing.assert_close(found, fixed(X), rtol=0, atol=2e-4)
    onnx_runs.session(path, optimized=tmp_path / "optimized.onnx")
    kernels = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kernels.count("QLinearConv") == (bits == 8 and stretch <= 1)


def test_a_relu6_that_others_read_stays(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)

        def forward(self, x):
            x = nn.functional.relu6(40 * self.first(x))
            return self.second(x), x

    fixed = lowered(Both(), **widths(8))
    path = export(fixed, tmp_path / "model.onnx", example_inputs=(X,))
    for found, wanted in zip(onnx_runs.run(path, (X,)), fixed(X), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


class Reused(nn.Module):
    """A convolution and a linear layer that are called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(128, 128)

    def forward(self, x):
        x = self.conv(torch.relu(self.conv(x))).flatten(1)
        return self.linear(torch.relu(self.linear(x)))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("affine", [False, True])
def test_weights_that_several_operations_read_load_where_codes_become_unsigned(
    bits, affine, tmp_path
):
    overrides = {"*": {"affine": True}} if affine else None
    fixed = lowered(Reused(), **widths(bits), overrides=overrides)
    path = export(fixed, tmp_path / "model.onnx", example_inputs=(X,))
    assert str(verify(path)) == str(report(fixed))
    for x in (X, X[:1]):
        (found,) = onnx_runs.run(path, (x,), onnx_runs.UNOPTIMIZED)
        torch.testing.assert_close(found, fixed(x), rtol=0, atol=2e-5)
    onnx_runs.session(path, optimized=tmp_path / "optimized.onnx")
    kernels = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert bits < 8 or kernels.count("QLinearConv") == 2


@pytest.mark.parametrize("name", FILES)
def test_attention_weights_that_nobody_reads_are_no_part_of_a_file(name, tmp_path):
    class Attended(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    x = torch.randn(3, 5, 4)
    budget = {"bops": "100%", "peak_activation_memory": "1 GiB"}
    made = prepare(Attended(), budget, example_inputs=(x,), widths=(8, 32)).eval()
    with torch.no_grad():
        made(x)
        made.set_bit_widths([site.allowed[0] for site in made.plan.accounting.sites])
        made(x)
    fixed = lower(made, allow_untrained=True)
    assert str(verify(export(fixed, tmp_path / name, example_inputs=(x,)))) == str(report(fixed))


def test_raised_codes_are_held_against_the_manifest(tmp_path):
    path = export(lowered(Reused(), **widths(8)), tmp_path / "model.onnx", example_inputs=(X,))
    model = onnx.load(path)
    for name, message in (("codes", "SHA-256"), ("zero_point", "another shape or value")):
        forged = onnx.ModelProto()
        forged.CopyFrom(model)
        (held,) = (i for i in forged.graph.initializer if i.name == f"frozen.conv_weight.{name}")
        assert held.data_type == onnx.TensorProto.UINT8
        held.raw_data = bytes([held.raw_data[0] ^ 1]) + held.raw_data[1:]
        other = tmp_path / "forged.onnx"
        other.write_bytes(mutated_onnx.signed(forged))
        with pytest.raises(FileFormatError, match=message):
            verify(other)


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


def test_a_convolution_in_front_of_a_maximum_pool_runs_on_integers(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 25, 4),
    )  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    prepared = prepare(model, "100%", example_inputs=(x,), widths=(8,)).eval()
    prepared(x)
    prepared.set_bit_widths([8] * len(prepared.bit_widths))
    path = export(
        lower(prepared, allow_untrained=True), tmp_path / "model.onnx", example_inputs=(x,)
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options)
    made = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert made.count("QLinearConv") == 2
    assert "Conv" not in made
