"""What the analyses write: work by hand, operation classes, signs, shares."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.annotate_nonnegative import AnnotateNonnegative
from cgmq_fx.passes.annotate_operations import AnnotateOperations
from cgmq_fx.passes.annotate_shapes import AnnotateShapes
from cgmq_fx.passes.annotate_work import AnnotateWork
from cgmq_fx.passes.candidates import Wanted
from cgmq_fx.passes.deployed import deployed_nodes
from cgmq_fx.passes.functionalize import Functionalize
from cgmq_fx.passes.meta import IS_NONNEGATIVE, OP_INFO, SITES, VALUE, WORK, TensorInfo
from cgmq_fx.passes.pipeline import Pipeline
from cgmq_fx.passes.select_operands import SelectOperands
from cgmq_fx.passes.share_quantizers import ShareQuantizers
from cgmq_fx.passes.trace import trace
from graph_zoo import ZOO, Calls, TiedLanguageModel

PRODUCTS = frozenset({"linear", "matmul", "attention", "conv2d"})


def annotated(model, *inputs, ops=PRODUCTS):
    gm = trace(model, inputs)
    passes = (AnnotateOperations(), AnnotateNonnegative(), AnnotateShapes(inputs), AnnotateWork())
    Pipeline((Functionalize(), *passes, SelectOperands(Wanted(ops)), ShareQuantizers())).run(gm)
    return gm


def operations(gm):
    deployed = deployed_nodes(gm.graph)
    return [item for node in gm.graph.nodes if node in deployed for item in WORK.get(node)]


def work_of(body, *inputs, **layers):
    """The operations with MACs of ``body(self, x)`` for the given inputs."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

    Model.forward = body
    return [item for item in operations(annotated(Model(), *inputs)) if item.macs]


def hooked(layer):
    """A layer that stays closed: its hook must run."""
    layer.register_forward_hook(lambda module, inputs, output: None)
    return layer


@dataclass(frozen=True)
class Layer:
    """A layer, the shape of its input, and its work worked out on paper."""

    id: str
    layer: nn.Module
    shape: tuple[int, ...]
    macs: int
    op: str
    attributes: dict[str, Any]


LAYERS = (
    # 4x4 outputs x 6 channels, each 3x3 taps x 4 inputs.
    Layer("plain", nn.Conv2d(4, 6, 3), (4, 6, 6), 16 * 6 * 9 * 4, "conv2d", {"in_channels": 4}),
    # (7 + 2 - 3) // 2 + 1 = 4 by (6 - 2) // 1 + 1 = 5 outputs x 6, each 3x2 taps x 4 / 2 inputs.
    Layer(
        "grouped, strided",
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), groups=2),
        (4, 7, 6),
        20 * 6 * 6 * 2,
        "conv2d",
        {"groups": 2, "in_channels": 4, "out_channels": 6, "kernel_size": 6, "stride_0": 2},
    ),
    # Dilation 2 makes the kernel reach over 5 of 8: 4 outputs a side, and no more taps.
    Layer(
        "dilated, depthwise",
        nn.Conv2d(4, 8, 3, dilation=2, groups=4, bias=False),
        (4, 8, 8),
        16 * 8 * 9,
        "conv2d",
        {"groups": 4, "dilation_0": 2, "dilation_1": 2, "bias": False},
    ),
    # Padding by mode is a layer before it; 7 outputs x 3 channels x 3 taps x 2 inputs.
    Layer(
        "circular",
        nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        (2, 7),
        7 * 3 * 3 * 2,
        "conv1d",
        {"kernel_0": 3, "spatial_dims": 1},
    ),
    Layer("same", nn.Conv1d(2, 3, 5, padding="same"), (2, 7), 7 * 3 * 5 * 2, "conv1d", {}),
    Layer("3d", nn.Conv3d(2, 4, (1, 2, 2)), (2, 3, 3, 3), 3 * 2 * 2 * 4 * 4 * 2, "conv3d", {}),
    # Each of 5x5 inputs x 4 channels meets 3x3 taps x 6 / 2 outputs: stride does not multiply.
    Layer(
        "transposed, grouped",
        nn.ConvTranspose2d(4, 6, 3, stride=3, output_padding=1, groups=2),
        (4, 5, 5),
        25 * 4 * 9 * 3,
        "conv_transpose2d",
        {"groups": 2, "in_channels": 4, "out_channels": 6, "stride_0": 3},
    ),
    Layer(
        "transposed 1d",
        nn.ConvTranspose1d(3, 2, 4, stride=2, dilation=3),
        (3, 5),
        5 * 3 * 4 * 2,
        "conv_transpose1d",
        {"dilation_0": 3, "kernel_0": 4},
    ),
    Layer(
        "transposed 3d",
        nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 2)),
        (2, 2, 3, 3),
        18 * 2 * 8 * 3,
        "conv_transpose3d",
        {},
    ),
    Layer(
        "tokens",
        nn.Linear(6, 5),
        (7, 6),
        7 * 6 * 5,
        "linear",
        {"in_features": 6, "out_features": 5, "bias": True},
    ),
    # 3 gates x 4 units x (3 inputs + 4 states) at each of 5 steps.
    Layer("recurrent", hooked(nn.GRU(3, 4, batch_first=True)), (5, 3), 5 * 3 * 4 * 7, "rnn", {}),
)


@pytest.mark.parametrize("item", LAYERS, ids=lambda item: item.id)
def test_work_of_layers(item):
    x = torch.randn(1, *item.shape)
    (found,) = work_of(lambda self, x: self.layer(x), x, layer=item.layer)
    assert (found.op, found.macs) == (item.op, item.macs)
    assert dict(found.attributes) | item.attributes == dict(found.attributes)
    if item.op != "rnn":
        assert found.weights == item.layer.weight.numel()
        assert found.output_elements == item.layer(x).numel()


@dataclass(frozen=True)
class Product:
    """A function of two tensors, their shapes, and its work on paper."""

    id: str
    body: Any
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    macs: int
    attributes: dict[str, int]


def mkn(batch, m, k, n):
    return {"batch": batch, "m": m, "k": k, "n": n}


PAIRS = (
    Product("bmm", lambda s, a, b: a.bmm(b), ((2, 3, 4), (2, 4, 5)), 120, mkn(2, 3, 4, 5)),
    Product(
        "bmm by name", lambda s, a, b: torch.bmm(a, mat2=b), ((2, 3, 4), (2, 4, 5)), 120, {"k": 4}
    ),
    Product("@", lambda s, a, b: a @ b, ((2, 3, 4), (4, 5)), 120, mkn(2, 3, 4, 5)),
    Product(
        "broadcast", torch.nn.Module.__call__, ((2, 1, 3, 4), (6, 4, 5)), 2 * 6 * 60, {"batch": 12}
    ),
    Product("vector", lambda s, a, b: torch.matmul(a, b), ((3, 4), (4,)), 12, mkn(1, 3, 4, 1)),
    Product("mv", lambda s, a, b: torch.mv(a, b), ((3, 4), (4,)), 12, mkn(1, 3, 4, 1)),
    Product(
        "baddbmm",
        lambda s, a, b: torch.baddbmm(b[:, :3] * 0, a, b),
        ((2, 3, 4), (2, 4, 5)),
        120,
        mkn(2, 3, 4, 5),
    ),
    Product(
        "einsum",
        lambda s, a, b: torch.einsum("bhic,bhjc->bhij", a, b),
        ((2, 3, 4, 5), (2, 3, 6, 5)),
        2 * 3 * 4 * 6 * 5,
        mkn(6, 4, 5, 6),
    ),
    Product(
        "einsum, two sums",
        lambda s, a, b: torch.einsum("nchw,chwo -> no", a, b),
        ((2, 3, 4, 5), (3, 4, 5, 6)),
        2 * 60 * 6,
        mkn(1, 2, 60, 6),
    ),
    Product(
        "einsum with dots",
        lambda s, a, b: torch.einsum("...ij,...jk->...ik", a, b),
        ((2, 3, 4), (2, 4, 5)),
        120,
        mkn(2, 3, 4, 5),
    ),
    Product(
        "einsum, implicit",
        lambda s, a, b: torch.einsum("ij,jk", a, b),
        ((3, 4), (4, 5)),
        60,
        mkn(1, 3, 4, 5),
    ),
    Product(
        "einsum, one index summed first",
        lambda s, a, b: torch.einsum("hij,jk->ik", a, b),
        ((7, 3, 4), (4, 5)),
        60,
        mkn(1, 3, 4, 5),
    ),
)


@pytest.mark.parametrize("item", PAIRS, ids=lambda item: item.id)
def test_work_of_products(item):
    a, b = map(torch.randn, item.shapes)
    body = (lambda s, a, b: torch.matmul(a, b)) if item.id == "broadcast" else item.body
    (found,) = work_of(lambda self, a, b: body(self, a, b), a, b)
    assert (found.op, found.operands, found.macs) == ("matmul", "pair", item.macs)
    assert dict(found.attributes) | item.attributes == dict(found.attributes)
    if item.id not in ("vector", "mv"):  # torch's counter has nothing for vectors
        with FlopCounterMode(display=False) as counter:
            body(None, a, b)
        assert counter.get_total_flops() == 2 * item.macs


def test_attention_is_two_products():
    q, k = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 5, 6)
    found = work_of(lambda self, q, k: F.scaled_dot_product_attention(q, k, k[..., :2]), q, k)
    assert [(item.attributes["part"], item.macs) for item in found] == [
        ("qk", 6 * 4 * 5 * 6),
        ("pv", 6 * 4 * 5 * 2),
    ]
    assert {item.op for item in found} == {"attention"}


def test_what_torch_does_not_count_is_counted():
    """Torch's counter has nothing for these; a cost of zero would hide them."""
    a, b = torch.randn(1, 4), torch.randn(1, 4)
    (bilinear,) = work_of(lambda self, a, b: self.form(a, b), a, b, form=nn.Bilinear(4, 4, 3))
    assert (bilinear.op, bilinear.macs) == ("bilinear", 3 * (16 + 4))
    (inner,) = work_of(lambda self, a, b: torch.inner(a[0], b[0]), a, b)
    assert (inner.op, inner.macs) == ("matmul", 4)


@pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)
def test_macs_equal_those_of_the_independent_counter(zoo_case):
    model, inputs = zoo_case.build()
    total = sum(item.macs for item in operations(annotated(model, *inputs)))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(*inputs)
    unseen = {
        "recurrent": 2 * 5 * 2 * (16 * 7 + 16 * 12),
        "recurrent twice": 2 * 2 * 5 * 16 * (4 + 4),
        "bilinear": 2 * 4 * (9 + 3),
    }
    assert 2 * total == counter.get_total_flops() + 2 * unseen.get(zoo_case.id, 0)


# -- names ---------------------------------------------------------------------------------------


def test_operations_are_called_by_their_layer_and_use():
    gm = annotated(
        Calls(lambda self, x: self.layer(self.layer(x)) @ x.t(), layer=nn.Linear(4, 4)),
        torch.randn(2, 4),
    )
    assert [item.name for item in operations(gm)] == ["layer", "layer:2", "matmul"]


# -- signs ---------------------------------------------------------------------------------------

SIGNS = {
    "relu": (lambda self, x: F.relu(x), True),
    "sum of two": (lambda self, x: x.relu() + x.sigmoid(), True),
    "pooled": (lambda self, x: F.max_pool1d(x.relu(), 2), True),
    "zero padded": (lambda self, x: F.pad(x.relu(), (1, 1)), True),
    "concatenated": (lambda self, x: torch.cat([x.relu(), x.exp()], 1), True),
    "chunk": (lambda self, x: x.relu().chunk(2, 1)[0], True),
    "shifted": (lambda self, x: x.relu() + -1, False),
    "subtracted": (lambda self, x: x.relu() - 0.5, False),
    "times a negative": (lambda self, x: x.relu() * -2, False),
    "padded below zero": (lambda self, x: F.pad(x.relu(), (1, 1), value=-1.0), False),
    "mixed": (lambda self, x: torch.cat([x.relu(), x], 1), False),
    "gelu": (lambda self, x: F.gelu(x), False),
    "input": (lambda self, x: x, False),
}


@pytest.mark.parametrize("name", SIGNS)
def test_only_what_cannot_be_negative_is_called_so(name):
    body, expected = SIGNS[name]
    gm = annotated(Calls(body), torch.randn(1, 4, 6))
    last = gm.graph.output_node().args[0]
    assert IS_NONNEGATIVE.get(last) is expected


def test_a_tensor_that_is_changed_later_may_become_negative():
    def body(self, x):
        y = x.relu()
        y -= 1
        return y

    gm = annotated(Calls(body), torch.randn(1, 4))
    (relu,) = (node for node in gm.graph.nodes if node.target == "relu")
    assert IS_NONNEGATIVE.get(relu) is False


# -- shapes --------------------------------------------------------------------------------------


def test_shapes_and_dtypes_are_written_for_every_tensor():
    gm = annotated(TiedLanguageModel(), torch.randint(11, (1, 4)))
    values = {str(node.name): VALUE.get(node) for node in gm.graph.nodes}
    assert values["tokens"] == TensorInfo((1, 4), torch.int64)
    assert values["output"] == TensorInfo((1, 4, 11), torch.float32)


def test_inputs_that_do_not_fit_are_refused_with_the_operation():
    gm = trace(Calls(lambda self, x: self.layer(x), layer=nn.Linear(4, 3)))
    passes = (Functionalize(), AnnotateOperations(), AnnotateShapes((torch.randn(2, 5),)))
    with pytest.raises(UnsupportedModelError, match=r"'linear' .*\(2, 5\)") as caught:
        Pipeline(passes).run(gm)
    assert "\nGive inputs" in str(caught.value)


# -- shares --------------------------------------------------------------------------------------


def sites(gm):
    return {node.name: [read.site for read in SITES.get(node)] for node in gm.graph.nodes}


def test_tied_weights_and_several_readers_share_one_quantizer():
    gm = annotated(TiedLanguageModel(), torch.randint(11, (1, 4)))
    read = sites(gm)
    assert read["embedding"] == ["embed_weight"]
    assert read["linear_1"][0] == "embed_weight"
    gm = annotated(
        Calls(lambda s, x: (s.a(x), s.b(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 3)), torch.ones(1, 4)
    )
    read = sites(gm)
    assert read["linear"][1] == read["linear_1"][1] == "x"
    assert read["linear"][0] != read["linear_1"][0]


def test_a_site_never_hides_an_attribute_of_its_owner():
    gm = annotated(
        Calls(lambda self, x: self.layer(x + 1), layer=nn.Linear(4, 4)), torch.ones(1, 4)
    )
    assert sites(gm)["linear"][1] not in ("add", "train", "values")


def test_a_write_that_an_older_name_shows_is_not_quantized():
    def body(self, x):
        y = self.layer(x)
        alias = y.view(-1)
        y += x
        return alias

    gm = annotated(Calls(body, layer=nn.Linear(4, 4)), torch.ones(1, 4), ops=frozenset({"add"}))
    (write,) = (node for node in gm.graph.nodes if OP_INFO.get(node).op == "add")
    assert OP_INFO.get(write).operands == "none"
    assert "read again" in OP_INFO.get(write).reason
