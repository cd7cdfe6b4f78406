"""Ways to train beside the plain loop: precision, accumulation, clipping, groups, compilers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.guide import attach
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from small_training import small_data, small_prepared

STEPS = 30


def loss_of(prepared, x, y):
    return F.cross_entropy(prepared(x), y)


def trained(step, make=lambda params: torch.optim.SGD(params, 0.1, momentum=0.9)):
    """Train the small model with `step(prepared, optimizer)` and return it with its guide."""
    prepared = small_prepared()
    optimizer = make(prepared.parameters())
    guide = attach(prepared, optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        step(prepared, optimizer)
    return prepared, guide


def learned_squares(prepared):
    squares = prepared.plan.statistics[:, 1]
    return squares[squares > 0]


def score(module):
    """Return the share of right answers on data that was not trained on."""
    x, y = small_data(256, 3)
    return float((module(x).argmax(1) == y).float().mean())


def plain(prepared, optimizer):
    loss_of(prepared, *small_data()).backward()
    optimizer.step()


def test_bf16_autocast():
    def step(prepared, optimizer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(prepared, *small_data())
        loss.backward()
        optimizer.step()

    prepared, guide = trained(step)
    assert guide.is_satisfied
    fixed = lower(prepared)
    x, _ = small_data(256, 3)
    assert score(fixed) > score(lower(trained(plain)[0])) - 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        low, wide = prepared.eval()(x), fixed(x)
    assert low.dtype == wide.dtype == torch.bfloat16
    assert float((low - wide).abs().mean()) < 0.05  # folding rounds apart: some codes move by one


def statistics_after(step):
    """Return the statistics of one step from a calibrated model without batch norm."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = small_data()
    prepared = prepare(model, "100%", example_inputs=(x,))
    prepared(x)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.0)
    attach(prepared, optimizer, total_steps=10**6)
    step(prepared, optimizer, x, y)
    places = {site: place for place, site in enumerate(prepared.quantizers)}
    return prepared.plan.statistics, [
        places[n] for n in places if "weight" not in n and n != "input_1"
    ]


def test_accumulated_gradients_give_the_statistics_of_the_whole_batch():
    """An activation's sum of squares is that of the batch; its mean adds up over the parts."""

    def whole(prepared, optimizer, x, y):
        loss_of(prepared, x, y).backward()
        optimizer.step()

    def in_parts(prepared, optimizer, x, y):
        for place in range(4):
            (loss_of(prepared, x[place::4], y[place::4]) / 4).backward()
        optimizer.step()

    (once, places), (parts, _) = statistics_after(whole), statistics_after(in_parts)
    assert places
    assert torch.allclose(once[places, 1], parts[places, 1], rtol=1e-4)
    assert torch.allclose(once[places, 0] * 4, parts[places, 0], rtol=1e-3)


def test_a_step_is_counted_once_however_many_parts():
    def step(prepared, optimizer):
        for _ in range(3):
            (loss_of(prepared, *small_data()) / 3).backward()
        optimizer.step()

    prepared, guide = trained(step)
    assert int(prepared.plan.steps) == STEPS
    assert guide.is_satisfied


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_that_does_not_bite_changes_nothing(clip):
    """The probes are gradients too; they must not count for the norm, nor be cut themselves."""

    def step(prepared, optimizer):
        loss_of(prepared, *small_data()).backward()
        parameters = [p for p in prepared.parameters() if p.grad is not None]
        own = [p for p in parameters if not any(p is q.probe for q in prepared.quantizers.values())]
        norm = torch.nn.utils.get_total_norm([p.grad for p in own])
        if clip == "norm":
            found = torch.nn.utils.clip_grad_norm_(parameters, 1e3)
            assert float(found) == pytest.approx(float(norm), rel=1e-6)
        else:
            torch.nn.utils.clip_grad_value_(parameters, 1e3)
        optimizer.step()

    first, second = trained(plain)[0], trained(step)[0]
    assert first.bit_widths == second.bit_widths
    assert torch.equal(first.plan.statistics, second.plan.statistics)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_that_bites_keeps_the_order_of_sensitivities(clip):
    def step(prepared, optimizer):
        loss_of(prepared, *small_data()).backward()
        if clip == "norm":
            torch.nn.utils.clip_grad_norm_(prepared.parameters(), 1e-2)
        else:
            torch.nn.utils.clip_grad_value_(prepared.parameters(), 1e-3)
        optimizer.step()

    prepared, guide = trained(step)
    assert guide.is_satisfied
    squares = learned_squares(prepared)
    assert bool(squares.isfinite().all())
    assert len(squares) == 5


def test_a_scaled_loss_gives_the_same_course():
    """GradScaler divides gradients, and so the probes' squares by less: all by one factor."""
    scaler_steps = []

    def step(prepared, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        scaler.scale(loss_of(prepared, *small_data())).backward()
        scaler.step(optimizer)
        scaler.update()
        scaler_steps.append(scaler.get_scale())

    first, second = trained(plain)[0], trained(step)[0]
    assert scaler_steps[-1] == 2.0**12
    assert first.bit_widths == second.bit_widths
    ratio = learned_squares(second) / learned_squares(first)
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)


def test_a_step_that_the_scaler_skips_is_none():
    prepared = small_prepared()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    attach(prepared, optimizer, total_steps=STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for factor, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        optimizer.zero_grad()
        scaler.scale(loss_of(prepared, *small_data()) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert int(prepared.plan.steps) == steps
    assert bool(prepared.plan.statistics.isfinite().all())


@pytest.mark.parametrize("guided", [0, 1])
def test_two_optimizers(guided):
    """Weights in one and ranges in the other; the guide is at either."""
    prepared = small_prepared()
    ranges = list(prepared.quantizers.parameters())
    weights = [p for p in prepared.parameters() if not any(p is r for r in ranges)]
    pair = torch.optim.SGD(weights, 0.1, momentum=0.9), torch.optim.Adam(ranges, 1e-3)
    guide = attach(prepared, pair[guided], total_steps=STEPS)
    before = [q.multiplier.clone() for q in prepared.quantizers.values()]
    for _ in range(STEPS):
        for optimizer in pair:
            optimizer.zero_grad()
        loss_of(prepared, *small_data()).backward()
        for optimizer in pair:
            optimizer.step()
    assert guide.is_satisfied
    assert int(prepared.plan.steps) == STEPS
    assert len(learned_squares(prepared)) == 5
    after = [q.multiplier for q in prepared.quantizers.values()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) >= 4


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, 1e-2, weight_decay=0.5),
    "foreach": lambda groups: torch.optim.AdamW(groups, 1e-2, weight_decay=0.5, foreach=True),
}


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("split", [False, True])
def test_ranges_are_not_decayed(kind, split):
    """One step with no gradient but decay moves weights and leaves ranges alone."""
    prepared = small_prepared()
    ranges = [q.multiplier for q in prepared.quantizers.values()]
    others = [p for p in prepared.parameters() if not any(p is r for r in ranges)]
    groups = [{"params": others}, {"params": ranges, "lr": 0.2}] if split else others + ranges
    optimizer = OPTIMIZERS[kind](groups)
    listed = [list(group["params"]) for group in optimizer.param_groups]
    settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    attach(prepared, optimizer, total_steps=10**6)
    weight = prepared.get_parameter("0.weight")
    before = weight.detach().clone()
    for parameter in prepared.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not torch.equal(weight, before)
    assert all(bool((multiplier == 1).all()) for multiplier in ranges)
    for group, params, setting in zip(optimizer.param_groups, listed, settings, strict=True):
        assert all(a is b for a, b in zip(group["params"], params, strict=True))
        assert {k: v for k, v in group.items() if k != "params"} == setting


def test_the_groups_are_whole_again_after_a_closure_that_fails():
    prepared = small_prepared()
    optimizer = torch.optim.AdamW(prepared.parameters(), weight_decay=0.1)
    attach(prepared, optimizer)
    number = len(optimizer.param_groups[0]["params"])

    def closure():
        assert len(optimizer.param_groups) == 2
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        optimizer.step(closure)
    assert [len(group["params"]) for group in optimizer.param_groups] == [number]


def test_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 3),
    )  # fmt: skip
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        prepared = prepare(copy.deepcopy(model), "3%", example_inputs=(x,))
        prepared = prepared.to(memory_format=layout)
        optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
        guide = attach(prepared, optimizer, total_steps=STEPS)
        given = x.to(memory_format=layout)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(prepared, given, y).backward()
            optimizer.step()
        assert guide.is_satisfied
        fixed = lower(prepared)
        assert torch.allclose(fixed(given), prepared.eval()(given), atol=1e-4)
        results.append(prepared.plan.statistics[:, 1].clone())
    assert torch.allclose(*results, rtol=0.3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda():
    prepared = small_prepared().cuda()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1, momentum=0.9)
    guide = attach(prepared, optimizer, total_steps=STEPS)
    x, y = (tensor.cuda() for tensor in small_data())
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(prepared, x, y).backward()
        optimizer.step()
    assert guide.is_satisfied
    assert lower(prepared)(x).is_cuda


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
class TestCompiled:
    def test_no_recompilation_and_ranges_that_fit(self):
        """Whole graph, every width on the way down, one compilation; eager is the reference."""
        torch.compiler.reset()
        compiled_code = []

        def backend(graph, inputs):
            compiled_code.append(graph)
            return graph.forward

        prepared = small_prepared()
        prepared(small_data()[0])  # finds ranges, which is not for compiled code
        compiled = torch.compile(prepared, fullgraph=True, backend=backend)
        optimizer = torch.optim.SGD(compiled.parameters(), 0.1, momentum=0.9)
        guide = attach(compiled, optimizer, total_steps=STEPS)
        seen = set()
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(compiled, *small_data()).backward()
            optimizer.step()
            seen.add(tuple(prepared.bit_widths.values()))
        assert len(seen) > 3
        assert len(compiled_code) == 1
        assert guide.is_satisfied
        assert not any(quantizer.refit_pending for quantizer in prepared.quantizers.values())
        assert score(lower(compiled)) > score(lower(trained(plain)[0])) - 0.1
