"""A training step makes nothing wait, keeps little, and is compiled once."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import cgmq_fx
from cgmq_fx import step_statistics
from cgmq_fx.choose_bits import lower_to_budget
from cgmq_fx.errors import TrainingError
from cgmq_fx.guide import Guide
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.step_statistics import FiniteWatch, HostCount

# Dynamo instantiates the autograd functions that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
X, Y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


class Net(nn.Module):
    """Convolutions with batch norm, ReLU and a sum; dropout draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = x + F.relu(self.second(x))
        return self.head(F.dropout(F.relu(self.third(x)).mean((2, 3)), 0.1, self.training))


def guided(device: str = "cpu") -> tuple[PreparedModule, torch.optim.Optimizer, Guide]:
    torch.manual_seed(0)
    prepared = cgmq_fx.prepare(Net(), "3%", example_inputs=(X,)).to(device)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    return prepared, optimizer, cgmq_fx.attach(prepared, optimizer, total_steps=10_000)


def step(run, optimizer, device: str = "cpu") -> None:
    optimizer.zero_grad()
    F.cross_entropy(run(X.to(device)), Y.to(device)).backward()
    optimizer.step()


class Reads(TorchDispatchMode):
    """Notes every number that the host reads from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "local_scalar_dense" in str(func) or "is_nonzero" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_one_number_that_a_step_reads_is_whether_gradients_are_finite(monkeypatch):
    prepared, optimizer, _ = guided()
    for _ in range(2):
        step(prepared, optimizer)
    with Reads() as reads:
        step(prepared, optimizer)
    assert len(reads.found) == 1
    monkeypatch.setattr(FiniteWatch, "not_finite", lambda self, statistics: None)
    with Reads() as reads:
        step(prepared, optimizer)
    assert reads.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_step_does_not_make_the_host_wait_for_a_gpu():
    prepared, optimizer, _ = guided("cuda")
    for _ in range(3):
        step(prepared, optimizer, "cuda")
    x, y = X.cuda(), Y.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.zero_grad()
        F.cross_entropy(prepared(x), y).backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Elsewhere:
    """Statistics that claim to lie on an accelerator."""

    device = torch.device("cuda")

    def __init__(self, value: float) -> None:
        self.value = torch.tensor([[value, 1.0]])


class Event:
    """Has happened when it is asked for the second time."""

    def __init__(self) -> None:
        self.asked = 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked > 1


def test_on_an_accelerator_what_is_not_finite_is_told_once_it_is_known(monkeypatch):
    monkeypatch.setattr(step_statistics, "copy_beside", lambda s: (s.value, Event()))
    watch = FiniteWatch()
    told = [watch.not_finite(Elsewhere(value)) for value in (1.0, 2.0, math.nan, 3.0, 4.0, 5.0)]
    assert [item is None for item in told] == [True, True, True, True, False, True]
    assert bool(told[4].isnan().any())


def test_on_a_cpu_the_step_is_refused_before_anything_is_lost():
    prepared, optimizer, _ = guided()
    step(prepared, optimizer)
    before = copy.deepcopy(prepared.state_dict())
    optimizer.zero_grad()
    (prepared(X).sum() * math.nan).backward()
    with pytest.raises(TrainingError, match="the optimizer has not stepped"):
        optimizer.step()
    after = prepared.state_dict()
    weights = [name for name, _ in prepared.named_parameters()]
    assert all(torch.equal(before[name], after[name]) for name in weights)


def test_a_count_is_read_again_where_somebody_wrote_to_it():
    counter, count = torch.tensor(3), HostCount()
    assert count.of(counter) == 3
    assert [count.add_one(counter) for _ in range(2)] == [4, 5]
    with Reads() as reads:
        assert count.of(counter) == 5
    assert reads.found == []
    counter.fill_(9)
    assert (count.add_one(counter), int(counter)) == (10, 10)
    assert count.of(torch.tensor(1)) == 1


def change_widths(prepared: PreparedModule, width: int) -> int:
    """Give every learned quantizer another width; return how many."""
    learned = [q for q in prepared.quantizers.values() if q.spec.learned]
    for quantizer in learned:
        assert quantizer.bit_width != width
        quantizer.set_bit_width(width)
    return len(learned)


def test_compiled_once_whatever_the_widths_do():
    torch._dynamo.reset()
    counters.clear()
    prepared, optimizer, _ = guided()
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
    step(compiled, optimizer)  # finds the ranges, too
    for width in (8, 4, 2):
        assert change_widths(prepared, width) == 7
        for _ in range(2):
            step(compiled, optimizer)
        assert not any(quantizer.is_due for quantizer in prepared.quantizers.values())
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    prepared.eval()
    torch.testing.assert_close(compiled(X), prepared(X), rtol=1e-4, atol=1e-4)


def test_what_is_due_is_settled_before_compiled_code_and_leaves_no_trace():
    torch._dynamo.reset()
    prepared, _, _ = guided()
    held = copy.deepcopy(prepared)
    state = torch.get_rng_state()
    out = torch.compile(prepared, backend="aot_eager")(X)
    torch.set_rng_state(state)
    assert torch.equal(held(X), out)  # ranges of the same batch, the same dropout
    for (name, mine), theirs in zip(prepared.named_buffers(), held.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_guide_settles_what_a_compiled_function_around_the_model_leaves():
    torch._dynamo.reset()
    prepared, optimizer, _ = guided()
    prepared(X)
    around = torch.compile(lambda x: prepared(x) * 1.0, backend="aot_eager", fullgraph=True)
    step(around, optimizer)
    change_widths(prepared, 4)
    step(around, optimizer)
    assert not any(quantizer.refit_pending for quantizer in prepared.quantizers.values())


def saved_bytes(run) -> int:
    """Return the bytes of the distinct memory that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(X)
        del out
    return sum(kept.values())


def test_what_is_kept_for_the_backward_pass_is_one_tensor_for_each_quantized_one():
    """Beyond what the float model keeps: the rounded tensors, which products keep; small ones."""
    torch.manual_seed(0)
    model = Net()
    prepared = cgmq_fx.prepare(model, "3%", example_inputs=(X,))
    prepared(X)
    lower_to_budget(prepared)
    prepared(X)
    rounded: list[int] = []
    for quantizer in prepared.quantizers.values():
        if quantizer.bit_width != 32:
            quantizer.register_forward_hook(lambda m, args, out: rounded.append(out.nbytes))
    prepared(X)
    for quantizer in prepared.quantizers.values():
        quantizer._forward_hooks.clear()
    assert len(rounded) >= 6
    small = 200 * len(rounded) + sum(b.nbytes for b in prepared.quantizers.buffers())
    assert saved_bytes(prepared) <= saved_bytes(model) + sum(rounded) + small
