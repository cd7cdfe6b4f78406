"""What the sweeps share: prepare many models, each in a process of its own, and check the laws.

  1  the user's model is untouched; the same inputs, the same output structure, the same settings
  2  every key of the state dict with the same tensor; a float checkpoint loads
  3  with every bit-width at 32 the numbers are the float model's, bit for bit, in both modes
  4  every operation that computes is quantized and priced, or in the ledger with a reason
  5  a total is the sum of its rows, exactly, and never falls when a bit-width rises
  6  a parameter has one quantizer, and counts once in memory

MACs are compared with half of what `torch.utils.flop_counter` says of the float model, exactly.
There and in law 3 the fused evaluation kernel of `nn.MultiheadAttention` is off: it is other
arithmetic, and a counter does not see into it.
"""

import gc
import multiprocessing as mp
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn

from cgmq_fx.errors import BudgetError, CgmqError, UnsupportedModelError
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.testing.accounting_laws import (
    check_coverage,
    check_sharing,
    check_ties,
    check_totals,
)
from cgmq_fx.testing.compare import Inputs, split_inputs
from cgmq_fx.testing.counting import FloatCount, count_float
from cgmq_fx.testing.prepare_laws import check_numbers, check_signature, check_state
from cgmq_fx.testing.snapshot import Snapshot

BUDGET = "5%"
BOTH_BUDGETS = {"bops": "5%", "weight_memory": "50%"}
LAWS = ("1", "2", "3", "4", "5", "6", "MACs")
# Above, the second budget, the first batch and a backward pass are not tried.
_SMALL_PARAMETERS = 30_000_000
_SMALL_MACS = 2_000_000_000


@dataclass(frozen=True)
class Subject:
    """One model of a sweep; its functions must be importable, to reach another process.

    Attributes:
        name: of the row.
        group: the models that are counted together.
        family: the column beside the name.
        build: returns the float model.
        inputs: returns, for the model, the inputs of a call with one sample, for evaluation, and
            with two, for training.
        options: further keyword arguments of `prepare`.
        parts: submodules to prepare where the model as a whole is refused.
        small_parameters: up to so many, the second budget, the first batch and a backward pass are
            tried too.
    """

    name: str
    group: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], tuple[Inputs, Inputs]]
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    small_parameters: int = _SMALL_PARAMETERS


@dataclass
class Outcome:
    """What the sweep found out about one model; seconds are of processor time.

    Attributes:
        refused: what `prepare` said to a model that it does not take.
        crashed: any other error, of the model, of `prepare` or of a check.
        faults: the faults found, by law.
        parts: the outcome of each part that was tried in place of the model.
    """

    name: str
    group: str
    family: str
    parameters: int = 0
    shape: str = ""
    prepare_seconds: float = 0.0
    total_seconds: float = 0.0
    macs: int = 0
    quantized: float = 0.0
    floor: float = 0.0
    first_batch: str = ""
    refused: str = ""
    crashed: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    parts: list["Outcome"] = field(default_factory=list)

    @staticmethod
    def of_row(row: Mapping[str, Any]) -> "Outcome":
        """Return the outcome that `dataclasses.asdict` took apart."""
        parts = [Outcome.of_row(part) for part in row["parts"]]
        return Outcome(**{**row, "parts": parts})

    @property
    def prepared(self) -> bool:
        """Whether `prepare` took the model."""
        return not self.refused and not self.crashed

    @property
    def broken(self) -> list[str]:
        """The laws from 1 to 6 that do not hold: a wrong graph."""
        return [law for law in LAWS[:6] if self.faults.get(law)]

    @property
    def lawful(self) -> bool:
        """Whether the model is prepared and laws 1 to 6 hold."""
        return self.prepared and not self.broken

    @property
    def exact(self) -> bool:
        """Whether the MACs are those of the independent counter."""
        return self.prepared and not self.faults.get("MACs")

    def add(self, law: str, faults: Iterator[str]) -> None:
        """Record the first faults of a law, and a check that broke as one."""
        found = self.faults.setdefault(law, [])
        try:
            found.extend(faults)
        except Exception as error:  # a crash of the model or of a check is a finding
            found.append(f"{type(error).__name__}: {error}")
        del found[5:]


# -- one model -------------------------------------------------------------------------------------


def examine(subject: Subject) -> Outcome:
    """Prepare one model and check it; where it is refused, its parts."""
    outcome = Outcome(subject.name, subject.group, subject.family)
    started = time.process_time()
    try:
        model = subject.build()
        one, two = subject.inputs(model)
        _examine_one(outcome, model, one, two, subject)
        if outcome.refused and subject.parts:
            outcome.parts = list(_examine_parts(subject, model, one, two))
    except Exception as error:
        outcome.crashed = f"{type(error).__name__}: {error}"
    outcome.total_seconds = time.process_time() - started
    return outcome


def _examine_one(
    outcome: Outcome, model: nn.Module, one: Inputs, two: Inputs, subject: Subject
) -> None:
    options = subject.options
    outcome.parameters = sum(parameter.numel() for parameter in model.parameters())
    outcome.shape = _shape(one)
    model.train()
    before = Snapshot.of(model)
    started = time.process_time()
    try:
        prepared = prepare(model, BUDGET, example_inputs=_given(one), **options)
    except UnsupportedModelError as error:
        outcome.refused = str(error)
        return
    outcome.prepare_seconds = time.process_time() - started
    outcome.add("1", before.faults(model))
    outcome.add("1", check_signature(model, prepared))
    outcome.add("2", check_state(model, prepared))
    counted = count_float(model, one)
    small = outcome.parameters < subject.small_parameters and counted.macs < _SMALL_MACS
    _describe(outcome, prepared, counted)
    outcome.add("4", check_coverage(prepared, one))
    outcome.add("5", check_totals(prepared, counted))
    outcome.add("6", check_ties(prepared))
    outcome.add("6", check_sharing(prepared))
    outcome.add("3", check_numbers(model, prepared, one, two, backward=small))
    del prepared
    gc.collect()
    if small:
        _check_both_budgets(outcome, model, counted, one, options)
        _check_first_batch(outcome, model, one, two, options)


def _given(inputs: Inputs) -> Any:
    """Return inputs as `prepare` takes them."""
    args, kwargs = split_inputs(inputs)
    return args or kwargs


def _shape(inputs: Inputs) -> str:
    """Return the shapes of one sample, without the batch axis."""
    args, kwargs = split_inputs(inputs)
    named = {**{"": args[0]}, **dict(enumerate(args[1:], 2))} if args else kwargs
    return ", ".join(
        f"{name} {'x'.join(map(str, value.shape[1:])) or 1}".strip()
        for name, value in named.items()
        if isinstance(value, Tensor)
    )


def _describe(outcome: Outcome, prepared: PreparedModule, counted: FloatCount) -> None:
    accounting = prepared.plan.accounting
    outcome.macs = sum(entry.macs for entry in accounting.ledger)
    quantized = sum(entry.macs for entry in accounting.ledger if entry.status == "quantized")
    outcome.quantized = quantized / outcome.macs if outcome.macs else 1.0
    spent = accounting.resources["bops"]
    floor = spent.floor([site.allowed for site in accounting.sites])
    outcome.floor = float(floor / spent.reference) if spent.reference else 0.0
    if outcome.macs != counted.macs:
        outcome.add("MACs", iter([f"{outcome.macs} counted, the flop counter has {counted.macs}"]))


def _check_both_budgets(
    outcome: Outcome,
    model: nn.Module,
    counted: FloatCount,
    one: Inputs,
    options: Mapping[str, Any],
) -> None:
    try:
        prepared = prepare(model, BOTH_BUDGETS, example_inputs=_given(one), **options)
    except CgmqError as error:
        outcome.add("5", iter([f"with two budgets: {type(error).__name__}: {error}"]))
        return
    outcome.add("4", check_coverage(prepared, one))
    outcome.add("5", check_totals(prepared, counted))
    outcome.add("6", check_ties(prepared))
    outcome.add("6", check_sharing(prepared))


def _check_first_batch(
    outcome: Outcome, model: nn.Module, one: Inputs, two: Inputs, options: Mapping[str, Any]
) -> None:
    """Prepare without inputs: the first batch brings the shapes."""
    args, kwargs = split_inputs(one)
    try:
        prepared = prepare(model, BUDGET, **options)
        prepared.eval()(*args, **kwargs)
    except (BudgetError, UnsupportedModelError):
        # A branch that shapes decide: it stops the trace, or a function with it stays in float.
        outcome.first_batch = "needs inputs"
        return
    except Exception as error:
        outcome.add("3", iter([f"without inputs: {type(error).__name__}: {error}"]))
        return
    outcome.first_batch = "yes"
    outcome.add("3", check_numbers(model, prepared, one, two, backward=False))
    macs = sum(entry.macs for entry in prepared.plan.accounting.ledger)
    if macs != outcome.macs:
        outcome.add("4", iter([f"priced on the first batch it has {macs} MACs"]))


# -- the parts of a model that is refused as a whole -----------------------------------------------


def _examine_parts(
    subject: Subject, model: nn.Module, one: Inputs, two: Inputs
) -> Iterator[Outcome]:
    """Examine each part on the inputs that it gets in a run of the whole model."""
    for path in subject.parts:
        outcome = Outcome(f"{subject.name}.{path}", subject.group, subject.family)
        try:
            part = model.get_submodule(path)
            given = [
                _inputs_of(part, model.train(training), inputs)
                for training, inputs in ((False, one), (True, two))
            ]
            _examine_one(outcome, part, given[0], given[1], subject)
        except Exception as error:
            outcome.crashed = f"{type(error).__name__}: {error}"
        yield outcome


class _FoundError(Exception):
    """Ends a run of a model where one of its parts is called."""


@torch.no_grad()
def _inputs_of(part: nn.Module, model: nn.Module, inputs: Inputs) -> Inputs:
    found: list[Inputs] = []

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args or kwargs)
        raise _FoundError

    handle = part.register_forward_pre_hook(remember, with_kwargs=True)
    args, kwargs = split_inputs(inputs)
    try:
        model(*args, **kwargs)
    except _FoundError:
        return found[0]
    finally:
        handle.remove()
    raise ValueError("the model does not call this part")


# -- many models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one model may take: seconds of the clock, and bytes of memory."""

    seconds: float = 600.0
    memory: int = 14 << 30


def sweep(
    subjects: Sequence[Subject], jobs: int, limits: Limits, preload: Sequence[str] = ()
) -> Iterator[Outcome]:
    """Examine each model in a process of its own, `jobs` at a time; yield as they end."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["sweep_runner", *preload])
    waiting = list(reversed(subjects))
    running: dict[Connection, tuple[Subject, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            subject = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_send, args=(subject, sender, limits.memory)
            )
            process.start()
            sender.close()
            running[receiver] = subject, process, time.monotonic() + limits.seconds
        first = min(deadline for _, _, deadline in running.values())
        ready = wait([*running], timeout=max(0.0, first - time.monotonic()))
        late = [item for item, (_, _, end) in running.items() if end <= time.monotonic()]
        for receiver in {*running} & {*ready, *late}:
            subject, process, _ = running.pop(receiver)
            yield _receive(subject, receiver if receiver in ready else None, limits)
            process.kill()
            process.join()


def _send(subject: Subject, sender: Connection, memory: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    sender.send(examine(subject))
    sender.close()


def _receive(subject: Subject, receiver: Connection | None, limits: Limits) -> Outcome:
    lost = Outcome(subject.name, subject.group, subject.family)
    if receiver is None:
        lost.crashed = f"no result after {limits.seconds:.0f} s"
        return lost
    try:
        outcome = receiver.recv()
    except EOFError:
        lost.crashed = f"the process ended without a result (over {limits.memory >> 30} GiB?)"
        return lost
    assert isinstance(outcome, Outcome)
    return outcome
