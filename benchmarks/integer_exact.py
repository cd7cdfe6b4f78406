"""Are sums of products of codes exact in float kernels? Against int64, on many networks.

Each case lowers a network at drawn bit-widths, one for every weight, activation and input, and runs
it once: every convolution, linear layer, matrix product, product of attention and of a recurrent
layer is computed on its codes in int64, in float32 or float64 as `integer_reference` chooses, and
as the module itself does. Sums are compared bit for bit; what the module computes is held to its
documented bound. Run it with

    python benchmarks/integer_exact.py --examples 500 --output benchmarks/results/integer_exact.md

It ends with 1 if any sum differs or any law is broken.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE.parent / "tests" / "support")]

from cgmq_fx.errors import UnsupportedModelError  # noqa: E402
from cgmq_fx.lower import lower  # noqa: E402
from cgmq_fx.prepare import prepare  # noqa: E402
from cgmq_fx.prepared import PreparedModule  # noqa: E402
from cgmq_fx.testing import Case, bit_width_assignments, models  # noqa: E402
from cgmq_fx.testing.check_prepare import positional_inputs  # noqa: E402
from cgmq_fx.testing.integer_laws import ProductComparison, integer_faults  # noqa: E402
from memory_models import ResNet20, lenet5  # noqa: E402
from torchvision_shim import torchvision  # noqa: E402

WIDTHS = tuple(range(1, 17))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LeNet-5": (lenet5, (2, 1, 28, 28)),
    "ResNet-20": (ResNet20, (2, 3, 32, 32)),
    "MobileNetV2": (lambda: torchvision.models.mobilenet_v2(), (1, 3, 224, 224)),
    "ViT-B/16": (lambda: torchvision.models.vit_b_16(), (1, 3, 224, 224)),
}


@dataclass
class Tally:
    """What some cases came to; the counts of `ProductComparison`, added up."""

    cases: int = 0
    operations: int = 0
    compared: int = 0
    mismatches: int = 0
    largest_bound: int = 0
    kernels_used: Counter[torch.dtype] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, run: ProductComparison, faults: list[str]) -> None:
        """Add one run."""
        self.cases += 1
        self.operations += run.kernels_used.total()
        self.compared += run.compared
        self.mismatches += run.mismatches
        self.largest_bound = max(self.largest_bound, run.largest_bound)
        self.kernels_used += run.kernels_used
        self.faults += faults

    def row(self, name: str) -> str:
        """Return a row of the page."""
        used = (self.kernels_used[kind] for kind in (torch.float32, torch.float64))
        numbers = (self.cases, self.operations, *used, self.compared)
        cells = " | ".join(f"{number:,}" for number in numbers)
        bits = self.largest_bound.bit_length()
        return f"| {name} | {cells} | {bits} | {self.mismatches:,} | {len(self.faults):,} |"


def compare(
    prepared: PreparedModule, inputs: tuple[Any, ...], bits: list[int], tally: Tally
) -> None:
    """Lower a calibrated model at some bit-widths and compare its products."""
    prepared.set_bit_widths(bits)
    with torch.no_grad():
        prepared(*inputs)
    fixed = lower(prepared, allow_untrained=True)
    run = ProductComparison(fixed)
    tally.add(run, list(integer_faults(fixed, inputs, run)))


def prepared_at_any_width(
    model: nn.Module, inputs: tuple[Any, ...], **options: Any
) -> PreparedModule:
    """Return a calibrated model whose tensors may have any width, inputs too."""
    prepared = prepare(
        model, "100%", example_inputs=inputs, widths=WIDTHS, learn_input_bits=True, **options
    ).eval()
    with torch.no_grad():
        prepared(*inputs)
    return prepared


def generated(examples: int, number: int) -> Tally:
    """Compare so many models that are drawn, at drawn bit-widths; refused ones do not count."""
    tally = Tally()
    while tally.cases < examples:
        draw_models(examples - tally.cases, number, tally)
        number += 1
    return tally


def draw_models(count: int, number: int, tally: Tally) -> None:
    """Compare at most so many models, those that a seed gives."""

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(models(), st.data())
    def every(drawn: Case, data: st.DataObject) -> None:
        check(drawn, data, tally)

    every()


def check(drawn: Case, data: st.DataObject, tally: Tally) -> None:
    """Compare one drawn model at drawn bit-widths."""
    model = drawn.model()
    inputs = positional_inputs(model, *drawn.inputs(), **drawn.kwargs())
    options = {"per_channel": data.draw(st.booleans()), "batch_axis": drawn.batch_axis}
    try:
        prepared = prepared_at_any_width(model, inputs, **options)
    except UnsupportedModelError:
        return
    bits = data.draw(bit_width_assignments(prepared))
    compare(prepared, inputs, list(bits.values()), tally)


def network(name: str, assignments: int, number: int) -> Tally:
    """Compare one network at random bit-widths, and at the widest."""
    make, shape = NETWORKS[name]
    torch.manual_seed(number)
    draw, tally = random.Random(number), Tally()
    model, inputs = make(), (torch.randn(shape),)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight)  # of both signs
            nn.init.uniform_(module.running_var, 0.5, 2)
    prepared = prepared_at_any_width(model, inputs)
    sites = prepared.plan.accounting.sites
    choices = [[max(WIDTHS)] * len(sites)]
    choices += [[draw.choice(WIDTHS) for _ in sites] for _ in range(assignments - 1)]
    for bits in choices:
        compare(prepared, inputs, bits, tally)
    return tally


_COLUMNS = (
    *("networks", "cases", "products", "in float32", "in float64", "sums compared"),
    *("bits of the largest bound", "mismatches", "laws broken"),
)


def page(tallies: dict[str, Tally], arguments: argparse.Namespace, seconds: float) -> str:
    """Return the page of results."""
    command = f"--examples {arguments.examples} --seed {arguments.seed}"
    lines = [
        "# Sums of products of codes: float kernels against int64",
        "",
        f"`python benchmarks/integer_exact.py {command}`, torch {torch.__version__}, bit-widths "
        f"{min(WIDTHS)} to {max(WIDTHS)}, {seconds:.0f} s.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{' --- |' * len(_COLUMNS)}",
        *(tally.row(name) for name, tally in tallies.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=500, help="generated networks")
    parser.add_argument("--assignments", type=int, default=4, help="of each real network")
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where to write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    tallies = {"generated": generated(arguments.examples, arguments.seed)} | {
        name: network(name, arguments.assignments, arguments.seed) for name in arguments.networks
    }
    text = page(tallies, arguments, time.monotonic() - start)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)
    faults = [text for tally in tallies.values() for text in tally.faults]
    print("\n".join(faults[:20]))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
