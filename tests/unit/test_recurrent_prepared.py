"""Recurrent layers in prepared and lowered models: work, prices, widths, memory, refusals."""

import copy
import random
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

from cgmq_fx.cost.find import table_names
from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.lower import lower
from cgmq_fx.passes import recurrent
from cgmq_fx.prepare import prepare
from cgmq_fx.quantizers import Quantizer
from cgmq_fx.report import report
from cgmq_fx.sensitivity import predicted_loss
from cgmq_fx.testing.recompute import memory_bytes, products_of
from graph_zoo import ZOO, Calls

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
BOTH = {"bops": "100%", "weight_memory": "100%"}
RECURRENT = pytest.mark.parametrize(
    "zoo_case", [item for item in ZOO if "recurrent" in item.id], ids=lambda item: item.id
)


def alone(layer, data, budget="100%", **options):
    """Prepare a model of one layer."""
    model = Calls(lambda self, x: self.layer(x), layer=layer)
    return prepare(model, budget, example_inputs=(data,), learn_input_bits=True, **options)


def operations(prepared):
    return {item.operation.name: item.operation for item in prepared.plan.accounting.operations}


def macs(prepared):
    return {name: operation.macs for name, operation in operations(prepared).items()}


def set_random_bits(prepared, seed=0):
    rng = random.Random(seed)
    for site in prepared.plan.accounting.sites:
        prepared.quantizers[site.name].set_bit_width(
            rng.choice([w for w in site.allowed if w < 32])
        )
    return prepared


# -- work and prices -----------------------------------------------------------------------------


def test_work_by_hand():
    # T = 6 steps, I = 3 inputs, H = 4 units, P = 2 projected; gates x H x (inputs + states) x T.
    x, time_first = torch.randn(2, 6, 3), torch.randn(6, 2, 3)
    assert macs(alone(nn.LSTM(3, 4, batch_first=True), x)) == {
        "layer.input_l0": 4 * 4 * 3 * 6,
        "layer.hidden_l0": 4 * 4 * 4 * 6,
    }
    assert macs(alone(nn.GRU(3, 4, 2, bidirectional=True), time_first, batch_axis=1)) == {
        **dict.fromkeys(("layer.input_l0", "layer.input_l0_reverse"), 3 * 4 * 3 * 6),
        **dict.fromkeys(("layer.hidden_l0", "layer.hidden_l0_reverse"), 3 * 4 * 4 * 6),
        **dict.fromkeys(("layer.input_l1", "layer.input_l1_reverse"), 3 * 4 * (2 * 4) * 6),
        **dict.fromkeys(("layer.hidden_l1", "layer.hidden_l1_reverse"), 3 * 4 * 4 * 6),
    }
    assert macs(alone(nn.RNN(3, 4), time_first, batch_axis=1)) == {
        "layer.input_l0": 4 * 3 * 6,
        "layer.hidden_l0": 4 * 4 * 6,
    }
    projected = alone(nn.LSTM(3, 4, proj_size=2, batch_first=True), x)
    assert macs(projected) == {
        "layer.input_l0": 4 * 4 * 3 * 6,
        "layer.hidden_l0": 4 * 4 * 2 * 6,
        "layer.projection_l0": 2 * 4 * 6,
    }
    assert macs(alone(nn.LSTMCell(3, 4), torch.randn(2, 3))) == {
        "layer.input": 4 * 4 * 3,
        "layer.hidden": 4 * 4 * 4,
    }
    found = operations(projected)["layer.projection_l0"]
    assert (found.op, found.weights, found.input_elements, found.output_elements) == (
        *("linear", 2 * 4),
        *(4 * 6, 2 * 6),
    )
    assert dict(found.attributes) == {"in_features": 4, "out_features": 2, "bias": False}
    assert operations(projected)["layer.input_l0"].attributes["bias"] is True


def test_each_product_has_the_widths_of_its_own_operands():
    layer = nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
    prepared = alone(layer, torch.randn(2, 5, 3))
    assert prepared.quantizers.names() == [
        "x",
        *(
            f"layer_weight_{kind}_l{level}{ending}"
            for level in (0, 1)
            for ending in ("", "_reverse")
            for kind in ("ih", "hh")
        ),
        *("layer_hidden_l0", "layer_hidden_l0_reverse", "layer_input_l1"),
        *("layer_hidden_l1", "layer_hidden_l1_reverse"),
    ]
    elements = {site.name: site.elements for site in prepared.plan.accounting.sites}
    assert (elements["x"], elements["layer_hidden_l0_reverse"]) == (5 * 3, 5 * 4)
    assert (elements["layer_input_l1"], elements["layer_weight_hh_l1"]) == (5 * 8, 16 * 4)
    set_random_bits(prepared, 3)
    bits = prepared.bit_widths
    by_hand = {
        "layer.input_l0": 48 * 5 * bits["layer_weight_ih_l0"] * bits["x"],
        "layer.input_l0_reverse": 48 * 5 * bits["layer_weight_ih_l0_reverse"] * bits["x"],
        "layer.input_l1": 128 * 5 * bits["layer_weight_ih_l1"] * bits["layer_input_l1"],
        "layer.input_l1_reverse": 128
        * 5
        * bits["layer_weight_ih_l1_reverse"]
        * bits["layer_input_l1"],
        **{
            f"layer.hidden_{end}": 64
            * 5
            * bits[f"layer_weight_hh_{end}"]
            * bits[f"layer_hidden_{end}"]
            for end in ("l0", "l0_reverse", "l1", "l1_reverse")
        },
    }
    rows = {row.name: row for row in report(prepared).rows}
    assert {name: row.cost["bops"] for name, row in rows.items()} == by_hand
    row = rows["layer.hidden_l1_reverse"]
    assert (row.weight_bits, row.activation_bits) == (
        bits["layer_weight_hh_l1_reverse"],
        bits["layer_hidden_l1_reverse"],
    )
    assert prepared.plan.accounting.totals(list(bits.values()))["bops"] == sum(by_hand.values())


@pytest.mark.parametrize("table", table_names())
def test_every_built_in_table_prices_the_products(table):
    for layer, shape in ((nn.GRU(8, 8, batch_first=True), (2, 4, 8)), (nn.RNNCell(8, 8), (2, 8))):
        prepared = alone(layer, torch.randn(shape), "100%", cost_table=table)
        entries = prepared.plan.accounting.ledger
        assert {entry.status for entry in entries} == {"quantized"}
        assert all(entry.prices for entry in entries)
        prepared(torch.randn(shape))


def test_a_planted_swap_of_weights_shows_in_the_account(monkeypatch):
    """A recurrent product that is accounted with the input's weight costs another sum."""
    honest = recurrent.products_of

    def swapped(node):
        first, second, *rest = honest(node)
        return first._replace(weight=second.weight), second._replace(weight=first.weight), *rest

    monkeypatch.setattr(recurrent, "products_of", swapped)
    prepared = alone(nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3))
    with pytest.raises(AssertionError, match=r"assert \d+ == Fraction"):
        check_lowered(prepared, (torch.randn(2, 5, 3),), {0, 1})


# -- lowering ------------------------------------------------------------------------------------


def check_lowered(prepared, inputs, seeds, batch_axis=0):
    """Lowered equals prepared; what it costs is found again by running it."""
    prepared.eval()
    with torch.no_grad():
        prepared(*copy.deepcopy(inputs))
    for seed in seeds:
        set_random_bits(prepared, seed)
        bits = list(prepared.bit_widths.values())
        fixed = lower(prepared, allow_untrained=True)
        with torch.no_grad():
            want, got = (module(*copy.deepcopy(inputs)) for module in (prepared, fixed))
        assert all(torch.equal(a, b) for a, b in zip(leaves(want), leaves(got), strict=True))
        assert not any(isinstance(module, Quantizer) for module in fixed.modules())
        sample = tuple(item.narrow(batch_axis, 0, 1) for item in inputs)
        totals = prepared.plan.accounting.totals(bits)
        assert sum(product.bops for product in products_of(fixed, sample)) == totals["bops"]
        if "weight_memory" in totals:
            assert memory_bytes(fixed) == totals["weight_memory"]
        twin = copy.deepcopy(fixed)
        twin.load_state_dict(fixed.state_dict())
        with torch.no_grad():
            assert torch.equal(leaves(twin(*inputs))[0], leaves(got)[0])


def leaves(value):
    return pytree.tree_leaves(value)


@RECURRENT
def test_lowered_is_prepared_and_costs_what_was_accounted(zoo_case):
    model, inputs = zoo_case.build()
    options = {"example_inputs": inputs, "batch_axis": zoo_case.batch_axis}
    check_lowered(prepare(model, BOTH, **options), inputs, range(4), zoo_case.batch_axis)


def test_a_projected_layer_is_lowered():
    x = torch.randn(2, 5, 3)
    check_lowered(alone_output(nn.LSTM(3, 4, 2, proj_size=2, batch_first=True), x), (x,), range(3))


def alone_output(layer, data):
    model = Calls(lambda self, x: self.layer(x)[0], layer=layer)
    return prepare(model, BOTH, example_inputs=(data,))


def test_at_32_bits_inside_the_kernel_stays_and_is_accounted():
    """Weights and input are narrow, the state is float: torch's kernel computes it."""
    x = torch.randn(2, 5, 3)
    prepared = alone_output(nn.GRU(3, 4, 2, batch_first=True), x).eval()
    prepared(x)
    for site in prepared.plan.accounting.sites:
        is_inside = "hidden" in site.name or "input" in site.name
        prepared.quantizers[site.name].set_bit_width(32 if is_inside else 8)
    fixed = lower(prepared, allow_untrained=True)
    (node,) = [node for node in fixed.graph.nodes if recurrent.is_recurrent(node)]
    assert node.kwargs["quantizers"] == {}
    with torch.no_grad():
        assert torch.equal(fixed(x), prepared(x))
    totals = prepared.plan.accounting.totals(list(prepared.bit_widths.values()))
    assert sum(product.bops for product in products_of(fixed, (x[:1],))) == totals["bops"]


def test_weight_memory_by_hand():
    # Weights of 4 gates x 4 units at their widths; two biases of 16 at 32 bits.
    prepared = alone_output(nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3))
    prepared.quantizers["layer_weight_ih_l0"].set_bit_width(2)
    prepared.quantizers["layer_weight_hh_l0"].set_bit_width(8)
    totals = prepared.plan.accounting.totals(list(prepared.bit_widths.values()))
    assert totals["weight_memory"] == Fraction(16 * 3 * 2 + 16 * 4 * 8 + 32 * 32, 8)
    for kind in ("ih", "hh"):
        spec = prepared.quantizers[f"layer_weight_{kind}_l0"].spec
        assert (spec.channel_axis, spec.num_channels) == (0, 16)


def test_a_bound_on_weights_alone_quantizes_nothing_inside():
    model = Calls(lambda self, x: self.layer(x)[0], layer=nn.LSTM(3, 4))
    prepared = prepare(model, {"weight_memory": "50%"}, example_inputs=(torch.randn(5, 2, 3),))
    assert {quantizer.spec.role for quantizer in prepared.quantizers.values()} == {"weight"}


def test_peak_memory_holds_output_and_state():
    # Steps of 1 sample: input 5*3 = 15, held as codes; output 5*4, state 4 and cell 4: float,
    # since they are returned. What the layer needs within itself does not count.
    prepared = alone(
        nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3), {"peak_activation_memory": "1 GiB"}
    )
    accounting = prepared.plan.accounting
    assert accounting.resources["peak_activation_memory"].reference == 4 * (15 + 20 + 4 + 4)
    bits = [2] * len(accounting.sites)
    assert accounting.totals(bits)["peak_activation_memory"] == Fraction(15 * 2 + 28 * 32, 8)


# -- shared layers -------------------------------------------------------------------------------


def test_a_layer_called_twice_has_its_weights_once_and_its_states_twice():
    model = Calls(lambda self, x: self.layer(self.layer(x)[0])[0], layer=nn.GRU(4, 4))
    prepared = prepare(model, BOTH, example_inputs=(torch.randn(5, 2, 4),), batch_axis=1)
    inside = {name for name in prepared.quantizers if "hidden" in name}
    assert inside == {"layer_hidden_l0", "layer_hidden_l0_2"}
    assert sum("weight" in name for name in prepared.quantizers) == 2
    assert set(macs(prepared)) == {
        *("layer.input_l0", "layer.hidden_l0", "layer:2.input_l0", "layer:2.hidden_l0")
    }
    memory = prepared.plan.accounting.resources["weight_memory"]
    assert memory.reference == 4 * sum(p.numel() for p in model.parameters())


def test_weights_tied_between_layers_have_one_quantizer():
    layer = nn.RNN(4, 4, num_layers=2, bias=False)
    layer.weight_hh_l1 = layer.weight_hh_l0
    data = torch.randn(5, 2, 4)
    prepared = alone_output(layer, data)
    assert "layer_weight_hh_l1" not in prepared.quantizers
    assert memory_reference(prepared) == 4 * 3 * 16
    set_random_bits(prepared)
    prepared(data)
    assert memory_bytes(lower(prepared, allow_untrained=True)) == Fraction(
        sum(16 * bits for name, bits in prepared.bit_widths.items() if "weight" in name), 8
    )


def memory_reference(prepared):
    return prepared.plan.accounting.resources["weight_memory"].reference


# -- sensitivities -------------------------------------------------------------------------------


def test_the_loss_tells_how_much_it_cares_about_every_state():
    prepared = alone_output(nn.LSTM(3, 4, 2, batch_first=True), torch.randn(2, 5, 3)).train()
    for bits in (32, 8):
        for quantizer in prepared.quantizers.values():
            if quantizer.spec.learned:
                quantizer.set_bit_width(bits)
        prepared.zero_grad()
        torch.autograd.backward(prepared(torch.randn(2, 5, 3))[:, -1].square().sum())
        learned = {name: q for name, q in prepared.quantizers.items() if q.spec.learned}
        squares = {name: float(q.probe.grad[1]) for name, q in learned.items()}
        assert min(squares.values()) > 0
    assert all(len(losses) > 0 for losses in predicted_loss(prepared))


# -- derived layers, and what stays closed ---------------------------------------------------------


class Reversed(nn.LSTM):
    """A layer of the user's: it reads its input from the end."""

    def forward(self, x, hx=None):
        return super().forward(x.flip(0), hx)


class OwnCell(nn.GRUCell):
    """A cell of the user's."""


def in_time(self, x):
    return self.layer(x)[0]


DERIVED = {
    "subclass": (Reversed(4, 5, 2, bidirectional=True, dropout=0.2, proj_size=3), in_time),
    "gru": (type("OwnGRU", (nn.GRU,), {})(4, 5, bias=False, batch_first=True), in_time),
    "cell": (OwnCell(4, 5), lambda self, x: self.layer(x[0], x.new_zeros(x.size(1), 5))),
    "parametrized": (parametrizations.weight_norm(nn.RNN(4, 4), "weight_hh_l0"), in_time),
}


@pytest.mark.parametrize("name", DERIVED)
def test_a_layer_derived_from_one_of_torch_is_opened_too(name):
    layer, forward = DERIVED[name]
    model, x = Calls(forward, layer=copy.deepcopy(layer)), torch.randn(5, 2, 4)
    options = {"example_inputs": (x,), "batch_axis": 1, "learn_input_bits": True}
    prepared = prepare(model, BOTH, **options)
    for training in (True, False):
        found = []
        for module in (model, prepared):
            torch.manual_seed(0)
            found.append(module.train(training)(x))
        assert torch.equal(*found)
    products = [name for name, count in macs(prepared).items() if count]
    assert products
    assert all(name.startswith("layer.") for name in products)
    assert {entry.status for entry in prepared.plan.accounting.ledger if entry.macs} == {
        "quantized"
    }
    check_lowered(prepared, (x,), range(3), batch_axis=1)


def test_a_hooked_layer_stays_closed_and_says_why():
    layer = nn.GRU(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: None)
    model, x = Calls(in_time, layer=layer), torch.randn(5, 2, 4)
    prepared = prepare(model, "100%", example_inputs=(x,), batch_axis=1)
    (entry,) = prepared.plan.accounting.ledger
    assert (entry.op, entry.status, entry.macs) == ("rnn", "float", 5 * 3 * 4 * 8)
    assert "the layer 'layer' is not opened: it has hooks; priced at 32 bits" in entry.reason
    assert torch.equal(prepared(x), model(x))


def test_a_packed_sequence_is_refused_with_the_reason():
    inputs = (torch.randn(5, 3), torch.tensor([3, 2]), torch.zeros(1, 3, 4))
    with pytest.raises(UnsupportedModelError, match=r"(?s)'gru'.*a packed sequence, whose batch"):
        prepare(Packed(), "100%", example_inputs=inputs, batch_axis=None)


class Packed(nn.Module):
    """Calls torch's kernel on packed data, as a layer does with a packed sequence."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 4)

    def forward(self, data, sizes, state):
        weights = list(self.layer.parameters())
        return torch.gru(data, sizes, state, weights, True, 1, 0.0, False, False)[0]
