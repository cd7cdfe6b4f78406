"""``.pt2`` files: what a program computes, what is in the file, and what is refused."""

import json
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cgmq_fx.errors import FileFormatError, UnsupportedModelError, UsageError
from cgmq_fx.export import export
from cgmq_fx.load_exported import load_exported
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.program_file import MANIFEST_RECORD, open_program
from cgmq_fx.report import report
from cgmq_fx.verify import verify

IMAGE = torch.linspace(-1, 1, 2 * 1 * 28 * 28).reshape(2, 1, 28, 28)
GRAPH = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


class LeNet5(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.other(self.second(F.relu(self.norm(self.first(x))))))


class ResNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), Block(8), nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(), Block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        )  # fmt: skip


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class ReturnsPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        y = self.linear(x)
        return Pair(y, y + 1)


def lowered(model, x, widths=(2, 3, 4, 5, 8), budget="100%", **options):
    """Return the model lowered at widths that vary from site to site."""
    torch.manual_seed(0)
    made = prepare(model, budget, example_inputs=(x,), widths=widths, **options).eval()
    made(x)
    sites = made.plan.accounting.sites
    made.set_bit_widths([site.allowed[i % len(site.allowed)] for i, site in enumerate(sites)])
    made(x)
    return lower(made, allow_untrained=True)


def program(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(path).module()


def rewritten(path, change, target):
    """Copy an archive with some of its records changed; None leaves one out."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            root, _, rest = name.partition("/")
            content = change(rest, old.read(name))
            if content is not None:
                new.writestr(f"{root}/{rest}", content)
        for rest, content in change("", b"") or ():
            new.writestr(f"{root}/{rest}", content)
    return target


@pytest.fixture(scope="module")
def lenet():
    return lowered(LeNet5(), IMAGE)


@pytest.fixture(scope="module")
def path(lenet, tmp_path_factory):
    return export(lenet, tmp_path_factory.mktemp("pt2") / "model.pt2", example_inputs=(IMAGE,))


def assert_agree(fixed, module, x):
    """Compare with codes in mind: those at a rounding boundary may differ by one.

    Where no value is at one, all is equal up to the sums of float kernels. A code apart moves an
    output by at most about one step of an activation, so that few outputs differ, and by little.
    """
    wanted, found = fixed(x), module(x)
    assert wanted.shape == found.shape
    size = wanted.abs().max()
    assert (wanted - found).abs().max() <= 0.05 * size
    assert ((wanted - found).abs() > 1e-5 * size).float().mean() <= 0.1


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (LeNet5(), IMAGE),
        (ResNet(), IMAGE),
        (Attention(), torch.randn(2, 5, 8)),
        (nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU()), IMAGE),
        (nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)),
         torch.randn(2, 4, 9)),
        (nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 3)), torch.tensor([[1, 2], [3, 6]])),
    ],
    ids=["lenet", "resnet", "attention", "transposed", "groups", "embedding"],
)  # fmt: skip
def test_the_program_computes_what_the_module_does(model, x, tmp_path):
    fixed = lowered(model, x)
    path = export(fixed, tmp_path / "model.pt2", example_inputs=(x,))
    module = program(path)
    for batch in (1, 2, 5):
        chosen = x[torch.arange(batch) % len(x)]
        assert_agree(fixed, module, chosen if chosen.dtype == torch.int64 else chosen * 0.9)
    assert str(verify(path)) == str(report(fixed))


def test_weights_are_integers_in_the_file(lenet, path):
    stored = open_program(path)
    state = torch.export.load(path).state_dict
    for name, module in lenet.frozen.named_children():
        if module.role != "weight":
            continue
        codes = state[f"frozen.{name}.codes"]
        assert codes.dtype is torch.int8
        assert torch.equal(codes.int(), module.codes.int())
        weight = next(w for w in stored.manifest.weights if w.name == f"frozen.{name}")
        np.testing.assert_array_equal(stored.codes(weight), module.codes.numpy())


def test_the_file_names_no_code_and_holds_no_pickle(path):
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            assert b"archive/data.pkl" not in content
            assert b".py" not in content
            assert not name.endswith("sample_inputs/model.pt") or not content


def test_a_batch_of_one_leaves_the_batch_open(tmp_path, lenet):
    path = export(lenet, tmp_path / "model.pt2", example_inputs=(IMAGE[:1],))
    assert program(path)(IMAGE.repeat(3, 1, 1, 1)).shape == (6, 10)


def test_it_needs_example_inputs(lenet, tmp_path):
    with pytest.raises(UsageError, match=r"records the calls of LeNet5 on inputs; .*\(x,\)\)"):
        export(lenet, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_types_of_the_users_code_are_refused(tmp_path):
    fixed = lowered(ReturnsPair(), torch.randn(2, 3))
    with pytest.raises(UnsupportedModelError, match=r"returns a namedtuple, which \.pt2 does not"):
        export(fixed, tmp_path / "model.pt2", example_inputs=(torch.randn(2, 3),))


def test_a_sound_file_is_loaded_and_another_is_not(lenet, path, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_agree(lenet, load_exported(path), IMAGE)
    other = rewritten(path, json_change(GRAPH, guard), tmp_path / "other.pt2")
    with pytest.raises(FileFormatError, match="names code"):
        load_exported(other)


def test_other_float_types_are_refused(tmp_path):
    fixed = lowered(nn.Linear(3, 2).double(), torch.randn(2, 3).double())
    with pytest.raises(UsageError, match=r"computes in torch.float64, .* in torch.float32 alone"):
        export(fixed, tmp_path / "model.pt2", example_inputs=(torch.randn(2, 3).double(),))


# -- tampering -------------------------------------------------------------------------------------


def refused(path, text):
    with pytest.raises(FileFormatError, match=text):
        verify(path)


def json_change(record, edit):
    def change(name, content):
        if name != record:
            return None if name == "" else content
        value = json.loads(content)
        edit(value)
        return json.dumps(value)

    return change


def nodes_of(model, operator):
    nodes = model["graph_module"]["graph"]["nodes"]
    return [node for node in nodes if operator in node["target"]]


def set_argument(node, name, value):
    (item,) = (item for item in node["inputs"] if item["name"] == name)
    item["arg"] = value


def narrower(model):
    for node in nodes_of(model, "quantize_per_tensor"):
        set_argument(node, "quant_max", {"as_int": 3})


def wider_weight(model):
    for node in nodes_of(model, "dequantize_per_channel"):
        set_argument(node, "quant_max", {"as_int": 127})


def other_scale(model):
    for node in nodes_of(model, "quantize_per_tensor"):
        set_argument(node, "scale", {"as_float": 0.5})


def one_more(model):
    (node, *_) = nodes_of(model, ".quantize_per_tensor")
    twin = json.loads(json.dumps(node).replace(node["name"], "quantize_77"))
    model["graph_module"]["graph"]["nodes"].append(twin)


def unquantized(model):
    for node in nodes_of(model, "aten.conv2d"):
        set_argument(node, "input", {"as_tensor": {"name": "quantize_0"}})


def other_axis(model):
    for node in nodes_of(model, "dequantize_per_channel"):
        set_argument(node, "axis", {"as_int": 1})


def expression(model):
    text = json.dumps(model).replace("Symbol('s", "__import__('os').system('true') + Symbol('s")
    model.clear()
    model.update(json.loads(text))


def guard(model):
    model["guards_code"] = ["__import__('os').system('true')"]


def function(model):
    model["graph_module"]["graph"]["nodes"][0]["target"] = "os.system"


def reads_a_file(model):
    model["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def code_in_a_name(model):
    model["graph_module"]["graph"]["nodes"][-1]["name"] = "x; import os"


def imported_type(model):
    tree = [1, {"type": "collections.defaultdict", "context": "os.system", "children_spec": []}]
    model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(tree)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (narrower, r"gives 'frozen\..*' 8 bits, and 'quantize_0' has the codes 0 to 3"),
        (wider_weight, r"bits, and 'dequantize_per_channel.*' has the codes -1 to 127"),
        (other_scale, r"SHA-256|another shape or value"),
        (one_more, r"quantizes 'quantize_77', which the manifest does not know"),
        (unquantized, r"'conv2d' reads the codes 'quantize_0' as they are"),
        (other_axis, r"on another grid"),
        (expression, r"the size .* is no sum or product"),
        (guard, r"names code"),
        (function, r"call of 'os.system', which is no known operator"),
        (reads_a_file, r"from_file.* is no known operator"),
        (code_in_a_name, r"'x; import os', which is no identifier"),
        (imported_type, r"a structure of the type 'collections.defaultdict'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_changed_graphs_are_refused(edit, text, path, tmp_path):
    refused(rewritten(path, json_change(GRAPH, edit), tmp_path / "other.pt2"), text)


def test_a_changed_width_in_the_manifest_is_refused(path, tmp_path):
    def edit(manifest):
        manifest["quantizers"][1]["bits"] = 2
        manifest["quantizers"][1]["quant_max"] = 3

    other = rewritten(path, json_change(f"extra/{MANIFEST_RECORD}", edit), tmp_path / "other.pt2")
    refused(other, r"2 bits, and 'quantize_1' has the codes")


def pickled(state):
    next(iter(state["config"].values()))["use_pickle"] = True


def reaching_out(state):
    next(iter(state["config"].values()))["path_name"] = "../../../etc/passwd"


@pytest.mark.parametrize(
    ("edit", "text"), [(pickled, "as a pickle"), (reaching_out, "has no bytes of the tensor")]
)
def test_changed_lists_of_tensors_are_refused(edit, text, path, tmp_path):
    refused(rewritten(path, json_change(WEIGHTS, edit), tmp_path / "other.pt2"), text)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("data/sample_inputs/model.pt", "has a pickle"),
        ("data/constants/custom_obj_0", "which no exported file has"),
        ("data/aotinductor/model/x.so", "which no exported file has"),
        ("data/../../x", "no plain name"),
    ],
)
def test_records_that_loading_would_run_are_refused(record, text, path, tmp_path):
    def change(name, content):
        if name == "":
            return [(record, b"anything")]
        return None if name == record else content

    refused(rewritten(path, change, tmp_path / "other.pt2"), text)


def test_changed_codes_are_refused(path, tmp_path):
    def change(name, content):
        if name == "":
            return None
        return bytes(len(content)) if name == "data/weights/weight_6" else content

    refused(rewritten(path, change, tmp_path / "other.pt2"), r"SHA-256|scale|contradicts")


def test_compressed_archives_are_refused(path, tmp_path):
    other = tmp_path / "other.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(other, "is compressed or encrypted")
