import csv
import io
import json
import random
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from cgmq_fx.report_text import TEXT_WIDTH
from golden import check_golden
from graph_zoo import ZOO


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        first = x = F.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.head(F.adaptive_avg_pool2d(x + first, 2).flatten(1))


class Tagger(nn.Module):
    """An embedding, attention, and a layer that is not opened, since it has a hook."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.qkv = nn.Linear(8, 24)
        self.cell = nn.LSTM(8, 4, batch_first=True)
        self.cell.register_forward_hook(lambda module, inputs, output: None)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        query, key, value = self.qkv(self.embed(tokens)).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.head(self.cell(mixed)[0])


IMAGES = torch.zeros(2, 1, 8, 8)
TOKENS = torch.zeros(2, 6, dtype=torch.int64)
HALF_UNPRICED = {
    "name": "linear-only",
    "unit": "cycle",
    "unpriced": "zero",
    "row": [{"op": "linear", "per": "mac", "cost": {"formula": "weight_bits / 3"}}],
}


def set_bits(prepared, choose):
    for site in prepared.plan.accounting.sites:
        if site.learned:
            prepared.quantizers[site.name].set_bit_width(choose(site))
    return prepared


def convnet(budget="5%", bits=2, **options):
    prepared = prepare(ConvNet(), budget, example_inputs=IMAGES, **options)
    return set_bits(prepared, lambda site: bits)


def tagger():
    budget = {"bops": "50%", "weight_memory": "2 KiB"}
    return prepare(Tagger(), budget, example_inputs=TOKENS)


def sum_of_rows(found, resource):
    rows = [*found.rows, *found.tensors]
    return sum((row.cost.get(resource, Fraction(0)) for row in rows), Fraction(0))


@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.id)
def test_rows_add_up_to_the_totals_exactly(case):
    model, inputs = case.build()
    budget = {"bops": "100%", "weight_memory": "100%"}
    prepared = prepare(model, budget, example_inputs=inputs, batch_axis=case.batch_axis)
    set_bits(prepared, lambda site: random.choice(site.allowed))
    found = report(prepared)
    assert len(found.rows) == len(prepared.plan.accounting.operations)
    assert found.totals.keys() == {"bops", "weight_memory"}
    for resource, total in found.totals.items():
        assert type(total) is Fraction
        assert sum_of_rows(found, resource) == total
    assert len({row.name for row in found.rows}) == len(found.rows)


def test_a_network_computed_by_hand():
    found = report(convnet(bits=2))
    # conv reads the 8-bit image: 6 * 6 * 4 outputs of 9 MACs; a block has as many of 36.
    conv, block, head = 6 * 6 * 4 * 9, 6 * 6 * 4 * 36, 16 * 10
    rows = {row.name: row for row in found.rows}
    assert rows["conv"].macs == conv
    assert (rows["conv"].weight_bits, rows["conv"].activation_bits) == (2, 8)
    assert rows["conv"].cost == {"bops": conv * 2 * 8}
    assert rows["conv"].bits == (2, 8)
    assert rows["blocks.1"].cost == {"bops": block * 2 * 2}
    assert (rows["add"].lhs_bits, rows["add"].rhs_bits) == (32, 32)  # no table prices it
    assert rows["add"].cost == {"bops": 0}
    assert found.totals == {"bops": conv * 16 + (2 * block + head) * 4}
    assert found.references == {"bops": (conv + 2 * block + head) * 1024}
    assert found.budgets == {"bops": found.references["bops"] * Fraction(5, 100)}
    assert rows["head"].budget_share == {"bops": head * 4 / found.budgets["bops"]}
    assert found.satisfied


def test_two_activations_have_their_own_fields():
    prepared = set_bits(tagger(), lambda site: 8 if "weights" in site.name else 4)
    rows = {row.name.rpartition(".")[2]: row for row in report(prepared).rows}
    assert (rows["qk"].lhs_bits, rows["qk"].rhs_bits) == (4, 4)
    assert (rows["pv"].lhs_bits, rows["pv"].rhs_bits) == (8, 4)
    assert rows["pv"].weight_bits is None
    assert rows["pv"].activation_bits is None


def test_an_embedding_reads_an_index_that_has_no_bit_width():
    rows = {row.op: row for row in report(tagger()).rows}
    assert rows["embedding"].weight_bits is not None
    assert rows["embedding"].activation_bits is None


def test_stored_tensors_have_rows_of_their_own():
    prepared = set_bits(convnet({"weight_memory": "50%"}), lambda site: 4)
    found = report(prepared)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    assert tensors["conv_weight"].elements == 36
    assert tensors["conv_weight"].bits == 4
    assert tensors["conv_weight"].cost == {"weight_memory": 36 * 4 // 8}
    other = tensors["other parameters"]
    assert (other.bits, other.elements) == (32, 4 + 4 + 4 + 10)  # two biases, batch norm
    # An unbounded resource is reported beside the bounded one.
    assert found.resources[0].name == "weight_memory"
    assert found.resources[1].name == "bops"
    assert found.budgets.keys() == {"weight_memory"}


def test_over_budget_is_said_with_the_excess():
    found = report(convnet(bits=32))
    assert not found.satisfied
    excess = found.totals["bops"] - found.budgets["bops"]
    text = " ".join(str(found).split())
    assert f"OVER BUDGET by {float(excess / 10**6):.4g} MBOP" in text
    assert "within budget" not in text
    assert "4 of them with an operand at 32 bits, which is float" in text


def test_within_budget_is_said_with_the_spare():
    found = report(convnet(bits=2))
    spare = 1 - found.totals["bops"] / found.budgets["bops"]
    assert f"within budget, {float(100 * spare):.1f} % of it unused" in str(found)
    assert "OVER" not in str(found)
    relative = 100 * found.totals["bops"] / found.references["bops"]
    assert f"{float(relative):.5g} % of the reference" in str(found)


def test_exactly_at_the_budget_is_within_it():
    total = report(convnet(bits=2)).totals["bops"]
    found = report(convnet(f"{total} BOP", bits=2))
    assert found.satisfied
    assert "within budget, 0 % of it unused" in str(found)


def test_the_smallest_excess_is_over_budget():
    total = report(convnet(bits=4)).totals["bops"]
    found = report(convnet(f"{total - 1} BOP", bits=4))
    assert not found.satisfied
    assert "OVER BUDGET by 1 BOP, <0.1 % of it" in str(found)


def test_what_is_not_quantized_is_grouped_by_reason():
    found = report(convnet())
    coverage = found.coverage
    assert coverage.share("quantized") == 1
    assert coverage.count("quantized") == 4
    (free,) = coverage.groups("free")
    assert free.counts["relu"] == 3
    assert "relu x 3" in str(found)
    assert len(coverage.entries) == len(found.rows)


def test_what_stays_float_is_listed_with_its_macs_and_the_reason():
    coverage = report(tagger()).coverage
    (group,) = coverage.groups("float")
    assert group.names == ("cell",)
    assert "'cell' is not opened" in group.reason
    assert coverage.share("float") == Fraction(group.macs, coverage.macs)
    assert coverage.share("quantized") + coverage.share("float") == 1


def test_what_has_no_price_is_reported_with_its_share():
    found = report(convnet({"linear-only": "100%"}, cost_table=HALF_UNPRICED))
    convolutions = sum(row.macs for row in found.rows if row.op == "conv2d")
    assert found.coverage.unpriced == {"linear-only": Fraction(convolutions, found.coverage.macs)}
    assert "have no price in linear-only: conv, blocks.0, blocks.1" in str(found)
    (head,) = (row for row in found.rows if row.name == "head")
    assert head.cost["linear-only"] == Fraction(160 * 2, 3)
    assert head.unpriced_in == ()


@pytest.mark.parametrize(
    ("options", "arriving"),
    [({}, "arrive with 8 bits"), ({"learn_input_bits": True}, "have a learned bit-width")],
)
def test_the_convention_is_stated(options, arriving):
    text = " ".join(str(report(convnet(**options))).split())
    assert "biases, pooling and normalisation do not" in text
    assert f"the model's inputs {arriving}; its outputs (logits) stay float" in text


def test_text_of_a_convolutional_network():
    prepared = set_bits(convnet(), lambda site: 4 if site.role == "weight" else 8)
    check_golden("report__convnet", str(report(prepared)))


def test_text_of_two_budgets_with_attention_and_an_unopened_layer():
    prepared = set_bits(tagger(), lambda site: 2 if site.role == "weight" else 8)
    check_golden("report__tagger", str(report(prepared)))


def test_text_is_plain_narrow_and_the_same_on_every_terminal(monkeypatch):
    before = str(report(tagger()))
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(report(tagger())) == before
    assert before.isascii()
    assert max(map(len, before.splitlines())) <= TEXT_WIDTH


def test_a_terminal_gets_colours():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=90)
    console.print(report(convnet(bits=32)))
    assert "\x1b[1;31mOVER BUDGET" in console.file.getvalue()


def test_repr_is_one_line():
    text = repr(report(convnet()))
    assert text.startswith("Report(ConvNet: ")
    assert "\n" not in text


def test_brackets_in_a_source_are_text_and_no_markup():
    table = {**HALF_UNPRICED, "source": "see [bold] and [/] in [1]"}
    found = report(convnet({"linear-only": "100%"}, cost_table=table))
    assert "see [bold] and [/] in [1]" in str(found)


def number(value):
    return Fraction(value)


@pytest.mark.parametrize("make", [convnet, tagger])
def test_json_parses_back_exactly(make):
    found = report(make())
    data = json.loads(found.to_json())
    assert data["satisfied"] is found.satisfied
    for name, total in found.totals.items():
        resource = data["resources"][name]
        assert number(resource["total"]) == total
        assert resource["total_float"] == float(total)
        assert number(resource["reference"]) == found.references[name]
        assert number(resource["budget"]) == found.budgets[name]
        listed = [*data["rows"], *data["tensors"]]
        assert sum(number(row["cost"].get(name, 0)) for row in listed) == total
    for row, written in zip(found.rows, data["rows"], strict=True):
        for field in ("name", "op", "macs", "weight_bits", "activation_bits", "lhs_bits"):
            assert written[field] == getattr(row, field)
    assert number(data["coverage"]["quantized"]["macs_share"]) == found.coverage.share("quantized")


def test_json_of_a_fraction_is_exact():
    found = report(convnet({"linear-only": "100%"}, cost_table=HALF_UNPRICED))
    resource = json.loads(found.to_json())["resources"]["linear-only"]
    assert resource["total"] == "320/3"
    assert resource["total_float"] == pytest.approx(106.6666667)


def test_csv_parses_back_exactly():
    found = report(tagger())
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [line["name"] for line in lines if line["kind"] == "operation"] == [
        row.name for row in found.rows
    ]
    assert [line["name"] for line in lines if line["kind"] == "tensor"] == [
        row.name for row in found.tensors
    ]
    for name, total in found.totals.items():
        cells = [line[f"cost_{name}"] for line in lines]
        assert sum(number(cell) for cell in cells if cell) == total
    qk = next(line for line in lines if line["name"].endswith(".qk"))
    assert qk["lhs_bits"] == "32"
    assert qk["weight_bits"] == ""


def test_a_float_model_has_no_report():
    with pytest.raises(
        UsageError, match=r"ConvNet is neither prepared nor lowered.*cgmq_fx\.prepare"
    ):
        report(ConvNet())


def test_a_lowered_model_has_the_report_of_what_it_was_made_from():
    prepared = convnet(bits=4)
    prepared(torch.rand(8, 1, 8, 8))
    before, after = report(prepared), report(lower(prepared, allow_untrained=True))
    assert after == before
    assert str(after) == str(before)


def test_something_else_has_no_report():
    with pytest.raises(UsageError, match="str is neither prepared nor lowered"):
        report("model")


def test_without_shapes_there_is_no_report():
    with pytest.raises(TrainingError, match=r"has seen no batch.*example_inputs"):
        report(prepare(ConvNet(), "5%"))


def test_a_report_keeps_what_it_said():
    prepared = convnet(bits=2)
    before = report(prepared)
    set_bits(prepared, lambda site: 8)
    after = report(prepared)
    assert before.totals["bops"] < after.totals["bops"]
    with pytest.raises(AttributeError):
        before.rows = ()


def test_a_model_without_operations():
    found = report(prepare(nn.Sequential(nn.Flatten()), "5%", example_inputs=IMAGES))
    assert found.rows == ()
    assert found.totals == {"bops": 0}
    assert "nothing in the model has a price" in str(found)
    json.loads(found.to_json())
