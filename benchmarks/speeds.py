"""What the pages of runtimes' speed share: the networks, runs that take turns, and the page.

Times are those of the processor in one thread, which other programs lengthen less than wall time.
Weights are untrained, which changes no time, but for batch norms: see `settle`.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.prepare import prepare

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import pages  # noqa: E402

from torchvision_shim import torchvision  # noqa: E402

NETWORKS = ("resnet18", "mobilenet_v2")
FLOAT, OURS_8, OURS_4 = "float32", "ours, 8 bits", "ours, 4 bits"
#: Charges for what additions and averages read, so that it is quantized too, as the runtimes' own
#: quantizers do.
READS: dict[str, Any] = {
    "schema": 1,
    "name": "reads",
    "unit": "bit",
    "source": "the bits that additions and averages read",
    "unpriced": "zero",
    "row": [
        {"op": "add", "per": "output_element", "cost": {"formula": "lhs_bits + rhs_bits"}},
        {
            "op": ["avg_pool", "reduce"],
            "per": "input_element",
            "cost": {"formula": "activation_bits"},
        },
    ],
}
_WARM_UP = 2

Run = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One of the things that take turns.

    Attributes:
        run: runs it once.
        note: what the page says of it besides its time, such as its size.
    """

    run: Run
    note: str


@dataclass(frozen=True)
class Question:
    """What a script asks.

    Attributes:
        title: of the page.
        script: name of the script.
        packages: whose versions the page has.
        note: what the notes of contenders are.
        contenders: from a float network, an input and a folder, what makes each contender by name;
            the first is `FLOAT`. Whatever one raises, the page says that it refused.
        rivals: pairs of contenders whose times are compared at the end.
        tolerance: the first of a pair may take this many times the time of the second; None: any.
    """

    title: str
    script: str
    packages: tuple[str, ...]
    note: str
    contenders: Callable[[nn.Module, Tensor, Path], Mapping[str, Callable[[], Contender]]]
    rivals: tuple[tuple[str, str], ...] = ()
    tolerance: float | None = None


def fixed_at(model: nn.Module, x: Tensor, bits: int) -> LoweredModule:
    """Return a network lowered at one bit-width, its additions and averages too."""
    budget = {"bops": "100%", READS["name"]: "100%"}
    tables = ["bops", READS]
    made = prepare(model, budget, example_inputs=(x,), cost_table=tables, widths=(bits,)).eval()
    with torch.no_grad():
        made(x)
        made.set_bit_widths([min(site.allowed) for site in made.plan.accounting.sites])
        made(x)
    return lower(made, allow_untrained=True)


def timed(
    runs: Mapping[str, Run], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Return the times in ms of runs that take turns, the first of them not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-_WARM_UP, rounds):
        for name, run in runs.items():
            start = clock()
            run()
            if number >= 0:
                times[name].append(1e3 * (clock() - start))
    return times


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a model in evaluation mode whose batch norms are not those of an untrained one.

    Those shift by nothing: an exporter then leaves biases out that a trained network has.
    """
    norms = [item for item in model.modules() if isinstance(item, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.bias.normal_(0, 0.1)
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Return the median of the ratios of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def answer(question: Question, arguments: Sequence[str] | None = None) -> None:
    """Run the command line of a script: time all contenders, print the page and write it.

    Raises:
        SystemExit: a contender takes longer than its rival by more than the tolerance.
    """
    parser = argparse.ArgumentParser(prog=question.script, description=question.title)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[tuple[object, ...]] = []
    beside: dict[str, float] = {}
    for network in given.networks:
        for batch in given.batches:
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                found, shares = _measured(question, network, batch, given.rounds, Path(folder))
            rows += found
            beside |= shares
            for row in found:
                print(*row, sep=" | ", flush=True)
            print(*(f"{pair}: {share:.3f}" for pair, share in shares.items()), sep="\n", flush=True)
    columns = ("network", "batch", "what", "time", "times as fast as float32", question.note)
    lines = [
        f"{pages.versions(*question.packages)}; one thread, processor time, medians of "
        f"{given.rounds} rounds in which all take turns; speeds are medians of the ratios of "
        "neighbours. Weights are drawn at random, statistics of batch norms those of the input.",
        "",
        *pages.table(columns, rows),
    ]
    if beside:
        listed = [f"- {pair}: {share:.3f}" for pair, share in beside.items()]
        lines += ["", "Times, one over the other:", "", *listed]
    if given.output:
        pages.write(given.output, question.title, f"python benchmarks/{question.script}", lines)
    slow = [pair for pair, share in beside.items() if share > (question.tolerance or float("inf"))]
    if slow:
        sys.exit(f"more than {question.tolerance} times the time: {'; '.join(slow)}")


def _measured(
    question: Question, network: str, batch: int, rounds: int, folder: Path
) -> tuple[list[tuple[object, ...]], dict[str, float]]:
    """Return the rows of one network and batch, and the times of rivals over one another."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 224, 224)
    model = settle(getattr(torchvision.models, network)(weights=None), x)
    rows: list[tuple[object, ...]] = []
    made: dict[str, Contender] = {}
    for name, make in question.contenders(model, x, folder).items():
        try:
            made[name] = make()
        except Exception as error:  # other people's code
            rows.append((network, batch, name, f"refused: {type(error).__name__}", "", ""))
    times = timed({name: item.run for name, item in made.items()}, rounds)
    rows += [
        (
            *(network, batch, name, f"{statistics.median(times[name]):.1f} ms"),
            *(f"{ratio(times, FLOAT, name):.2f}", item.note),
        )
        for name, item in made.items()
    ]
    shares = {
        f"{network}, batch {batch}, {over} over {under}": ratio(times, over, under)
        for over, under in question.rivals
        if over in times and under in times
    }
    return rows, shares


def size_of(path: Path) -> str:
    """Return the size of a file as a page has it."""
    return f"{path.stat().st_size / 2**20:.1f} MiB"
