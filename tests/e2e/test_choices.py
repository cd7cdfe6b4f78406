"""A residual network under all choices at once, trained, lowered and recomputed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgmq_fx.guide import attach
from cgmq_fx.ledger import ledger
from cgmq_fx.lower import lower
from cgmq_fx.overrides import Override
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from cgmq_fx.testing.recompute import products_of

TABLE = {
    "name": "npu",
    "unit": "cycle",
    "unpriced": "zero",
    "share": ["add"],
    "row": [
        {
            "op": ["conv2d", "linear"],
            "per": "mac",
            "cost": {"formula": "weight_bits * activation_bits / 64"},
        },
        {"op": "add", "per": "output_element", "cost": {"formula": "(lhs_bits + rhs_bits) / 16"}},
    ],
}


class Block(nn.Module):
    """Two convolutions and what goes past them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + f(x))."""
        return F.relu(x + self.second(F.relu(self.first(x))))


class Residual(nn.Module):
    """A stem, two blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def data() -> tuple[Tensor, Tensor]:
    """Images of which one quarter is bright, and which."""
    generator = torch.Generator().manual_seed(5)
    y = torch.randint(4, (64,), generator=generator)
    x = torch.randn(64, 1, 8, 8, generator=generator)
    for image, label in zip(x, y.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[0, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] += 1
    return x, y


@pytest.mark.slow
def test_a_residual_network_under_all_choices():
    torch.manual_seed(0)
    model, (x, y) = Residual(), data()
    prepared = prepare(
        model,
        {"npu": "8%"},
        example_inputs=x,
        cost_table=TABLE,
        skip="head",
        overrides={
            "stem.0.weight": Override(bit_width=8, per_channel=False),
            "blocks.1.*": Override(affine=True, role="weight"),
            "blocks.0.second.0": {"widths": (2, 4), "role": "weight"},
        },
    )
    optimizer = torch.optim.Adam(prepared.parameters(), 0.01)
    attach(prepared, optimizer, total_steps=30)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    fixed = lower(prepared)

    accounting, bits = fixed.plan.accounting, fixed.bit_widths
    totals = accounting.totals([bits[name] for name in accounting.site_names])
    assert totals["npu"] <= accounting.limits["npu"]
    products = sum(product.bops for product in products_of(fixed, (x[:1],)))
    row = accounting.resources["npu"].costs(accounting.index(list(bits.values())))
    adds = sum(cost for cost, o in zip(row, accounting.operations, strict=True)
               if o.operation.op == "add")  # fmt: skip
    assert totals["npu"] == products / 64 + adds

    assert bits["stem_0_weight"] == 8
    assert bits["blocks_0_second_0_weight"] in (2, 4)
    assert "head_weight" not in bits
    check_float(prepared, fixed, x)
    check_shared(prepared)
    check_affine(fixed)
    assert "skipped by skip='head'; priced at 32 bits" in str(report(fixed))
    assert any("skipped by skip='head'" in group.reason for group in ledger(fixed).floats)


def check_float(prepared: nn.Module, fixed: nn.Module, x: Tensor) -> None:
    """The skipped layer has its trained numbers, and computes with what arrives, bit for bit."""
    for name in ("weight", "bias"):
        assert fixed.get_parameter(f"head.{name}").equal(prepared.get_parameter(f"head.{name}"))
    seen: dict[str, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_function" and "linear" in n.name:
                weight = self.env[n.args[1]]
                seen["in"], seen["out"], seen["weight"] = self.env[n.args[0]], result, weight
            return result

    with torch.no_grad():
        output = Watch(fixed).run(x)
    assert seen["weight"].equal(prepared.get_parameter("head.weight"))
    bias = prepared.get_parameter("head.bias")
    assert output.equal(F.linear(seen["in"], seen["weight"], bias))
    assert seen["in"].unique().numel() > 256


def check_shared(prepared: nn.Module) -> None:
    """Both additions read one quantizer each, for both of their operands."""
    for node in prepared.graph.find_nodes(op="call_function", target=torch.add) or [
        n for n in prepared.graph.nodes if n.name.startswith("add")
    ]:
        targets = {str(arg.target) for arg in node.all_input_nodes}
        assert len(targets) == 1
        assert next(iter(targets)).startswith("quantizers.")
        assert prepared.get_submodule(next(iter(targets))).spec.num_tensors >= 2


def check_affine(fixed: nn.Module) -> None:
    """Weights with a zero_point are stored as codes too, and survive copies and state dicts."""
    frozen = fixed.get_submodule("frozen.blocks_1_first_0_weight")
    assert frozen.zero_point is not None
    assert frozen.codes.min() >= 0
    again = copy.deepcopy(fixed)
    again.load_state_dict(fixed.state_dict())
    assert again.get_submodule("frozen.blocks_1_first_0_weight")().equal(frozen())
