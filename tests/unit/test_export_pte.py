"""``.pte`` files run in ExecuTorch, say what the report says, and are refused when they do not."""

import random

import pytest
import torch
from torch import nn

from benchmark_scripts import script
from cgmq_fx import export, lower, prepare, report, verify
from cgmq_fx.errors import FileFormatError, UsageError
from cgmq_fx.packed_file import open_packed
from cgmq_fx.pte_file import open_pte

pytest.importorskip("executorch")
pytestmark = pytest.mark.filterwarnings("ignore")
executorch_runs = script("executorch_runs")


def network():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 12, 1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(12 * 9, 10), nn.ReLU(), nn.Linear(10, 4)).eval()


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def lowered(*bits):
    """Return the network with these bit-widths in turn."""
    made = prepare(network(), "100%", example_inputs=(X,), widths=(*range(1, 17), 32))
    made.eval()
    with torch.no_grad():
        made(X)
        sites = made.plan.accounting.sites
        chosen = [
            bits[place % len(bits)] if site.learned else 8 for place, site in enumerate(sites)
        ]
        made.set_bit_widths(chosen)
        made(X)
    return lower(made, allow_untrained=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bytes of one file."""
    folder = tmp_path_factory.mktemp("pte")
    return export(lowered(4, 8), folder / "model.pte", example_inputs=(X,)).read_bytes()


@pytest.mark.parametrize("bits", [(8,), (2,), (16, 4), (3, 32, 5), (1, 7)])
def test_the_file_says_what_the_report_says_and_runs(bits, tmp_path):
    fixed = lowered(*bits)
    path = export(fixed, tmp_path / "model.pte", example_inputs=(X,))
    assert str(verify(path)) == str(report(fixed))
    for x in (X, X[:1]):  # any batch up to the example's
        (found,) = executorch_runs.run(path, [x])
        wanted = fixed(x)
        assert found.shape == wanted.shape
        # A bias is rounded to a step of the accumulator, which is much at 2 bits.
        share = 0.25 if max(bits) == 2 else 0.05
        assert float((found - wanted).abs().max()) < share * float(wanted.abs().max())


def test_weights_are_the_modules_to_the_bit(exported, tmp_path):
    packed = export(lowered(4, 8), tmp_path / "model.safetensors")
    path = tmp_path / "model.pte"
    path.write_bytes(exported)
    ours, theirs = open_pte(path), open_packed(packed)
    names = [f"{weight.name}.codes" for weight in theirs.manifest.weights]
    assert names
    for name in names:
        mine, other = (item.container.tensors[name].data for item in (ours, theirs))
        assert bytes(mine) == bytes(other)


def test_damaged_files_are_refused(exported, tmp_path):
    path, data = tmp_path / "model.pte", exported
    path.write_bytes(data)
    assert verify(path).satisfied
    rng = random.Random(0)
    for at in range(0, len(data), len(data) // 150):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError):
            verify(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(FileFormatError):
        verify(path)


@pytest.mark.parametrize("kind", ["weights", "quantizers"])
def test_a_width_that_was_tampered_with_is_caught(kind, exported, tmp_path):
    path = tmp_path / "model.pte"
    path.write_bytes(exported)

    def narrow(manifest):
        grid = manifest[kind][0]
        half = 1 << (grid["bits"] - 2)
        is_signed = grid["quant_min"] < 0
        grid["quant_min"] = -half if is_signed else 0
        grid["quant_max"] = half - 1 if is_signed else 2 * half - 1
        grid["bits"] -= 1
        return manifest

    forge = script("mutated_files").mutated_pte.with_manifest
    path.write_bytes(forge(exported, lambda manifest: manifest))
    assert verify(path).satisfied  # signed again, it is sound
    path.write_bytes(forge(exported, narrow))
    with pytest.raises(FileFormatError, match="contradicts itself"):
        verify(path)


def test_inputs_are_needed(tmp_path):
    with pytest.raises(UsageError, match=r"give it some: cgmq_fx\.export\(fixed, path, exam"):
        export(lowered(8), tmp_path / "model.pte")
