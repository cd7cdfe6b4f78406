import json
import shutil
import xml.etree.ElementTree as ET
from collections import Counter

import networkx as nx
import pytest
import torch
from torch import fx, nn

from cgmq_fx.errors import UsageError
from cgmq_fx.explain import Explanation, explain
from cgmq_fx.explain_drawing import colour_of
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizers import Quantizer
from graph_zoo import ZOO, ZooCase

BY_ID = {case.id: case for case in ZOO}


def prepared_zoo(name: str, budget: object = "50%", **options) -> PreparedModule:
    case = BY_ID[name]
    model, inputs = case.build()
    return prepare(model, budget, example_inputs=inputs, batch_axis=case.batch_axis, **options)


def quantizer_of(gm: fx.GraphModule, node: fx.Node) -> str | None:
    is_call = node.op == "call_module"
    if is_call and type(gm.get_submodule(str(node.target))) is Quantizer:
        return str(node.target).removeprefix("quantizers.")
    return None


def edge(explanation: Explanation, place: str):
    (found,) = [item for item in explanation.edges if item.place == place]
    return found


@pytest.mark.parametrize("case", ZOO, ids=lambda item: item.id)
def test_every_read_of_a_quantizer_is_an_edge(case: ZooCase):
    model, inputs = case.build()
    prepared = prepare(model, "100%", example_inputs=inputs, batch_axis=case.batch_axis)
    explanation = explain(prepared)
    expected = Counter()
    for node in prepared.graph.nodes:
        read: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), read.append)
        expected.update(quantizer_of(prepared, item) for item in read)
    del expected[None]
    listed = Counter(item.site for item in explanation.edges if item.site in expected)
    assert listed == expected
    assert {row.site for row in explanation.quantizers} == set(prepared.quantizers)
    assert all(row.readers for row in explanation.quantizers)
    assert all(item.why for item in explanation.edges)
    assert all(item.bits == 32 for item in explanation.edges if item.site is None)


def test_an_unpriced_graph_lists_every_tensor_that_is_read():
    model, _ = BY_ID["residual"].build()
    prepared = prepare(model, "50%")
    plain = [n for n in prepared.graph.nodes if quantizer_of(prepared, n) is None]
    reads = sum(len(node.all_input_nodes) for node in plain)
    explanation = explain(prepared)
    assert len(explanation.edges) == reads
    assert {item.shape for item in explanation.edges} == {None}
    assert {row.allowed for row in explanation.quantizers if row.learned} == {(2, 4, 8, 16, 32)}


def test_reasons_name_the_table_and_the_operand():
    explanation = explain(prepared_zoo("lenet"))
    assert edge(explanation, "3.weight").why == "bops prices conv2d by its weight_bits"
    assert edge(explanation, "3.input").why == "bops prices conv2d by its activation_bits"
    assert edge(explanation, "3.bias").why == "no price of conv2d depends on its bit-width"
    arriving = edge(explanation, "0.input")
    assert (arriving.producer, arriving.source, arriving.bits) == ("input", "input", 8)
    assert "arrives with 8 bits" in arriving.why
    assert "stays float" in edge(explanation, "output.result").why


def test_a_bound_on_memory_is_the_reason_where_no_table_is():
    explanation = explain(prepared_zoo("tied", {"weight_memory": "60%"}))
    assert edge(explanation, "mix.weight").why == "weight_memory counts it at its own bit-width"


def test_a_bound_on_live_activations_is_the_reason_where_no_table_is():
    explanation = explain(prepared_zoo("residual", {"peak_activation_memory": "60%"}))
    reasons = {item.why for item in explanation.edges if item.site is not None}
    assert "peak_activation_memory counts it at its own bit-width" in reasons


def test_what_shares_a_quantizer_is_named_both_ways():
    explanation = explain(prepared_zoo("tied"))
    look_up, product = edge(explanation, "embed.weight"), edge(explanation, "out.weight")
    assert look_up.site == product.site == "embed_weight"
    assert look_up.shares == ("out.weight",)
    assert product.shares == ("embed.weight",)
    assert "stored once" in look_up.why
    assert "int64" in edge(explanation, "embed.input").why


def test_attention_has_an_edge_between_its_products():
    explanation = explain(prepared_zoo("sdpa"))
    inner = [item for item in explanation.edges if item.operand == "weights"]
    assert inner
    assert all(item.producer == item.consumer and "between" in item.why for item in inner)


def test_bits_are_the_present_ones():
    prepared = prepared_zoo("lenet")
    prepared.quantizers["3_weight_"].set_bit_width(4)
    explanation = explain(prepared)
    assert edge(explanation, "3.weight").bits == 4
    (row,) = [item for item in explanation.quantizers if item.site == "3_weight_"]
    assert (row.bits, row.ranges, row.readers) == (4, 6, ("3.weight",))


def test_text_and_json_hold_every_edge():
    explanation = explain(prepared_zoo("two inputs"))
    data = json.loads(explanation.to_json())
    assert len(data["edges"]) == len(explanation.edges)
    text = str(explanation)
    assert all(item.place in text for item in explanation.edges)
    assert max(map(len, text.splitlines())) <= 110


def test_the_networkx_graph_holds_every_edge_with_its_bits():
    explanation = explain(prepared_zoo("branches"))
    graph = explanation.to_networkx()
    assert graph.number_of_edges() == len(explanation.edges)
    assert nx.is_directed_acyclic_graph(graph)
    kinds = Counter(kind for _, kind in graph.nodes(data="kind"))
    assert kinds["input"] == kinds["output"] == 1
    sites = {site for *_, site in graph.edges(data="site") if site}
    assert sites == {row.site for row in explanation.quantizers}


def test_dot_colours_an_edge_by_its_bits():
    prepared = prepared_zoo("lenet")
    prepared.quantizers["3_weight_"].set_bit_width(2)
    lines = explain(prepared).to_dot().splitlines()
    (drawn,) = [line for line in lines if '"parameter 3.weight" -> "3"' in line]
    assert colour_of(2) in drawn
    assert "2 bits" in drawn
    assert colour_of(2) not in next(line for line in lines if '"parameter 8.weight" ->' in line)


def test_colours_are_distinct_and_cover_every_width():
    assert len({colour_of(bits) for bits in (0, 1, 2, 3, 4, 8, 16, 32)}) == 8
    assert all(colour_of(bits).startswith("#") for bits in range(33))


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@pytest.mark.parametrize("name", ["lenet", "transformer layer", "two inputs"])
def test_graphviz_draws_it(name: str):
    explanation = explain(prepared_zoo(name))
    drawing = ET.fromstring(explanation.to_svg())
    space = {"svg": "http://www.w3.org/2000/svg"}
    edges = drawing.findall(".//svg:g[@class='edge']", space)
    assert len(edges) == len(explanation.edges)


def test_without_graphviz_the_error_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"'dot' of Graphviz.*install.*to_dot"):
        explain(prepared_zoo("plain" if "plain" in BY_ID else "lenet")).to_svg()


def test_a_failing_graphviz_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path):
    program = tmp_path / "dot"
    program.write_text("#!/bin/sh\necho 'no such layout' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no such layout"):
        explain(prepared_zoo("lenet")).to_svg()


@pytest.mark.parametrize(
    "make",
    [lambda _: nn.Linear(1, 1), lambda p: lower(p, allow_untrained=True)],
    ids=["float", "lowered"],
)
def test_other_modules_are_refused(make):
    prepared = prepared_zoo("lenet", "100%")
    prepared(*BY_ID["lenet"].build()[1])
    with pytest.raises(UsageError, match=r"is not prepared.*cgmq_fx\.prepare"):
        explain(make(prepared))


def test_explaining_changes_nothing():
    prepared = prepared_zoo("residual")
    before, code = {k: v.clone() for k, v in prepared.state_dict().items()}, prepared.code
    explain(prepared)
    assert prepared.code == code
    assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())
