"""Every model of the zoo goes on from a checkpoint as if it had not stopped."""

import pytest
import torch
from torch.utils import _pytree as pytree

import graph_zoo
from cgmq_fx.checkpoint import resume, save_checkpoint
from cgmq_fx.guide import attach
from cgmq_fx.identity import identity
from cgmq_fx.prepare import prepare
from checkpoint_runs import differing, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


# Without parameters, or changing in place what their own gradients need.
UNTRAINABLE = {"no parameters", "in-place alias", "changed between reads"}
TRAINABLE = [case for case in graph_zoo.ZOO if case.id not in UNTRAINABLE]


class Run:
    def __init__(self, case, budget="100%", **options):
        model, self.inputs = case.build()
        given = {"example_inputs": self.inputs, "batch_axis": case.batch_axis}
        torch.manual_seed(0)
        self.prepared = prepare(model, budget, **given, **options)
        parameters = [p for p in self.prepared.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9)
        attach(self.prepared, self.optimizer, direction="dir_2", total_steps=10)

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            found = pytree.tree_leaves(self.prepared(*self.inputs))
            tensors = [x for x in found if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.backward(torch.stack([x.float().square().mean() for x in tensors]).sum())
            self.optimizer.step()
            # As a direction would, but whatever the budget: ranges are fitted anew afterwards.
            lower = {16: 8, 32: 8}
            self.prepared.set_bit_widths(
                [
                    lower.get(quantizer.bit_width, quantizer.bit_width)
                    if quantizer.spec.learned
                    else quantizer.bit_width
                    for quantizer in self.prepared.quantizers.values()
                ]
            )


def goes_on(path, case, **options):
    whole = Run(case, **options)
    whole.train(4)
    first = Run(case, **options)
    first.train(2)
    save_checkpoint(path, first.prepared, first.optimizer)
    second = Run(case, **options)
    resume(path, second.prepared, second.optimizer)
    second.train(2)
    return differing(tensors_of(whole.prepared), tensors_of(second.prepared))


@pytest.mark.parametrize("case", TRAINABLE, ids=lambda case: case.id)
def test_the_course_is_the_same(tmp_path, case):
    assert goes_on(tmp_path / "run.ckpt", case) == []


def test_quantizers_that_several_tensors_share(tmp_path):
    case = graph_zoo.case("residual")
    options = {"budget": {"bops": "100%", "peak_activation_memory": "100%"}, "share": ("add",)}
    quantizers = Run(case, **options).prepared.quantizers.values()
    assert any(quantizer.spec.num_tensors > 1 for quantizer in quantizers)
    assert goes_on(tmp_path / "run.ckpt", case, **options) == []


def test_exported_graphs(tmp_path):
    case = graph_zoo.case("residual")
    assert goes_on(tmp_path / "run.ckpt", case, front_end="export") == []
    one, two = (identity(Run(case, front_end="export").prepared) for _ in range(2))
    assert one == two
