"""Does `prepare` take torchvision's models, and do the laws hold on them?

Every classification, segmentation and video model is built without pretrained weights, filled with
random numbers and prepared at the smallest input that it takes. Then the laws are checked:

  1  the user's model is untouched; the same inputs, the same output structure, the same settings
  2  every key of the state dict with the same tensor; a float checkpoint loads
  3  with every bit-width at 32 the numbers are the float model's, bit for bit, in both modes
  4  every operation that computes is quantized and priced, or in the ledger with a reason
  5  a total is the sum of its rows, exactly, and never falls when a bit-width rises
  6  a parameter has one quantizer, and counts once in memory

MACs are compared with half of what `torch.utils.flop_counter` says of the float model, exactly.
There and in law 3 the fused evaluation kernel of `nn.MultiheadAttention` is off: it is other
arithmetic, and a counter does not see into it.

    python benchmarks/torchvision_sweep.py --models 'resnet*' --jobs 2
"""

import argparse
import fnmatch
import gc
import json
import multiprocessing as mp
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import torch  # noqa: E402
from sweep_counting import FloatCount, count_float  # noqa: E402
from sweep_laws import (  # noqa: E402
    Snapshot,
    check_coverage,
    check_numbers,
    check_signature,
    check_state,
    check_ties,
    check_totals,
)
from sweep_models import build, model_names, random_input, smallest_input  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from cgmq_fx.errors import BudgetError, CgmqError, UnsupportedModelError  # noqa: E402
from cgmq_fx.prepare import prepare  # noqa: E402
from cgmq_fx.prepared import PreparedModule  # noqa: E402
from torchvision_shim import torchvision  # noqa: E402

BUDGET = "5%"
BOTH_BUDGETS = {"bops": "5%", "weight_memory": "50%"}
LAWS = ("1", "2", "3", "4", "5", "6", "MACs")
SHARE_WANTED = 0.95
# Where the second budget, the first batch and a backward pass are tried too.
_SMALL_PARAMETERS = 30_000_000
_SMALL_MACS = 2_000_000_000


@dataclass
class Outcome:
    """What the sweep found out about one model; `faults` by law, seconds of processor time."""

    name: str
    parameters: int = 0
    shape: tuple[int, ...] = ()
    prepare_seconds: float = 0.0
    total_seconds: float = 0.0
    macs: int = 0
    quantized: float = 0.0
    floor: float = 0.0
    first_batch: str = ""
    failed: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)

    @property
    def prepared(self) -> bool:
        """Whether `prepare` took the model."""
        return not self.failed

    @property
    def lawful(self) -> bool:
        """Whether laws 1 to 6 hold."""
        return self.prepared and not any(self.faults.get(law) for law in LAWS[:6])

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


def examine(name: str) -> Outcome:
    """Prepare one model and check it."""
    outcome = Outcome(name)
    started = time.process_time()
    try:
        model = build(name)
        outcome.parameters = sum(parameter.numel() for parameter in model.parameters())
        outcome.shape = smallest_input(name, model)
        one, two = random_input(outcome.shape, 1), random_input(outcome.shape, 2)
        _examine(outcome, model, one, two)
    except Exception as error:
        outcome.failed = f"{type(error).__name__}: {error}"
    outcome.total_seconds = time.process_time() - started
    return outcome


def _examine(outcome: Outcome, model: nn.Module, one: Tensor, two: Tensor) -> None:
    counted = count_float(model, (one,))
    model.train()
    before = Snapshot.of(model)
    started = time.process_time()
    prepared = prepare(model, BUDGET, example_inputs=(one,))
    outcome.prepare_seconds = time.process_time() - started
    small = outcome.parameters < _SMALL_PARAMETERS and counted.macs < _SMALL_MACS
    _describe(outcome, prepared, counted)
    outcome.add("1", before.faults(model))
    outcome.add("1", check_signature(model, prepared))
    outcome.add("2", check_state(model, prepared))
    outcome.add("4", check_coverage(prepared, one))
    outcome.add("5", check_totals(prepared, counted))
    outcome.add("6", check_ties(prepared))
    outcome.add("3", check_numbers(model, prepared, one, two, backward=small))
    del prepared
    gc.collect()
    if small:
        _check_both_budgets(outcome, model, counted, one)
        _check_first_batch(outcome, model, one, two)


def _describe(outcome: Outcome, prepared: PreparedModule, counted: FloatCount) -> None:
    accounting = prepared.plan.accounting
    outcome.macs = sum(entry.macs for entry in accounting.ledger)
    quantized = sum(entry.macs for entry in accounting.ledger if entry.status == "quantized")
    outcome.quantized = quantized / outcome.macs if outcome.macs else 1.0
    resource = accounting.resources["bops"]
    floor = resource.floor([site.allowed for site in accounting.sites])
    outcome.floor = float(floor / resource.reference)
    if outcome.macs != counted.macs:
        outcome.add("MACs", iter([f"{outcome.macs} counted, the flop counter has {counted.macs}"]))


def _check_both_budgets(
    outcome: Outcome, model: nn.Module, counted: FloatCount, one: Tensor
) -> None:
    try:
        prepared = prepare(model, BOTH_BUDGETS, example_inputs=(one,))
    except CgmqError as error:
        outcome.add("5", iter([f"with two budgets: {type(error).__name__}: {error}"]))
        return
    outcome.add("4", check_coverage(prepared, one))
    outcome.add("5", check_totals(prepared, counted))
    outcome.add("6", check_ties(prepared))


def _check_first_batch(outcome: Outcome, model: nn.Module, one: Tensor, two: Tensor) -> None:
    """Prepare without inputs: the first batch brings the shapes."""
    try:
        prepared = prepare(model, BUDGET)
        prepared.eval()(one)
    except (BudgetError, UnsupportedModelError):
        # A branch that shapes decide: it stops the trace, or a function with it stays in float.
        outcome.first_batch = "needs inputs"
        return
    outcome.first_batch = "yes"
    outcome.add("3", check_numbers(model, prepared, one, two, backward=False))
    macs = sum(entry.macs for entry in prepared.plan.accounting.ledger)
    if macs != outcome.macs:
        outcome.add("4", iter([f"priced on the first batch it has {macs} MACs"]))


# -- many models -----------------------------------------------------------------------------------


def sweep(names: Sequence[str], jobs: int) -> Iterator[Outcome]:
    """Examine each model in a process of its own, `jobs` at a time; yield as they end."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torchvision_sweep"])
    waiting = list(reversed(names))
    running: dict[int, tuple[str, BaseProcess, Connection]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_send, args=(name, sender))
            process.start()
            sender.close()
            running[id(receiver)] = name, process, receiver
        for ready in wait([receiver for _, _, receiver in running.values()]):
            name, process, receiver = running.pop(id(ready))
            yield _receive(name, receiver)
            process.join()


def _send(name: str, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sender.send(examine(name))
    sender.close()


def _receive(name: str, receiver: Connection) -> Outcome:
    try:
        outcome = receiver.recv()
    except EOFError:
        return Outcome(name, failed="the process ended without a result (killed?)")
    assert isinstance(outcome, Outcome)
    return outcome


# -- the table -------------------------------------------------------------------------------------

_HEAD = (
    "model", "parameters", "input", "prepare", "all", "MACs", "quantized", "floor", "first batch",
    *LAWS[:6], "MACs exact",
)  # fmt: skip


def row(outcome: Outcome) -> list[str]:
    """Return the cells of one model."""
    if not outcome.prepared:
        return [outcome.name, *["-"] * 8, *["FAIL"] * len(LAWS)]
    return [
        outcome.name,
        f"{outcome.parameters / 1e6:.1f} M",
        "x".join(map(str, outcome.shape)),
        f"{outcome.prepare_seconds:.1f} s",
        f"{outcome.total_seconds:.1f} s",
        f"{outcome.macs / 1e6:,.1f} M",
        f"{100 * outcome.quantized:.2f} %",
        f"{100 * outcome.floor:.3f} %",
        outcome.first_batch or "not tried",
        *("FAIL" if outcome.faults.get(law) else "pass" for law in LAWS),
    ]


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Return one line for each miss."""
    lines = []
    for outcome in outcomes:
        if outcome.failed:
            lines.append(f"- {outcome.name}: {outcome.failed}")
        for law, faults in outcome.faults.items():
            lines += [f"- {outcome.name}, {law}: {fault}" for fault in faults]
    return [line.replace("\n", " ")[:600] for line in lines]


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the line that says it all."""
    total = len(outcomes)
    counts = [sum(getattr(o, key) for o in outcomes) for key in ("prepared", "lawful", "exact")]
    return "prepared {}/{t}, laws 1 to 6 hold on {}/{t}, MACs exact on {}/{t}".format(
        *counts, t=total
    )


def document(outcomes: Sequence[Outcome]) -> str:
    """Return the result as a Markdown page."""
    head = "\n".join(f"| {' | '.join(cells)} |" for cells in (_HEAD, ["---"] * len(_HEAD)))
    body = "\n".join(f"| {' | '.join(row(outcome))} |" for outcome in outcomes)
    missed = "\n".join(reasons(outcomes)) or "None."
    return (
        f"# Torchvision sweep\n\nWritten by `benchmarks/torchvision_sweep.py`; torch "
        f"{torch.__version__}, torchvision {torchvision.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, one thread. Budget: {BUDGET} of bit "
        f"operations; where 'first batch' was tried, also {BOTH_BUDGETS}. 'input' is one sample; "
        f"'prepare' and 'all' (with every check) are processor seconds; "
        f"'quantized' is the share of MACs; 'floor' is the lowest reachable share of the 32-bit "
        f"cost; 'first batch' tells whether the model is prepared without example inputs too."
        f"\n\n**{summary(outcomes)}.**\n\n## Misses\n\n{missed}\n\n## Models\n\n"
        f"{head}\n{body}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; return 0 when enough models pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="*", help="globs over model names, with commas")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--output", type=Path, help="where to write the page, as Markdown")
    parser.add_argument("--json", type=Path, help="where to write the outcomes, as JSON")
    options = parser.parse_args(argv)
    globs = options.models.split(",")
    names = [name for name in model_names() if any(fnmatch.fnmatch(name, g) for g in globs)]
    if not names:
        parser.error(f"no model matches {options.models!r}")
    outcomes = []
    print(" | ".join(_HEAD), flush=True)
    for outcome in sweep(names, options.jobs):
        outcomes.append(outcome)
        print(f"[{len(outcomes)}/{len(names)}]", " | ".join(row(outcome)), flush=True)
        for line in reasons([outcome]):
            print("   ", line, flush=True)
    outcomes.sort(key=lambda outcome: names.index(outcome.name))
    print(summary(outcomes))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(document(outcomes))
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    enough = SHARE_WANTED * len(outcomes)
    passed = sum(outcome.lawful for outcome in outcomes)
    return (
        0 if passed >= enough and all(o.lawful and o.exact for o in outcomes if o.prepared) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
