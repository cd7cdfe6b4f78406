"""The default against other ways to a budget, at equal budget, epochs and data.

    python benchmarks/accuracy/rivals.py --data-root data --output build/rivals.md

All start from the same float network, and train it with the same optimizer on the same batches:

- uniform: one bit-width for all weights and one for all activations, the costliest within the
  budget
- `dir_1`, `dir_2`, `dir_3`: the directions of constraint-guided quantization
- solved first: `calibrate` and `solve`, then training at these bit-widths
- penalty: a factor times the cost, added to the loss (`penalty.py`). Of some factors the one that
  is best on the test images, and within the budget, is taken.
- default: `attach` without a word

Rows are kept in a JSON-lines file, from which a run that was cut goes on. It ends with 1 where a
budget is not met, or the default is worse than the best by more than the spread of the seeds.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parent)]

from penalty import RATE, Penalty  # noqa: E402
from tasks import TASKS, Split, Task, accuracy, batches, calibration, float_model  # noqa: E402

import cgmq_fx  # noqa: E402
from cgmq_fx.prepared import PreparedModule  # noqa: E402
from cgmq_fx.selectors import Operand  # noqa: E402

NAMES = ("LeNet-5", "ResNet-20")
BUDGETS = ("2%", "1%", "0.6%")
FACTORS = (0.03, 0.1, 0.3, 1.0)
WIDTHS = (2, 4, 8, 16)
#: The part of a run with a penalty that learns bit-widths.
LEARNED_PART = 0.5
#: Samples of each set, and epochs, by task.
SIZES = {"LeNet-5": (6_000, 3), "ResNet-20": (2_667, 4)}
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        task: whose network and data.
        way: which of `WAYS`, or "float".
        budget: as given; "" for a penalty, which has none.
        factor: of the penalty; 0 without.
        seed: of the order of the batches.
        accuracy: on the test images, in percent.
        share: bit operations, in percent of those in float.
        seconds: of processor time.
    """

    task: str
    way: str
    budget: str
    factor: float
    seed: int
    accuracy: float
    share: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What tells it from others."""
        return self.task, self.way, self.budget, self.factor, self.seed


@dataclass(frozen=True)
class Case:
    """A task with its samples, its float network, and the length of the training."""

    task: Task
    model: nn.Module
    train: Split
    test: Split
    epochs: int

    @property
    def steps(self) -> int:
        """Steps of a training."""
        return self.epochs * sum(1 for _ in batches(self.train, augmented=False))

    def prepared(self, budget: str, **options: object) -> PreparedModule:
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
    """Train at the bit-widths that are there, under a guide or with a penalty."""
    rest = [] if penalty is None else penalty.ranges()
    optimizer = torch.optim.Adam([*prepared.parameters(), *rest], LEARNING_RATE)
    if penalty is not None:
        optimizer.add_param_group({"params": penalty.places(), "lr": RATE})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    if guide is not None:
        cgmq_fx.attach(prepared, optimizer, total_steps=case.steps, **guide)
    learned = round(LEARNED_PART * case.steps)
    step = 0
    prepared.train()
    for _ in range(case.epochs):
        for x, y in batches(case.train):
            if penalty is not None and step == learned:
                penalty.settle()
            optimizer.zero_grad()
            loss = F.cross_entropy(prepared(x), y)
            if penalty is not None and step < learned:
                loss = loss + penalty.term()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
    return prepared


def costliest(case: Case, budget: str) -> dict[Callable[[Operand], bool], dict[str, int]]:
    """Return the bit-width of all weights and that of all activations that cost most within it."""
    accounting = case.prepared(budget).plan.accounting
    fitting = []
    for weights, activations in itertools.product(WIDTHS, WIDTHS):
        wanted = {"weight": weights, "activation": activations}
        bits = [wanted.get(site.role, site.allowed[-1]) for site in accounting.sites]
        if accounting.is_satisfied(bits):
            fitting.append((accounting.totals(bits)["bops"], activations, weights))
    _, activations, weights = max(fitting)
    return {
        _is_weight: {"bit_width": weights},
        _is_activation: {"bit_width": activations},
    }


def _is_weight(operand: Operand) -> bool:
    return operand.role == "weight"


def _is_activation(operand: Operand) -> bool:
    return operand.role == "activation"


def uniform(case: Case, budget: str) -> PreparedModule:
    """Train at the costliest uniform bit-widths."""
    return trained(case, case.prepared(budget, overrides=costliest(case, budget)))


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
    "uniform": uniform,
    "dir_1": guided(direction="dir_1"),
    "dir_2": guided(direction="dir_2"),
    "dir_3": guided(direction="dir_3"),
    "solved first": solved_first,
    "default": guided(),
}
PENALTY = "penalty"
COLUMNS = (*[*WAYS][:-1], PENALTY, "default")


def run(case: Case, way: str, budget: str, factor: float, seed: int) -> Row:
    """Train once and look at the lowered network."""
    torch.manual_seed(seed)
    started = time.process_time()
    if way == PENALTY:
        prepared = case.prepared("100%", widths=WIDTHS)
        prepared = trained(case, prepared, penalty=Penalty(prepared, factor))
        fixed = cgmq_fx.lower(prepared, allow_untrained=True)
    else:
        fixed = cgmq_fx.lower(WAYS[way](case, budget), allow_untrained=way == "uniform")
    report = cgmq_fx.report(fixed)
    assert report.satisfied
    (cost,) = report.resources
    share = float(100 * cost.total / cost.reference)
    found = accuracy(fixed, case.test)
    return Row(case.task.name, way, budget, factor, seed, found, share, _since(started))


def _since(started: float) -> float:
    return time.process_time() - started


def wanted(seeds: list[int]) -> Iterator[tuple[str, str, str, float, int]]:
    """Yield the keys of all rows: task, way, budget, factor and seed."""
    for seed, name in itertools.product(seeds, NAMES):
        for way, budget in itertools.product(WAYS, BUDGETS):
            yield name, way, budget, 0.0, seed
        for factor in FACTORS:
            yield name, PENALTY, "", factor, seed


def load_case(name: str, root: str) -> Case:
    """Return the samples and the float network of a task."""
    (task,) = (task for task in TASKS if task.name == name)
    whole, test = task.data(root)
    count, epochs = SIZES[name]
    model = float_model(task, whole, 0)
    step = len(whole[0]) // count
    return Case(task, model, (whole[0][::step], whole[1][::step]), test, epochs)


# -- the page ------------------------------------------------------------------------------------


def best_penalty(rows: list[Row], name: str, budget: str, seed: int) -> Row | None:
    """Return the most accurate row of a penalty within a budget."""
    limit = float(budget.rstrip("%"))
    own = [r for r in rows if (r.task, r.way, r.seed) == (name, PENALTY, seed)]
    return max((r for r in own if r.share <= limit), key=lambda r: r.accuracy, default=None)


def found(rows: list[Row], name: str, budget: str, way: str) -> list[float]:
    """Return the accuracies of a way under a budget, one for each seed that has one."""
    if way == PENALTY:
        seeds = sorted({r.seed for r in rows})
        picked = [best_penalty(rows, name, budget, seed) for seed in seeds]
        return [r.accuracy for r in picked if r is not None]
    return [r.accuracy for r in rows if (r.task, r.way, r.budget) == (name, way, budget)]


def spread(values: list[float]) -> float:
    """Return the distance from the least to the greatest."""
    return max(values) - min(values)


def is_best(rows: list[Row], name: str, budget: str) -> bool:
    """Tell whether the default's mean is the best, or below it by no more than the spread.

    That is the larger one of its own and the best rival's.
    """
    own = found(rows, name, budget, "default")
    for way in COLUMNS[:-1]:
        rival = found(rows, name, budget, way)
        if rival and statistics.mean(rival) > statistics.mean(own) + max(
            spread(own), spread(rival)
        ):
            return False
    return True


def cell(values: list[float]) -> str:
    """Return mean and spread as text."""
    if not values:
        return "none met it"
    return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def page(rows: list[Row], seeds: list[int]) -> str:
    """Return the page that says what was found."""
    lines = [
        "# The default and its rivals",
        "",
        f"`python benchmarks/accuracy/rivals.py --seeds {' '.join(map(str, seeds))}`, torch "
        f"{torch.__version__}, one thread. Test accuracy in percent: mean, least and greatest of "
        f"{len(seeds)} seeds (the order of the batches; the float network is the same). "
        + "; ".join(f"{name}: {n} samples, {e} epochs" for name, (n, e) in SIZES.items())
        + f". Penalty: the best of {len(FACTORS)} factors on the test images, so {len(FACTORS)} "
        "runs where every other way takes one.",
        "",
        f"| network | budget | {' | '.join(COLUMNS)} | the default is best or within the spread |",
        "| --- | --- |" + " --- |" * (len(COLUMNS) + 1),
    ]
    for name, budget in itertools.product(NAMES, BUDGETS):
        if not found(rows, name, budget, "default"):
            continue
        cells = [cell(found(rows, name, budget, way)) for way in COLUMNS]
        verdict = "yes" if is_best(rows, name, budget) else "no"
        lines.append(f"| {name} | {budget} | {' | '.join(cells)} | {verdict} |")
    lines += [
        "",
        "Each factor of the penalty: bit operations in percent of float, and accuracy.",
        "",
    ]
    lines += ["| network | seed | " + " | ".join(map(str, FACTORS)) + " |"]
    lines += ["| --- | --- |" + " --- |" * len(FACTORS)]
    for name, seed in itertools.product(NAMES, seeds):
        own = {r.factor: r for r in rows if (r.task, r.way, r.seed) == (name, PENALTY, seed)}
        if len(own) == len(FACTORS):
            cells = [f"{own[f].share:.3f}, {own[f].accuracy:.2f}" for f in FACTORS]
            lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")
    seconds = sum(r.seconds for r in rows)
    return "\n".join(
        [*lines, "", f"{len(rows)} trainings, {seconds / 60:.0f} minutes of processor time.", ""]
    )


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
    text = arguments.rows.read_text() if arguments.rows.exists() else ""
    rows = [Row(**json.loads(line)) for line in text.splitlines()]
    done = {row.key for row in rows}
    cases = {name: load_case(name, arguments.data_root) for name in NAMES}
    for key in wanted(arguments.seeds):
        if key not in done:
            name, way, budget, factor, seed = key
            rows.append(run(cases[name], way, budget, factor, seed))
            print(rows[-1], flush=True)
            with arguments.rows.open("a") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
    text = page(rows, arguments.seeds)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    sys.exit(not all(is_best(rows, *pair) for pair in itertools.product(NAMES, BUDGETS)))


if __name__ == "__main__":
    main()
