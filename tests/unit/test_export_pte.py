"""``.pte`` files: what ExecuTorch computes from them, what is in them, and what is refused."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmark_scripts import script
from cgmq_fx.cli import main
from cgmq_fx.container import FileFault
from cgmq_fx.errors import FileFormatError, UnsupportedModelError, UsageError
from cgmq_fx.export import export
from cgmq_fx.lower import lower
from cgmq_fx.manifest import POOL
from cgmq_fx.prepare import prepare
from cgmq_fx.pte_file import DIGEST, PLACES, open_pte
from cgmq_fx.report import report
from cgmq_fx.verify import verify
from cgmq_fx.xnnpack_reader import LAYERS, QINT8, read_xnnpack

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is not installed"),
]
mutated_pte = script("mutated_files").mutated_pte
executorch_runs = script("verify_agrees").executorch_runs

IMAGE = torch.linspace(-1, 1, 4 * 3 * 10 * 10).reshape(4, 3, 10, 10).sin()


class ConvNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=6), nn.ReLU(),
            nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 5),
        )  # fmt: skip


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Tied(nn.Module):
    """One weight in an int8 layer and in one whose output stays float."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(F.relu(self.linear(x)))


def lowered(model, x, widths):
    """Return the model lowered at these widths, which take turns from site to site."""
    torch.manual_seed(0)
    made = prepare(model, "100%", example_inputs=(x,), widths=widths).eval()
    made(x)
    bits = [[width for width in site.allowed if width < 32] for site in made.plan.accounting.sites]
    made.set_bit_widths([allowed[i % len(allowed)] for i, allowed in enumerate(bits)])
    made(x)
    return lower(made, allow_untrained=True)


def assert_agree(fixed, path, x):
    """Compare with codes in mind: few outputs differ, and by little."""
    with torch.no_grad():
        wanted = fixed(x)
    (found,) = executorch_runs.run(path, [x])
    assert found.shape == wanted.shape
    size = wanted.abs().max()
    assert (wanted - found).abs().max() <= 0.05 * size
    assert ((wanted - found).abs() > 1e-4 * size).float().mean() <= 0.2


def graphs_of(path):
    file = mutated_pte.opened(path.read_bytes())
    return [read_xnnpack(part, FileFault("file")) for part in file.delegates]


@pytest.fixture(scope="module")
def convnet():
    return lowered(ConvNet(), IMAGE, (2, 3, 4, 5, 8))


@pytest.fixture(scope="module")
def path(convnet, tmp_path_factory):
    return export(convnet, tmp_path_factory.mktemp("pte") / "model.pte", example_inputs=(IMAGE,))


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "x", "widths"),
    [
        (ConvNet(), IMAGE, (8,)),
        (ConvNet(), IMAGE, (0, 1, 12, 8)),
        (Attention(), torch.randn(2, 5, 8), (4, 8)),
        (Tied(), torch.randn(3, 6), (8,)),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.GELU()),
         torch.randn(2, 4, 7, 7), (4, 8)),
        (nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 3)), torch.tensor([[1, 2], [3, 6]]), (4,)),
    ],
    ids=["8 bits", "other widths", "attention", "tied", "transposed", "embedding"],
)  # fmt: skip
def test_the_program_computes_what_the_module_does(model, x, widths, tmp_path):
    fixed = lowered(model, x, widths)
    path = export(fixed, tmp_path / "model.pte", example_inputs=(x,))
    assert_agree(fixed, path, x)
    assert str(verify(path)) == str(report(fixed))


def test_the_batch_is_any_up_to_that_of_the_example(convnet, path):
    for batch in (1, 2, 4):
        assert_agree(convnet, path, IMAGE[:batch] * 0.9)
    with pytest.raises(RuntimeError, match="failed"):
        executorch_runs.run(path, [IMAGE.repeat(2, 1, 1, 1)])


def test_layers_between_grids_are_int8(path):
    kinds = [
        {graph.values[name].kind for name in (node.inputs[0], node.output)}
        for graph in graphs_of(path)
        for node in graph.nodes
        if node.kind in LAYERS
    ]
    assert kinds[:-1] == [{QINT8}] * 4  # also at 2 to 5 bits
    assert QINT8 not in kinds[-1]  # its output has no quantizer


def test_narrow_codes_are_finer_in_xnnpack(convnet, path):
    """A bias is rounded to a step of the sums, which is coarse at 2 bits."""
    weight = convnet.get_submodule("frozen.0_weight_")
    assert (weight.bit_width, weight.quant_max) == (2, 1)
    first = next(node for g in graphs_of(path) for node in g.nodes if node.kind in LAYERS)
    graph = graphs_of(path)[0]
    file = mutated_pte.opened(path.read_bytes())
    value = graph.values[first.inputs[1]]
    codes = np.frombuffer(file.named[value.key], np.int8)
    scale = np.frombuffer(file.named[value.scale_key], np.float32)
    assert set(codes.tolist()) <= {-64, 0, 64}
    np.testing.assert_array_equal(scale * 64, weight.scale.numpy())


def test_weights_and_other_tensors_are_found(convnet, path):
    stored = open_pte(path)
    assert set(stored.manifest.parameters) == set(dict(convnet.named_parameters()))
    for weight in stored.manifest.weights:
        module = convnet.get_submodule(weight.name)
        np.testing.assert_array_equal(stored.codes(weight), module.codes.numpy())


def test_the_command_verifies_it(path, capsys):
    assert main(["verify", str(path)]) == 0
    shown = capsys.readouterr()
    assert "within budget" in shown.out
    assert "note: 4 of 5 convolutions and linear layers are computed in int8; the" in shown.err


# -- what is refused -------------------------------------------------------------------------------


def test_it_needs_example_inputs(convnet, tmp_path):
    with pytest.raises(UsageError, match=r"records the calls of ConvNet on inputs; .*\(x,\)\)"):
        export(convnet, tmp_path / "model.pte")
    assert list(tmp_path.iterdir()) == []


def test_it_needs_the_package(convnet, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(UsageError, match=r"package executorch, .* 'cgmq-fx\[executorch\]'"):
        export(convnet, tmp_path / "model.pte", example_inputs=(IMAGE,))


def test_operations_without_a_kernel_are_refused(tmp_path):
    x = torch.randn(1, 2, 4, 4, 4)
    fixed = lowered(nn.Conv3d(2, 3, 2), x, (8,))
    with pytest.raises(UnsupportedModelError, match=r"no form in ExecuTorch: .*failed with error"):
        export(fixed, tmp_path / "model.pte", example_inputs=(x,))


def test_other_float_types_are_refused(tmp_path):
    x = torch.randn(2, 3).double()
    fixed = lowered(nn.Linear(3, 2).double(), x, (8,))
    with pytest.raises(UsageError, match="float64"):
        export(fixed, tmp_path / "model.pte", example_inputs=(x,))


def refused(data, tmp_path, text):
    other = tmp_path / "other.pte"
    other.write_bytes(data)
    with pytest.raises(FileFormatError, match=text):
        verify(other)


def narrower_quantizer(manifest):
    manifest["quantizers"][0]["bits"] = 2
    manifest["quantizers"][0].update(quant_min=0, quant_max=3)


def narrower_weight(manifest):
    weight = next(item for item in manifest["weights"] if item["bits"] == 8)
    weight.update(bits=2, quant_min=-1, quant_max=1)


def unknown_quantizer(manifest):
    del manifest["quantizers"][1]


def other_digest(manifest):
    manifest["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (narrower_quantizer, "codes -128 to 127 at scale .*, which no quantizer .* width or grid"),
        (narrower_weight, "do not fit 2 signed bits"),
        (unknown_quantizer, "which no quantizer of the manifest has"),
        (other_digest, "the SHA-256 of its tensors is"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_manifest_that_says_another_width_is_refused(edit, text, path, tmp_path):
    manifest = mutated_pte.manifest_of(path.read_bytes())
    edit(manifest)
    refused(mutated_pte.with_manifest(path.read_bytes(), manifest), tmp_path, text)


def test_a_wider_clamp_is_refused(path, tmp_path):
    """At 4 bits the program clamps; without that it would compute with 8."""
    data = path.read_bytes()
    graph = graphs_of(path)[0]
    top = next(node.clamp[1] for node in graph.nodes if node.clamp is not None)
    word = np.float32(top).tobytes()
    assert word in data
    wider = data.replace(word, np.float32(8 * top).tobytes())
    refused(mutated_pte.signed(wider), tmp_path, "which no quantizer of the manifest has")


def test_other_weights_and_scales_are_refused(path, tmp_path):
    data = path.read_bytes()
    file, graph = mutated_pte.opened(data), graphs_of(path)[0]
    value = next(v for v in graph.values.values() if v.scale_key)
    codes = bytearray(file.named[value.key])
    codes[0] = 0 if codes[0] == 64 else 64
    changed = mutated_pte.with_named(data, {value.key: bytes(codes)})
    refused(changed, tmp_path, "SHA-256 of its tensors|integers between")
    scale = np.frombuffer(file.named[value.scale_key], np.float32) * 3
    changed = mutated_pte.with_named(data, {value.scale_key: scale.tobytes()})
    refused(changed, tmp_path, "does not have the weight")
    pool = bytes(len(file.named[f"{POOL}.F32"]))
    refused(mutated_pte.with_named(data, {f"{POOL}.F32": pool}), tmp_path, "contradicts itself")


def test_places_outside_of_the_file_are_refused(path, tmp_path):
    data = path.read_bytes()
    changed = mutated_pte.with_named(data, {PLACES: b'[["a.b","../x",[1],[0]]]'})
    refused(changed, tmp_path, "'../x', which are none of a tensor|has the bytes")
    refused(mutated_pte.with_named(data, {PLACES: b"[[1]]"}), tmp_path, "a place of a tensor")


def test_damage_is_seen(path, tmp_path):
    data = path.read_bytes()
    for at in range(64, len(data), len(data) // 40):
        refused(data[:at], tmp_path, "is damaged")
        flipped = bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]])
        refused(flipped, tmp_path, "is damaged")
    at = mutated_pte.opened(data).places[DIGEST]
    refused(data[:at] + bytes(32) + data[at + 32 :], tmp_path, "has a SHA-256 that is")


def test_programs_of_others_are_refused(path, tmp_path):
    data = path.read_bytes()
    refused(data[:4] + b"ET12" + bytes(40), tmp_path, "has no header")
    other = data.replace(b"XnnpackBackend", b"OthernnBackend")
    refused(other, tmp_path, "has a part for 'OthernnBackend', not for 'XnnpackBackend'")
    other = data.replace(b"executorch_prim::et_view", b"somebody::runs_a_program")
    refused(other, tmp_path, "calls 'somebody::runs_a_program', which is no known operator")


def test_example_inputs_may_lie_in_another_order(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip
    given = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    fixed = lowered(model, given, (8,))
    file = export(fixed, tmp_path / "model.pte", example_inputs=(given,))
    for x in (given, given.contiguous()):
        (found,) = executorch_runs.run(file, [x])
        with torch.no_grad():
            wanted = fixed(x)
        assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.abs().max())
