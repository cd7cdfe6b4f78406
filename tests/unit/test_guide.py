import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.errors import BudgetError, TrainingError, UsageError
from cgmq_fx.fake_quantize import PROBE_SCALE
from cgmq_fx.guide import attach
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from small_training import small_data, small_model, small_prepared, train_step

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 1e-2, momentum=0.9, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, 1e-2),
    "adamw": lambda params: torch.optim.AdamW(params, 1e-2, weight_decay=0.5),
    "foreach": lambda params: torch.optim.AdamW(params, 1e-2, weight_decay=0.5, foreach=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 1e-3),
}
SOME = pytest.mark.parametrize("kind", sorted(OPTIMIZERS))


def guided(budget="3%", kind="adam", **options):
    prepared = small_prepared(budget)
    optimizer = OPTIMIZERS[kind](prepared.parameters())
    return prepared, optimizer, attach(prepared, optimizer, **options)


def probes_of(prepared):
    return [quantizer.probe for quantizer in prepared.quantizers.values()]


@SOME
def test_probes_are_never_updated(kind):
    prepared, optimizer, _ = guided(kind=kind, total_steps=10)
    for _ in range(5):
        train_step(prepared, optimizer)
    for probe in probes_of(prepared):
        assert not probe.any()
        assert not optimizer.state.get(probe)
        assert probe.grad is None


@SOME
def test_the_budget_is_met_at_the_end_of_the_descent(kind):
    prepared, optimizer, guide = guided(kind=kind, total_steps=50)
    assert not guide.is_satisfied
    first = train_step(prepared, optimizer)
    for _ in range(49):
        last = train_step(prepared, optimizer)
    assert guide.is_satisfied
    assert last < first
    assert int(prepared.plan.steps) == 50


@pytest.mark.parametrize("total_steps", [1, 3, 7, 40, 95])
def test_a_run_of_known_length_leaves_most_of_it_to_adapt(total_steps):
    prepared, optimizer, guide = guided(total_steps=total_steps)
    for _ in range(max(1, round(0.2 * total_steps))):
        train_step(prepared, optimizer)
    assert guide.is_satisfied


def learned_statistics(prepared):
    """Those of all but the input, whose bits and range are given: no gradient is computed there."""
    learned = [quantizer.spec.learned for quantizer in prepared.quantizers.values()]
    return prepared.plan.statistics[torch.tensor(learned)]


@pytest.mark.parametrize("direction", ["fisher", "dir_1", "dir_2", "dir_3"])
def test_once_met_always_met(direction):
    prepared, optimizer, guide = guided(direction=direction, total_steps=50)
    met = []
    for _ in range(80):
        train_step(prepared, optimizer)
        met.append(guide.is_satisfied)
    assert met[-1]
    assert met == sorted(met)


def test_bit_widths_settle():
    """After twice the descent they stay, so that the weights can adapt to them."""
    prepared, optimizer, _ = guided(total_steps=50)
    seen = []
    for step in range(50):
        if step == 20:  # from here on other sensitivities ask for other widths
            narrow = min(range(6), key=seen[-1].__getitem__)
            prepared.plan.statistics.zero_()
            prepared.plan.statistics[narrow, 1] = 1e12
        train_step(prepared, optimizer)
        seen.append(tuple(prepared.bit_widths.values()))
    assert len(set(seen[:20])) > 2
    assert len(set(seen[19:])) == 1


def test_a_run_over_budget_goes_on_even_late():
    """A model trained past its descent under another guide is brought within the budget."""
    prepared, optimizer, guide = guided(total_steps=10**6)
    for _ in range(30):
        train_step(prepared, optimizer)
    guide.detach()
    assert not guide.is_satisfied
    late = attach(prepared, optimizer, total_steps=10)
    for _ in range(2):
        train_step(prepared, optimizer)
    assert late.is_satisfied


def test_the_statistics_are_those_of_the_gradients():
    prepared, _, guide = guided()
    x, y = small_data()
    seen = []
    site = "3_weight_"

    def watch(module, args, output):
        output.register_hook(seen.append)

    prepared.quantizers[site].register_forward_hook(watch)
    F.cross_entropy(prepared(x), y).backward()
    guide._take_statistics()
    (gradient,) = seen
    place = list(prepared.quantizers).index(site)
    mean, squares = prepared.plan.statistics[place].tolist()
    assert mean == pytest.approx(float(gradient.double().mean()), rel=1e-3, abs=1e-9)
    assert squares == pytest.approx(float(gradient.double().square().sum()), rel=1e-4)


def test_clipping_by_norm_does_not_see_the_probes():
    prepared, _, _ = guided()
    x, y = small_data()
    F.cross_entropy(prepared(x), y).backward()
    parameters = list(prepared.parameters())
    probes = {id(probe) for probe in probes_of(prepared)}
    others = [p for p in parameters if id(p) not in probes]
    assert any(probe.grad.any() for probe in probes_of(prepared))
    assert torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) == (
        torch.nn.utils.get_total_norm([p.grad for p in others if p.grad is not None])
    )


def test_clipping_and_accumulation_and_schedule():
    prepared, optimizer, guide = guided(total_steps=20)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    x, y = small_data()
    for _ in range(20):
        optimizer.zero_grad()
        for part_x, part_y in zip(x.split(16), y.split(16), strict=True):
            (F.cross_entropy(prepared(part_x), part_y) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(prepared.parameters(), 0.1)
        assert math.isfinite(norm)
        optimizer.step()
        scheduler.step()
    assert guide.is_satisfied
    assert int(prepared.plan.steps) == 20
    assert lower(prepared).bit_widths == prepared.bit_widths


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure(keyword):
    """Gradients are computed within the step; the probes still stay out of it."""
    prepared, optimizer, guide = guided(total_steps=10)
    x, y = small_data()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(x), y)
        loss.backward()
        return loss

    for _ in range(10):
        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert loss.isfinite()
    assert guide.is_satisfied
    assert bool((learned_statistics(prepared)[:, 1] > 0).all())
    assert not any(probe.any() for probe in probes_of(prepared))


def test_lbfgs():
    prepared = small_prepared()
    optimizer = torch.optim.LBFGS(prepared.parameters(), lr=0.1, max_iter=3)
    guide = attach(prepared, optimizer, total_steps=10)
    x, y = small_data()

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert guide.is_satisfied
    assert not any(probe.any() for probe in probes_of(prepared))


def test_gradients_that_are_not_finite_are_refused_before_the_step():
    prepared, optimizer, _ = guided(total_steps=10)
    for _ in range(3):
        train_step(prepared, optimizer)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    x, y = small_data()
    optimizer.zero_grad()
    (F.cross_entropy(prepared(x), y) * math.nan).backward()
    with pytest.raises(TrainingError, match=r"step 3: .* 5 of 6 quantizers .*\(0_weight_, .*\)"):
        optimizer.step()
    after = prepared.state_dict()
    assert all(
        torch.equal(value, after[key])
        for key, value in before.items()
        if "running" not in key and "num_batches" not in key
    )
    train_step(prepared, optimizer)
    assert torch.isfinite(prepared.plan.statistics).all()
    assert lower(prepared)(x).isfinite().all()


def test_only_the_quantizers_with_bad_gradients_are_named():
    prepared, optimizer, _ = guided()
    x, y = small_data()
    F.cross_entropy(prepared(x), y).backward()
    prepared.quantizers["_4"].probe.grad[1] = math.inf
    with pytest.raises(TrainingError, match=r"1 of 6 quantizers are not finite \(_4\)"):
        optimizer.step()


def test_detached_it_does_nothing():
    prepared, optimizer, guide = guided(total_steps=5)
    guide.detach()
    for _ in range(5):
        train_step(prepared, optimizer)
    assert int(prepared.plan.steps) == 0
    assert set(prepared.bit_widths.values()) == {8, 32}
    assert not prepared.plan.statistics.any()


def test_it_hooks_one_optimizer_only():
    prepared, optimizer, _ = guided(total_steps=5)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert len(optimizer._optimizer_step_post_hooks) == 1
    other = torch.optim.SGD([prepared.get_parameter("0.weight")], lr=0.1)
    other.step()
    assert int(prepared.plan.steps) == 0
    assert not prepared._forward_hooks
    assert not prepared._backward_hooks
    assert all(not module._forward_hooks for module in prepared.modules())


def test_shapes_from_the_first_batch():
    prepared = small_prepared("3%", priced=False)
    optimizer = torch.optim.Adam(prepared.parameters(), 1e-2)
    guide = attach(prepared, optimizer, total_steps=10)
    assert not guide.is_satisfied
    for _ in range(5):
        train_step(prepared, optimizer)
    assert guide.is_satisfied
    impossible = small_prepared("0.1%", priced=False)
    optimizer = torch.optim.Adam(impossible.parameters(), 1e-2)
    attach(impossible, optimizer)
    with pytest.raises(BudgetError, match=r"below the floor .*0.8739 %"):
        train_step(impossible, optimizer)


def test_an_optimizer_over_some_parameters():
    """Weights alone, as in fine-tuning: statistics still come, probes are still cleared."""
    prepared = small_prepared()
    optimizer = torch.optim.Adam([prepared.get_parameter("0.weight")], 1e-2)
    guide = attach(prepared, optimizer, total_steps=10)
    for _ in range(5):
        train_step(prepared, optimizer)
    assert guide.is_satisfied
    assert all(probe.grad is None for probe in probes_of(prepared))
    assert bool((learned_statistics(prepared)[:, 1] > 0).all())


def test_the_probe_scale_is_undone():
    prepared, optimizer, _ = guided()
    x, y = small_data()
    F.cross_entropy(prepared(x), y).backward()
    probe = probes_of(prepared)[0].grad.clone()
    optimizer.step()
    assert prepared.plan.statistics[0].tolist() == (probe.double() / PROBE_SCALE).tolist()


def test_a_loaded_model_goes_on_where_it_was():
    prepared, optimizer, _ = guided(total_steps=40)
    for _ in range(6):
        train_step(prepared, optimizer)
    resumed, fresh, guide = guided(total_steps=40)
    resumed.load_state_dict(prepared.state_dict())
    assert resumed.bit_widths == prepared.bit_widths
    assert int(resumed.plan.steps) == 6
    assert torch.equal(resumed.plan.statistics, prepared.plan.statistics)
    train_step(resumed, fresh)
    train_step(resumed, fresh)
    assert guide.is_satisfied


def test_arguments_that_make_no_sense():
    prepared = small_prepared()
    optimizer = torch.optim.Adam(prepared.parameters())
    model = small_model()
    with pytest.raises(UsageError, match=r"attach got Sequential, which prepare did not return"):
        attach(model, optimizer)
    with pytest.raises(UsageError, match=r"holds none of the prepared model's parameters"):
        attach(prepared, torch.optim.Adam(model.parameters()))
    with pytest.raises(UsageError, match=r"attach got the optimizer Sequential"):
        attach(prepared, model)
    with pytest.raises(UsageError, match=r"direction='steepest' is unknown.*'dir_1'"):
        attach(prepared, optimizer, direction="steepest")
    with pytest.raises(UsageError, match=r"total_steps=0 must be at least 1"):
        attach(prepared, optimizer, total_steps=0)
    assert not optimizer._optimizer_step_pre_hooks


def test_attached_twice():
    prepared, optimizer, guide = guided()
    with pytest.raises(UsageError, match=r"Adam is guided for this prepared model already"):
        attach(prepared, optimizer)
    guide.detach()
    attach(prepared, optimizer)
    other = small_prepared()
    optimizer.add_param_group({"params": list(other.parameters())})
    attach(other, optimizer)


def test_a_model_without_quantizers():
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(10))
    prepared = prepare(model, "50%", example_inputs=(small_data()[0],))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    guide = attach(prepared, optimizer, total_steps=5)
    prepared(small_data()[0]).sum().backward()
    optimizer.step()
    assert guide.is_satisfied
