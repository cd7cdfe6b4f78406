"""The default against other ways to a budget, at equal budget, epochs and data.

    python benchmarks/accuracy/rivals.py --data-root data --output build/rivals.md

All start from the same float network, and train it with the same optimizer on the same batches:

- uniform: one bit-width for all weights and one for all activations, the costliest within the
  budget
- `dir_1`, `dir_2`, `dir_3`: the directions of constraint-guided quantization
- solved first: `calibrate` and `solve`, then training at these bit-widths
- penalty: a factor times the cost, added to the loss (`penalty.py`); the best of some factors
- default: `attach` without a word

Rows are kept in a JSON-lines file, from which a run that was cut goes on; Ctrl-C ends it with the
page of those that are there. It ends with 1 where the default is worse than the best by more than
the spread of the seeds, or was not trained.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parent)]

from penalty import RATE, Penalty  # noqa: E402
from rivals_page import (  # noqa: E402
    BUDGETS,
    DEFAULT,
    PENALTY,
    SOLVED,
    UNIFORM,
    Row,
    is_best,
    page,
    wanted,
)
from tasks import (  # noqa: E402
    TASKS,
    Split,
    Task,
    accuracy,
    batches,
    calibration,
    float_model,
    small_cifar,
)

import cgmq_fx  # noqa: E402
from cgmq_fx.prepared import PreparedModule  # noqa: E402
from cgmq_fx.selectors import Operand  # noqa: E402

LENET, RESNET = TASKS[:2]
SMALL_RESNET = Task("ResNet-20 at 16x16", RESNET.build, small_cifar, 8, 3, RESNET.rate)
#: The tasks, and the training samples of each.
SIZES = {LENET: 3_000, SMALL_RESNET: 2_667}
EPOCHS = 3
WIDTHS = (2, 4, 8, 16)
LEARNING_RATE = 1e-3
#: The part of a run with a penalty that learns bit-widths.
LEARNED_PART = 0.5


@dataclass(frozen=True)
class Case:
    """The float network of a task and its samples."""

    name: str
    model: nn.Module
    train: Split
    test: Split

    @property
    def steps(self) -> int:
        """Steps of a training."""
        return EPOCHS * sum(1 for _ in batches(self.train, augmented=False))

    def prepared(self, budget: str, **options: Any) -> PreparedModule:
        """Return the float network, prepared."""
        inputs = (self.train[0][:1],)
        return cgmq_fx.prepare(self.model, budget, example_inputs=inputs, **options)


Way = Callable[[Case, str], PreparedModule]


def trained(
    case: Case,
    prepared: PreparedModule,
    *,
    guide: Mapping[str, str] | None = None,
    penalty: Penalty | None = None,
) -> PreparedModule:
    """Train at the bit-widths that are there, under a guide, or with a penalty."""
    ranges = [] if penalty is None else penalty.ranges()
    optimizer = torch.optim.Adam([*prepared.parameters(), *ranges], LEARNING_RATE)
    if penalty is not None:
        optimizer.add_param_group({"params": penalty.places(), "lr": RATE})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    if guide is not None:
        cgmq_fx.attach(prepared, optimizer, total_steps=case.steps, **guide)
    learned = round(LEARNED_PART * case.steps)
    prepared.train()
    data = itertools.chain.from_iterable(batches(case.train) for _ in range(EPOCHS))
    for step, (x, y) in enumerate(data):
        if penalty is not None and step == learned:
            penalty.settle()
        optimizer.zero_grad()
        loss = F.cross_entropy(prepared(x), y)
        if penalty is not None and step < learned:
            loss = loss + penalty.term()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return prepared


def uniform(case: Case, budget: str) -> PreparedModule:
    """Train at the costliest uniform bit-widths."""
    accounting = case.prepared(budget).plan.accounting
    fitting = []
    for weights, activations in itertools.product(WIDTHS, WIDTHS):
        own = {"weight": weights, "activation": activations}
        bits = [own.get(site.role, site.allowed[-1]) for site in accounting.sites]
        if accounting.is_satisfied(bits):
            fitting.append((accounting.totals(bits)["bops"], activations, weights))
    _, activations, weights = max(fitting)
    overrides = {
        _is_weight: {"bit_width": weights},
        _is_activation: {"bit_width": activations},
    }
    return trained(case, case.prepared(budget, overrides=overrides))


def _is_weight(operand: Operand) -> bool:
    return operand.role == "weight"


def _is_activation(operand: Operand) -> bool:
    return operand.role == "activation"


def solved_first(case: Case, budget: str) -> PreparedModule:
    """Find the bit-widths by an integer program, and train at these."""
    prepared = case.prepared(budget)
    samples = calibration(case.train)
    cgmq_fx.calibrate(prepared, samples)
    cgmq_fx.solve(prepared, samples, batches=4)
    return trained(case, prepared)


def guided(**guide: str) -> Way:
    """Return a way that trains under a guide."""
    return lambda case, budget: trained(case, case.prepared(budget), guide=guide)


WAYS: Mapping[str, Way] = {
    UNIFORM: uniform,
    "dir_1": guided(direction="dir_1"),
    "dir_2": guided(direction="dir_2"),
    "dir_3": guided(direction="dir_3"),
    SOLVED: solved_first,
    DEFAULT: guided(),
}


def run(case: Case, way: str, budget: str, factor: float, seed: int) -> Row:
    """Train once and look at the lowered network."""
    torch.manual_seed(seed)
    started = time.process_time()
    if way == PENALTY:
        prepared = case.prepared("100%")
        trained(case, prepared, penalty=Penalty(prepared, factor))
    else:
        prepared = WAYS[way](case, budget)
    fixed = cgmq_fx.lower(prepared, allow_untrained=True)
    report = cgmq_fx.report(fixed)
    assert report.satisfied
    (cost,) = report.resources
    share = float(100 * cost.total / cost.reference)
    seconds = time.process_time() - started
    return Row(case.name, way, budget, factor, seed, accuracy(fixed, case.test), share, seconds)


def load_case(task: Task, samples: int, root: str) -> Case:
    """Return the float network of a task and a part of its training samples, of all classes."""
    whole, test = task.data(root)
    model = float_model(task, whole, 0)
    step = round(len(whole[0]) / samples)
    return Case(task.name, model, (whole[0][::step], whole[1][::step]), test)


def _error(percent: float, test: Split) -> float:
    return (percent * (100 - percent) / len(test[1])) ** 0.5


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", type=Path, default=Path("build/rivals.jsonl"))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.rows.parent.mkdir(parents=True, exist_ok=True)
    kept = arguments.rows.read_text(encoding="utf-8") if arguments.rows.exists() else ""
    rows = {row.key: row for line in kept.splitlines() for row in [Row(**json.loads(line))]}
    cases = {task.name: load_case(task, n, arguments.data_root) for task, n in SIZES.items()}
    keys = list(wanted(list(cases), arguments.seeds))
    try:
        for key in keys:
            if key not in rows:
                name, *rest = key
                rows[key] = run(cases[name], *rest)
                print(rows[key], flush=True)
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(rows[key])) + "\n")
    except KeyboardInterrupt:
        print("interrupted; the page has what is there")
    exact = {name: accuracy(case.model, case.test) for name, case in cases.items()}
    seeds = " ".join(map(str, arguments.seeds))
    command = f"python benchmarks/accuracy/rivals.py --seeds {seeds}"
    sizes = f"{EPOCHS} epochs of {', '.join(f'{n} samples ({t.name})' for t, n in SIZES.items())}."
    errors = ", ".join(f"{_error(exact[n], case.test):.2f} ({n})" for n, case in cases.items())
    sizes += f" The standard error of one accuracy, by the number of test images, is {errors}."
    own = [rows[key] for key in keys if key in rows]
    text = page(own, exact, f"{command}`, torch `{torch.__version__}", sizes)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    sys.exit(not all(itertools.starmap(is_best, itertools.product([own], exact, BUDGETS))))


if __name__ == "__main__":
    main()
