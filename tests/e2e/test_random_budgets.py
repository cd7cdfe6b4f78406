"""Every lowered module is within its budget, recomputed by code of its own."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cgmq_fx.fit import fit
from cgmq_fx.guide import attach
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.testing.recompute import memory_bytes, products_of, relative_bops

NUM_BUDGETS = 10
DIRECTIONS = ("fisher", "dir_1", "dir_2", "dir_3")


class Network(nn.Module):
    """A forward given as a function of the module, whose layers are given by name."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def norm_relu(channels: int, *, affine: bool = True) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels, affine=affine), nn.ReLU())


def residual(rng: random.Random) -> nn.Module:
    c, k = rng.choice((4, 6, 8)), rng.choice((1, 3, 5))
    return Network(
        lambda m, x: m.head(
            F.relu(m.norm(m.second(F.relu(m.first(y := m.stem(x))))) + m.skip(y)).mean((2, 3))
        ),
        stem=nn.Sequential(nn.Conv2d(3, c, 3, stride=2, bias=False), norm_relu(c)),
        first=nn.Conv2d(c, 2 * c, k, padding=k // 2),
        second=nn.Conv2d(2 * c, 2 * c, 3, padding=2, dilation=2, padding_mode="circular"),
        norm=nn.BatchNorm2d(2 * c),
        skip=nn.Conv2d(c, 2 * c, 1),
        head=nn.Linear(2 * c, 5),
    )


def depthwise(rng: random.Random) -> nn.Module:
    c, factor = rng.choice((4, 8)), rng.choice((2, 3))
    wide = c * factor
    return nn.Sequential(
        nn.Conv2d(3, c, 3, padding="same", bias=False),
        norm_relu(c, affine=False),
        nn.Conv2d(c, wide, 1, bias=False),
        nn.BatchNorm2d(wide),
        nn.Hardswish(),
        nn.Conv2d(wide, wide, 3, stride=2, groups=wide, bias=False),
        nn.BatchNorm2d(wide),
        nn.ReLU6(),
        nn.Conv2d(wide, c, 1, groups=rng.choice((1, 2))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(c, 5),
    )


def transposed(rng: random.Random) -> nn.Module:
    c, groups = rng.choice((4, 8)), rng.choice((1, 2))
    return nn.Sequential(
        nn.Conv2d(3, c, 3, stride=2),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(c, 2 * c, 3, stride=2, groups=groups, bias=False),
        norm_relu(2 * c),
        nn.ConvTranspose2d(2 * c, 4, 2, stride=1, dilation=2, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(4, 2, 1),
    )


def perceptron(rng: random.Random) -> nn.Module:
    hidden = rng.choice((16, 33))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(48, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, 5),
    )


def _encode(m: Any, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    heads = 2
    qkv = m.project(m.first(x)).reshape(batch, length, 3, heads, width // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
    x = x + m.out(mixed)
    return m.head((x + m.feed(m.second(x))).mean(1))


def transformer(rng: random.Random) -> nn.Module:
    width = rng.choice((8, 12))
    return Network(
        _encode,
        first=nn.LayerNorm(width),
        project=nn.Linear(width, 3 * width),
        out=nn.Linear(width, width),
        second=nn.LayerNorm(width),
        feed=nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
        head=nn.Linear(width, 5),
    )


def tied(rng: random.Random) -> nn.Module:
    width = rng.choice((6, 10))
    network = Network(
        lambda m, x: m.out(m.norm(m.mix(F.relu(m.mix(m.embed(x)))))),
        embed=nn.Embedding(11, width),
        mix=nn.Linear(width, width),
        norm=nn.LayerNorm(width),
        out=nn.Linear(width, 11, bias=False),
    )
    network.out.weight = network.embed.weight
    return network


def sequence(rng: random.Random) -> nn.Module:
    c, k = rng.choice((4, 6)), rng.choice((2, 3, 5))
    return Network(
        lambda m, x: m.head(
            torch.cat([F.relu(m.left(x)), m.norm(m.right(x))], 1).flatten(2).amax(-1)
        ),
        left=nn.Conv1d(4, c, 3, padding=1),
        right=nn.Conv1d(4, c, k, padding="same", groups=2, bias=False),
        norm=nn.BatchNorm1d(c),
        head=nn.Linear(2 * c, 5),
    )


def volume(rng: random.Random) -> nn.Module:
    c = rng.choice((2, 4))
    return nn.Sequential(
        nn.Conv3d(2, c, 3, padding=1, bias=False),
        nn.BatchNorm3d(c),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.ConvTranspose3d(c, 2 * c, 2, stride=2),
        nn.ReLU(),
        nn.Conv3d(2 * c, 3, (1, 2, 3), stride=(1, 2, 1)),
        nn.Flatten(),
    )


def _mix(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.embed(x))
    scores = torch.bmm(m.left(y), m.right(y).transpose(1, 2)).softmax(-1)
    z = scores @ y
    return m.head((torch.einsum("bij,bjc->bic", scores, z) + y).mean(1))


def products(rng: random.Random) -> nn.Module:
    width = rng.choice((6, 8))
    return Network(
        _mix,
        embed=nn.Linear(12, width),
        left=nn.Linear(width, 4, bias=False),
        right=nn.Linear(width, 4, bias=False),
        head=nn.Linear(width, 5),
    )


def u_net(rng: random.Random) -> nn.Module:
    c = rng.choice((4, 6))
    return Network(
        lambda m, x: m.out(
            torch.cat(
                [m.up(m.twice(m.twice(F.max_pool2d(low := m.down(x), 2)))), low.clone().add_(1.0)],
                1,
            )
        ),
        down=nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), norm_relu(c, affine=False)),
        twice=nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU()),
        up=nn.ConvTranspose2d(c, c, 2, stride=2),
        out=nn.Conv2d(2 * c, 2, 1),
    )


@dataclass(frozen=True)
class Case:
    """A random network, and the shape of its input without the batch; no shape: tokens."""

    make: Callable[[random.Random], nn.Module]
    shape: tuple[int, ...]

    def inputs(self, samples: int) -> Tensor:
        if not self.shape:
            return torch.randint(0, 11, (samples, 7))
        return torch.randn(samples, *self.shape)


CASES = (
    Case(residual, (3, 9, 9)),
    Case(depthwise, (3, 8, 8)),
    Case(transposed, (3, 7, 8)),
    Case(perceptron, (3, 4, 4)),
    Case(transformer, (6, 8)),
    Case(tied, ()),
    Case(sequence, (4, 12)),
    Case(volume, (2, 4, 6, 6)),
    Case(products, (5, 12)),
    Case(u_net, (3, 8, 8)),
)


def build(case: Case, seed: int) -> tuple[nn.Module, Tensor]:
    """Return a network in training mode and a batch of three."""
    rng = random.Random(seed)
    while True:
        model, x = case.make(rng), case.inputs(3)
        if case.make is not transformer or model.project.in_features == x.shape[-1]:
            return model, x


def squares(output: Tensor, target: Any = None) -> Tensor:
    return (output - 0.5).square().mean()


def train(prepared: nn.Module, x: Tensor, number: int) -> nn.Module:
    """Return the module lowered after a little training, of which `number` chooses the kind."""
    direction = DIRECTIONS[number % len(DIRECTIONS)]
    if number % 5 == 3:
        batches = [(x, x)] * 3
        return fit(prepared, batches, squares, epochs=2, direction=direction, progress=False).fixed
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-3)
    steps = 1 + number % 4
    attach(prepared, optimizer, direction=direction, total_steps=(None, 10, 40)[number % 3])
    for _ in range(steps):
        optimizer.zero_grad()
        squares(prepared(x)).backward()
        optimizer.step()
    return lower(prepared)


def check_within(
    fixed: Any, sample: Tensor, budget: dict[str, Fraction], memory_reference: Fraction
) -> None:
    assert relative_bops(fixed, (sample,)) <= budget["bops"]
    bits = [fixed.bit_widths[name] for name in fixed.plan.accounting.site_names]
    accounted = fixed.plan.accounting.totals(bits)
    assert sum(product.bops for product in products_of(fixed, (sample,))) == accounted["bops"]
    if "weight_memory" in budget:
        assert memory_bytes(fixed) <= budget["weight_memory"] * memory_reference


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.make.__name__)
def test_ten_random_budgets(case):
    seed = CASES.index(case)
    rng = random.Random(100 + seed)
    torch.manual_seed(seed)
    model, x = build(case, seed)
    sample = x[:1]
    widest = prepare(model, {"bops": "100%", "weight_memory": "100%"}, example_inputs=(x,))
    accounting = widest.plan.accounting
    allowed = [site.allowed for site in accounting.sites]
    floors = {
        name: resource.floor(allowed) / resource.reference
        for name, resource in accounting.resources.items()
    }
    spread = set()
    for number in range(NUM_BUDGETS):
        at_floor = number in (0, 4)
        budget = {"bops": between(floors["bops"], 0.0 if at_floor else rng.random())}
        if number % 3 == 1:
            part = 0.0 if at_floor else rng.random()
            budget["weight_memory"] = between(floors["weight_memory"], part)
        prepared = prepare(model, budget, example_inputs=(x,) if number % 2 else None)
        fixed = train(prepared, x, number)
        check_within(fixed, sample, budget, accounting.resources["weight_memory"].reference)
        spread.add(tuple(fixed.bit_widths.values()))
    assert len(spread) > NUM_BUDGETS // 2


def between(floor: Fraction, part: float) -> Fraction:
    """Return a share between the floor and 1, at `part` of the way on a logarithmic scale."""
    share = Fraction(float(floor) ** (1 - part)) if part else floor
    return min(max(share, floor), Fraction(1))


def test_memory_of_a_module_without_batch_norm_is_the_accounted_one():
    model, x = build(Case(products, (5, 12)), 0)
    prepared = prepare(model, {"bops": "20%", "weight_memory": "30%"}, example_inputs=(x,))
    fixed = train(prepared, x, 1)
    bits = list(fixed.bit_widths.values())
    assert memory_bytes(fixed) == prepared.plan.accounting.totals(bits)["weight_memory"]
