"""The ledger: each operation is in one group of each table, with row and source, or a reason."""

import json
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.ledger import ledger
from cgmq_fx.prepare import prepare
from graph_zoo import Calls

NPU = {
    "name": "npu",
    "unit": "cycle",
    "source": "the data sheet",
    "unpriced": "zero",
    "row": [
        {
            "op": "conv2d",
            "where": "groups == 1",
            "per": "mac",
            "error": "5 %",
            "source": "measured",
            "grid": [
                {"weight": 8, "activation": 8, "cost": 2},
                {"weight": 4, "activation": 8, "cost": 1, "error": "10 %", "source": "guessed"},
            ],
        },
        {"op": ["activation", "max_pool"], "per": "output_element", "cost": 1},
    ],
}


class Net(nn.Module):
    """MACs: 2 * 9 * 36 = 648 and 18 * 3 = 54; activations read: 64, 72, 72, 18."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Linear(18, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.fc(x.flatten(1))


@pytest.fixture(scope="module")
def prepared():
    x = torch.zeros(2, 1, 8, 8)
    budget = {"bops": "100%", "weight_memory": "100%"}
    return prepare(Net(), budget, cost_table=["bops", NPU], example_inputs=x)


def group_of(found, table, name):
    (one,) = (t for t in found.tables if t.name == table)
    (group,) = (g for g in one.groups if name in g.names)
    return group


def test_rows_sources_and_errors(prepared):
    found = ledger(prepared)
    assert [(table.name, table.bounded) for table in found.tables] == [
        ("bops", True),
        ("npu", False),
    ]
    conv = group_of(found, "npu", "conv")
    assert (conv.pricing, conv.per, conv.kinds) == ("priced", "mac", {"conv2d": 1})
    assert conv.row == "cost table, row 1, where groups == 1"
    assert conv.source == "measured; guessed"
    assert conv.error == (Fraction(1, 20), Fraction(1, 10))
    relu = group_of(found, "npu", "relu")
    assert (relu.pricing, relu.source, relu.error) == ("priced", "the data sheet", None)
    assert "Bayesian Bits" in group_of(found, "bops", "fc").source


def test_shares(prepared):
    found = ledger(prepared)
    conv = group_of(found, "npu", "conv").work
    assert (conv.macs, conv.weights, conv.activations) == (648, 18, 64)
    assert conv.macs_share == Fraction(648, 648 + 54)
    assert conv.weights_share == Fraction(18, 18 + 54)
    assert conv.activations_share == Fraction(64, 64 + 72 + 72 + 18)
    for table in found.tables:
        for share in ("macs_share", "weights_share", "activations_share"):
            assert sum(getattr(group.work, share) for group in table.groups) == 1
        names = [name for group in table.groups for name in group.names]
        assert len(names) == len(set(names)) == found.work.operations


def test_what_has_no_price_and_why(prepared):
    found = ledger(prepared)
    fc = group_of(found, "npu", "fc")
    assert fc.pricing == "unpriced"
    assert "no row for them, and unpriced = 'zero'" in fc.reason
    assert found.tables[1].share("unpriced") == Fraction(54, 702)
    free = group_of(found, "bops", "relu")
    assert (free.pricing, free.row, free.error) == ("free", "", None)
    assert "no multiply-accumulates" in free.reason


def test_stored_tensors(prepared):
    quantized, other = ledger(prepared).stored
    assert (quantized.tensors, quantized.elements) == (2, 18 + 54)
    assert (other.elements, other.share) == (2 + 3, Fraction(5, 77))


def test_what_stays_float_and_why():
    layer = nn.LSTM(4, 4)
    layer.register_forward_hook(lambda module, inputs, output: None)
    model = Calls(lambda self, x: self.layer(torch.relu(x)), layer=layer)
    found = ledger(prepare(model, "100%", example_inputs=torch.zeros(2, 3, 4)))
    (group,) = found.floats
    assert "is not opened: it has hooks" in group.reason
    assert group.work.macs_share == 1
    assert found.quantized.operations == 0


def test_an_operation_that_a_table_prices_is_not_said_to_have_no_price():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.zeros(1, 3)
    table = {**NPU, "row": [*NPU["row"], {"op": "linear", "per": "mac", "cost": 1}]}
    found = prepare(model, "100%", cost_table=table, example_inputs=x).plan.accounting.ledger
    relu = next(entry for entry in found if entry.op == "activation")
    assert relu.status == "float"
    assert "priced at 32 bits" in relu.reason
    assert "no table" not in relu.reason


def test_an_unpriced_product_is_not_said_to_have_a_price():
    model, x = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 3)), (1, 1, 2, 2)
    found = prepare(model, "100%", cost_table=NPU, example_inputs=torch.zeros(x))
    entry = next(entry for entry in found.plan.accounting.ledger if entry.op == "linear")
    assert entry.status == "float"
    assert entry.reason.endswith("no table of the call prices it")


def test_text_and_json(prepared):
    found = ledger(prepared)
    text = str(found)
    assert all(len(line) <= 110 and line.isascii() for line in text.splitlines())
    for part in ("5 % to 10 %", "source: measured; guessed", "unpriced", "not stated", "92.3 %"):
        assert part in text
    data = json.loads(found.to_json())
    assert data["tables"][1]["groups"][0]["error"] == ["1/20", "1/10"]
    assert data["work"]["macs"] == 702
    assert repr(found) == "Ledger(Net: priced bops 100 %, npu 92.31 % of the MACs)"


def test_what_has_no_ledger():
    with pytest.raises(UsageError, match="neither prepared nor lowered"):
        ledger(Net())
    with pytest.raises(TrainingError, match="seen no batch"):
        ledger(prepare(Net(), "100%"))
