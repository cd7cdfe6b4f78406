import random

import numpy as np
import pytest
import torch
from torch import nn

import cgmq_fx.training_state
from cgmq_fx.checkpoint import resume, save_checkpoint
from cgmq_fx.checkpoint_file import read_checkpoint, write_checkpoint
from cgmq_fx.cost.load import get_table
from cgmq_fx.errors import TrainingError, UsageError
from cgmq_fx.guide import attach
from cgmq_fx.identity import hashed
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from checkpoint_runs import OPTIMIZERS, Loop, differing, dropout_model, example, tensors_of
from small_training import small_data

EPOCHS, STOP = 10, 2  # in mid-descent; the widths are solved anew in the seventh epoch


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.ckpt"


def saved(path, **options):
    loop = Loop(**options)
    loop.train(STOP)
    loop.save(path)
    return loop


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("priced", [True, False])
def test_the_course_is_the_same(path, kind, priced):
    whole = Loop(kind, priced=priced)
    whole.train(EPOCHS)
    first = saved(path, kind=kind, priced=priced)
    first.train(1)  # what comes after the save has no part in it
    second = Loop(kind, priced=priced, seed=9)
    second.resume(path)
    assert second.prepared.plan.is_priced
    assert len(set(second.prepared.bit_widths.values())) > 1
    assert not second.guide.is_satisfied
    second.train(EPOCHS - STOP)
    assert second.guide.is_satisfied
    assert differing(tensors_of(whole.prepared), tensors_of(second.prepared)) == []
    assert whole.scheduler.state_dict() == second.scheduler.state_dict()


@pytest.mark.parametrize("direction", ["dir_1", "dir_2", "dir_3"])
def test_the_course_of_every_direction_is_the_same(path, direction):
    whole = Loop(direction=direction)
    whole.train(6)
    saved(path, direction=direction)
    second = Loop(direction=direction, seed=9)
    second.resume(path)
    second.train(6 - STOP)
    assert differing(tensors_of(whole.prepared), tensors_of(second.prepared)) == []


def without_samples(state):
    for memory in state["model"]["quantizers"].values():
        memory["sample"] = None


def without_momentum(state):
    state["optimizers"][0]["state"] = {}


def without_random(state):
    state["random"]["torch"] = torch.Generator().manual_seed(77).get_state()


def without_shuffling(state):
    state["random"]["generators"]["loader"] = torch.Generator().manual_seed(77).get_state()


def without_schedule(state):
    state["schedulers"][0]["state"]["milestones"].clear()


def without_statistics(state):
    state["model"]["state_dict"]["entries"]["plan.statistics"].zero_()


FAULTS = [
    without_samples,
    without_momentum,
    without_random,
    without_shuffling,
    without_schedule,
    without_statistics,
]


@pytest.mark.parametrize("plant", FAULTS)
def test_each_thing_in_the_file_is_needed(path, plant):
    """The equality of courses, above, fails when any one of these is lost."""
    whole = Loop(direction="dir_2")
    whole.train(EPOCHS)
    saved(path, direction="dir_2")
    content = read_checkpoint(path)
    plant(content["state"])
    write_checkpoint(path, content)
    second = Loop(direction="dir_2", seed=9)
    second.resume(path)
    second.train(EPOCHS - STOP)
    found = differing(tensors_of(whole.prepared), tensors_of(second.prepared))
    assert any(not name.endswith(".sample") for name in found)


def test_extra_comes_back(path):
    extra = {"epoch": 3, "best": 0.5, "who": ["a", None, (1, True)], 7: torch.arange(3), "b": b"x"}
    loop = Loop()
    loop.train(1)
    loop.save(path, extra=extra)
    found = Loop().resume(path)
    assert found.steps == 3
    assert torch.equal(found.extra.pop(7), extra.pop(7))
    assert found.extra == extra


def test_what_no_file_can_hold_is_named(path):
    loop = Loop()
    circle = []
    circle.append(circle)
    extra = {"net": nn.ReLU(), "n": [np.float64(1)], (1, 2): 0, "s": {1}, "c": circle}
    with pytest.raises(UsageError) as caught:
        loop.save(path, extra=extra)
    for text in (
        "extra['net'] is torch.nn.modules.activation.ReLU",
        "extra['n'][0] is numpy.float64",
        "extra has the key (1, 2) (tuple)",
        "extra['s'] is builtins.set",
        "extra['c'][0] contains itself",
        "state_dict()",
    ):
        assert text in str(caught.value)
    assert not path.exists()


def test_a_view_is_saved_without_the_rest_of_its_storage(path):
    loop = Loop()
    loop.save(path)
    size = path.stat().st_size
    loop.save(path, extra=torch.zeros(1_000_000)[:3])
    assert path.stat().st_size < size + 10_000


def test_every_source_of_random_numbers_goes_on(path):
    loop = Loop()
    loop.save(path)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    loop.resume(path)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn


def other_model():
    return nn.Sequential(*list(dropout_model())[:-1], nn.Linear(12, 4))


def prepared_with(model=None, budget="3%", **options):
    model = dropout_model() if model is None else model
    return prepare(model, budget, **{"example_inputs": (example(),), **options})


def more_dropout():
    model = dropout_model()
    model[3].p = 0.25
    return model


MISMATCHES = {
    "budget": ({"budget": "4%"}, "budget differs: saved 'bops: 3 % (exactly share 3/100)', given"),
    "more budgets": (
        {"budget": {"bops": "3%", "weight_memory": "1 KiB"}},
        "weight_memory: 1 KiB",
    ),
    "table": ({"cost_table": "macs", "budget": "100%"}, "cost table 'bops' differs: one was saved"),
    "widths": ({"widths": (2, 4, 8)}, "widths differs: saved '(2, 4, 8, 16, 32)', given '(2, 4, 8"),
    "input bits": ({"learn_input_bits": True}, "input_bits differs: saved '8', given 'None'"),
    "per tensor": ({"per_channel": False}, "per_channel differs: saved 'True', given 'False'"),
    "graph": ({"model": other_model()}, "graph differs: saved sha256"),
    "layer": ({"model": more_dropout()}, "saved 'layer 3: torch.nn.modules.dropout.Dropout"),
    "override": ({"overrides": {"6": {"widths": (4, 8)}}}, "widths=(4, 8), learned=True"),
    "dtype": (
        {"model": dropout_model().double(), "example_inputs": (example().double(),)},
        "saved '0.weight: float32[16, 10]', given '0.weight: float64[16, 10]'",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_run_that_does_not_match_is_refused_by_name(path, name):
    saved(path)
    options, text = MISMATCHES[name]
    prepared = prepared_with(**options)
    before, state = tensors_of(prepared), torch.get_rng_state()
    optimizer = OPTIMIZERS["adamw"](prepared.parameters())
    with pytest.raises(UsageError) as caught:
        resume(path, prepared, optimizer)
    for part in (text, str(path), "nothing was changed", "start anew with another path"):
        assert part in str(caught.value)
    assert differing(before, tensors_of(prepared)) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_table_with_another_number_is_refused(path):
    content = get_table("bops").to_json()
    prepared = prepared_with(cost_table=content)
    save_checkpoint(path, prepared)
    resume(path, prepared_with(cost_table=content))
    content["input_bits"] = 16
    with pytest.raises(UsageError, match=r"cost table 'bops' differs: saved sha256 \w{12}, given"):
        resume(path, prepared_with(cost_table=content, learn_input_bits=False))


def test_other_shapes_are_refused(path):
    def prepared(*sizes):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        inputs = {"example_inputs": (torch.zeros(2, 1, *sizes),)} if sizes else {}
        return prepare(model, "50%", **inputs)

    save_checkpoint(path, prepared(8, 8))
    resume(path, prepared(8, 8))
    text = (
        r"costs for the shapes .* saved '0: conv2d, 648 MACs.*given '0: conv2d, 1800 MACs.*or none"
    )
    with pytest.raises(UsageError, match=text):
        resume(path, prepared(12, 12))
    save_checkpoint(path, prepared())  # of a run that saw no batch yet
    resume(path, prepared(12, 12))


def test_every_difference_is_listed_at_once(path):
    saved(path)
    with pytest.raises(UsageError, match=r"budget differs.*widths differs"):
        resume(path, prepared_with(budget="5%", widths=(2, 4)))


def test_the_version_is_a_part(path):
    saved(path)
    content = read_checkpoint(path)
    content["identity"] |= hashed({"cgmq_fx": "0.0.9"})
    write_checkpoint(path, content)
    with pytest.raises(UsageError, match=r"saved '0.0.9', given '.*' \(install that version\)"):
        Loop().resume(path)


def of_a_sgd(loop):
    return {"optimizer": torch.optim.SGD(loop.prepared.parameters())}


def of_fewer(loop):
    return {"optimizer": torch.optim.AdamW(list(loop.prepared.parameters())[1:])}


def of_more_groups(loop):
    own = list(loop.prepared.parameters())
    return {"optimizer": torch.optim.AdamW([{"params": own[:1]}, {"params": own[1:]}])}


OBJECTS = {
    "class": (of_a_sgd, "optimizer differs: saved torch.optim.adamw.AdamW, given torch.optim.sgd"),
    "names": (of_fewer, "optimizer differs in group 0: given without '0.weight'"),
    "groups": (of_more_groups, "optimizer differs: saved 1 groups, given 2"),
    "no optimizer": (lambda _: {"optimizer": None}, "optimizers differ: 1 saved, 0 given"),
    "no scheduler": (lambda _: {"scheduler": None}, "schedulers differ: 1 saved, 0 given"),
    "scheduler": (
        lambda x: {"scheduler": torch.optim.lr_scheduler.ConstantLR(x.optimizer)},
        "scheduler differs: saved MultiStepLR, given ConstantLR",
    ),
    "generators": (lambda _: {"generators": {}}, r"generators differ: saved \['loader'\], given"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_other_objects_are_refused_by_name(path, name):
    saved(path)
    loop = Loop()
    change, text = OBJECTS[name]
    given = {"optimizer": loop.optimizer, "guide": loop.guide, **loop.parts, **change(loop)}
    before = tensors_of(loop.prepared)
    with pytest.raises(UsageError, match=text):
        resume(path, loop.prepared, **given)
    assert differing(before, tensors_of(loop.prepared)) == []


def test_another_guide_is_refused_with_the_line_that_makes_the_saved_one(path):
    saved(path)
    loop = Loop()
    loop.guide.detach()
    text = r"one was saved, none is given \(call attach\(.*direction='fisher', total_steps=80\)"
    with pytest.raises(UsageError, match=text):
        loop.resume(path)
    attach(loop.prepared, loop.optimizer, direction="dir_1", total_steps=40)
    with pytest.raises(UsageError, match=r"direction saved 'fisher', given 'dir_1', total_steps"):
        loop.resume(path)


def test_state_goes_to_the_parameter_of_its_name(path):
    loop = saved(path)
    other = Loop()
    turned = torch.optim.AdamW(list(other.prepared.parameters())[::-1], 1e-2)
    other.scheduler = torch.optim.lr_scheduler.MultiStepLR(turned, [2, 5], 0.5)
    other.guide.detach()
    attach(other.prepared, turned, total_steps=80)
    resume(path, other.prepared, turned, **other.parts)
    names = dict(other.prepared.named_parameters())
    for name, parameter in loop.prepared.named_parameters():
        for key, value in loop.optimizer.state[parameter].items():
            assert torch.equal(turned.state[names[name]][key], value)


def test_parameters_of_a_loss_are_kept_too(path):
    loop, scale = Loop(), nn.Parameter(torch.tensor(2.0))
    extra = torch.optim.SGD([scale], 0.1)
    save_checkpoint(path, loop.prepared, [loop.optimizer, extra], **loop.parts)
    with torch.no_grad():
        scale.fill_(5)
    resume(path, loop.prepared, [loop.optimizer, extra], **loop.parts)
    assert float(scale.detach()) == 2


@pytest.mark.parametrize("priced", [True, False])
def test_a_failure_in_the_middle_undoes_everything(path, monkeypatch, priced):
    saved(path)
    loop = Loop(priced=priced, seed=3)
    before, drawn = tensors_of(loop.prepared), torch.get_rng_state()
    rates = loop.scheduler.state_dict()
    restore = cgmq_fx.training_state.restore_random_state

    def fail_once(*given):
        monkeypatch.setattr(cgmq_fx.training_state, "restore_random_state", restore)
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(cgmq_fx.training_state, "restore_random_state", fail_once)
    with pytest.raises(TrainingError, match=r"could not be loaded \(ZeroDivisionError: planted"):
        loop.resume(path)
    assert differing(before, tensors_of(loop.prepared)) == []
    assert loop.prepared.plan.is_priced is priced
    assert loop.scheduler.state_dict() == rates
    assert not loop.optimizer.state
    assert torch.equal(torch.get_rng_state(), drawn)


def test_gradients_from_before_do_not_count(path):
    loop = saved(path)
    loop.resume(path)
    assert all(parameter.grad is None for parameter in loop.prepared.parameters())


def test_the_model_alone_can_be_lowered(path):
    loop = Loop()
    loop.train(EPOCHS)
    loop.save(path)
    prepared = prepared_with(example_inputs=None)
    assert resume(path, prepared, model_only=True).steps == 3 * EPOCHS
    x, _ = small_data()
    assert torch.equal(lower(prepared)(x), lower(loop.prepared)(x))
    with pytest.raises(UsageError, match="give nothing else with it"):
        resume(path, prepared, loop.optimizer, model_only=True)


def test_wrong_arguments_are_named(path):
    loop = Loop()
    with pytest.raises(UsageError, match=r"optimizer str is no.*scheduler int has no.*'g'\] is"):
        save_checkpoint(path, loop.prepared, ["x"], scheduler=1, generators={"g": 3})
    with pytest.raises(UsageError, match="guide is not what attach returned"):
        save_checkpoint(path, loop.prepared, loop.optimizer, guide=Loop().guide)
    with pytest.raises(UsageError, match="save_checkpoint got Linear"):
        save_checkpoint(path, nn.Linear(1, 1))


def test_no_code_is_in_the_file_or_run_from_it(path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("code was run",)

    saved(path)
    content = read_checkpoint(path)
    content["sections"]["extra"] = Evil()
    write_checkpoint(path, content)
    with pytest.raises(TrainingError, match=r"holds more than plain data, which is not loaded"):
        Loop().resume(path)
    assert "code was run" not in capsys.readouterr().out
