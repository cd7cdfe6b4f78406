"""Where a tensor of 0 bits would leave nothing of the inputs, 0 is the last of all choices."""

import math

import pytest
import torch
from hypothesis import given
from torch import nn

from cgmq_fx.allocate import allocate
from cgmq_fx.allocate_exactly import allocate_exactly
from cgmq_fx.calibrate import calibrate
from cgmq_fx.fit import fit
from cgmq_fx.measured_loss import measured_loss
from cgmq_fx.passes.annotate_operations import operand_of
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.passes.decisive_tensors import decisive_tensors
from cgmq_fx.passes.meta import OP_INFO
from cgmq_fx.passes.recurrent import is_recurrent
from cgmq_fx.prepare import prepare
from cgmq_fx.sensitivity import predicted_loss
from cgmq_fx.solve import solve
from cgmq_fx.testing import models
from cgmq_fx.testing.check_prepare import positional_inputs

X = torch.linspace(-1, 1, 4 * 2 * 6 * 6).sin().reshape(4, 2, 6, 6)
WIDTHS = (0, 1, 2, 4, 8)


class Residual(nn.Module):
    """A stem, a block with a shortcut, and a head; a gate with factors of its own beside them."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.gate, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.inner(x)
        x = x.mean((2, 3))
        return self.head(x * torch.sigmoid(self.gate(x)))


class Chain(nn.Module):
    """Two layers, one after the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(64, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).flatten(1))


class TwoOutputs(nn.Module):
    """A trunk with two heads."""

    def __init__(self):
        super().__init__()
        self.trunk, self.first, self.second = (nn.Linear(72, n) for n in (8, 3, 3))
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.trunk(x.flatten(1)))
        return self.first(x), self.second(x)


class Products(nn.Module):
    """A product of two activations."""

    def forward(self, x):
        x = x.flatten(2)
        return torch.softmax(x @ x.transpose(1, 2), -1)


def made(model, budget="100%", **options):
    torch.manual_seed(0)
    options = {"widths": WIDTHS, "learn_input_bits": True, **options}
    return prepare(model, budget, example_inputs=(X,), **options)


def decisive(prepared):
    return {site.name for site in prepared.plan.accounting.sites if site.decisive}


def is_constant_without(prepared, site):
    prepared.set_bit_widths([0 if name == site else 8 for name in prepared.bit_widths])
    prepared.eval()
    with torch.no_grad():
        prepared(X)
        outputs = prepared(X)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return any(torch.allclose(y, y[:1].expand_as(y), rtol=0, atol=0) for y in outputs)


@pytest.mark.parametrize("model", [Residual, Chain, TwoOutputs, Products])
def test_they_are_those_without_which_an_output_is_a_constant(model):
    prepared = made(model())
    found = decisive(prepared)
    for site in prepared.bit_widths:
        assert (site in found) == is_constant_without(made(model()), site), site


def test_a_shortcut_lets_its_block_be_pruned():
    found = decisive(made(Residual()))
    assert {"stem_weight", "head_weight", "x"} <= found
    assert not {"inner_weight", "gate_weight"} & found


def test_without_0_among_the_widths_nobody_asks():
    assert decisive(made(Chain(), widths=(2, 4, 8))) == set()


@pytest.mark.parametrize("find", [allocate, lambda *a: allocate_exactly(*a).bits])
def test_0_bits_that_cut_are_chosen_only_where_nothing_else_is_within_the_budget(find):
    for budget, is_cut in (("0.2%", False), ("0.05%", True)):
        accounting = made(Chain(), budget).plan.accounting
        # Nothing would cost less than to prune the convolution, were it not for what it cuts.
        predicted = [
            {
                bits: math.inf if bits == 0 else float(site.name == "conv_weight")
                for bits in site.allowed
            }
            for site in accounting.sites
        ]
        bits = find(accounting, predicted)
        assert accounting.is_satisfied(bits)
        assert (min(bits) == 0) == is_cut


def test_predicted_and_measured_losses_know_it():
    prepared = made(Residual())
    calibrate(prepared, [(X,)])
    for losses in (predicted_loss(prepared), measured_loss(prepared, [(X,)])):
        for site, loss in zip(prepared.plan.accounting.sites, losses, strict=True):
            assert math.isinf(loss[0]) == site.decisive
            assert all(math.isfinite(loss[bits]) for bits in site.allowed[1:])


@pytest.mark.parametrize("train", [True, False])
def test_what_is_returned_depends_on_its_inputs(train):
    """A layer whose bias decides looks as if its weights could be left out."""
    model = Chain()
    with torch.no_grad():
        model.conv.weight.mul_(1e-2)
        model.conv.bias.fill_(1.0)
    prepared = made(model, "0.2%")
    if train:
        batches = [(X, torch.tensor([0, 1, 2, 0]))] * 10
        fit(prepared, batches, nn.functional.cross_entropy, epochs=2, progress=False)
    else:
        calibrate(prepared, [(X,)])
        solve(prepared, [(X,)])
    assert prepared.plan.accounting.is_satisfied(list(prepared.bit_widths.values()))
    assert min(prepared.bit_widths.values()) > 0


def without_inputs(prepared, site):
    """Tell by a walk over the graph whether some output is a constant where one tensor is 0."""
    zero = {
        node
        for node in prepared.graph.nodes
        if is_quantizer(prepared, node) and str(node.target) == f"quantizers.{site}"
    }

    def depending(zero):
        found = set()
        for node in prepared.graph.nodes:
            reads = any(arg in found for arg in node.all_input_nodes)
            silent = node in zero or (zero.intersection(node.all_input_nodes) and is_0(node, zero))
            if (node.op == "placeholder" or reads) and not silent:
                found.add(node)
        return found

    (output,) = prepared.graph.find_nodes(op="output")
    return not depending(set()).intersection(output.all_input_nodes) <= depending(zero)


def is_0(node, zero):
    info = OP_INFO.get(node)
    if is_recurrent(node) or info.operands == "none":
        return False
    if info.operands == "pair" and info.op not in ("matmul", "mul"):
        return False
    return any(operand_of(node, ref) in zero for ref in info.refs)


@given(models())
def test_one_look_finds_what_a_walk_for_each_tensor_does(drawn):
    model = drawn.model()
    inputs = positional_inputs(model, *drawn.inputs(), **drawn.kwargs())
    prepared = prepare(model, "100%", example_inputs=inputs)
    wanted = {site for site in prepared.quantizers if without_inputs(prepared, site)}
    assert decisive_tensors(prepared) == wanted
