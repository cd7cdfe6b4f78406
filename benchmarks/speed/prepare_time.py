"""How long `prepare` takes: in forward passes of the model, and for each node of large graphs.

    python benchmarks/speed/prepare_time.py --output benchmarks/results/prepare_time.md

It ends with 1 where a bound is broken: 4 forward passes for ResNet-18 and 14 for MobileNetV2 (one
image of 224 x 224), and a time per node that stays within 30 % of that of the smallest graph.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from networks import LARGE
from torch import Tensor, nn

import cgmq_fx

BUDGET = "2%"
FORWARDS = {"resnet18": 4.0, "mobilenet_v2": 14.0}
NODES = (100, 1_000, 5_000, 20_000)
FLATNESS = 1.3
_FEATURES = 8


class Residual(nn.Module):
    """A linear layer, a ReLU and a sum; five nodes of a prepared graph, with two quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(_FEATURES, _FEATURES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        return x + torch.relu(self.layer(x))


def chain(num_nodes: int) -> nn.Module:
    """Return a model whose prepared graph has about so many nodes."""
    return nn.Sequential(*(Residual() for _ in range(num_nodes // 6)))


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median of the processor time of a call, without that of the garbage before it."""
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def forwards(name: str, repeats: int) -> tuple[float, float]:
    """Return the seconds of a forward pass and of `prepare`, of one image of 224 x 224."""
    model, (images, _) = LARGE[name].model().eval(), LARGE[name].data()

    def prepare() -> None:
        cgmq_fx.prepare(model, BUDGET, example_inputs=(images,))

    with torch.no_grad():
        model(images)
        forward = seconds(lambda: model(images), 3 * repeats)
    prepare()
    return forward, seconds(prepare, repeats)


def per_node(num_nodes: int) -> tuple[int, float]:
    """Return the number of nodes of a prepared chain, and the seconds for each."""
    model, example = chain(num_nodes), (torch.zeros(1, _FEATURES),)
    found = len(cgmq_fx.prepare(model, BUDGET, example_inputs=example).graph.nodes)
    repeats = max(1, min(9, 20_000 // num_nodes))
    taken = seconds(lambda: cgmq_fx.prepare(model, BUDGET, example_inputs=example), repeats)
    return found, taken / found


def main() -> int:
    """Measure, print, write; return 1 where a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Time of `prepare`",
        "",
        f"One thread, processor time, medians; with costs. torch {torch.__version__}.",
        "",
        "| network | one forward pass | `prepare` | forward passes | at most |",
        "| --- | --: | --: | --: | --: |",
    ]
    faults = []
    for name, bound in FORWARDS.items():
        forward, prepare = forwards(name, arguments.repeats)
        lines.append(
            f"| {name} | {1000 * forward:.1f} ms | {1000 * prepare:.0f} ms | "
            f"{prepare / forward:.1f} | {bound:.0f} |"
        )
        if prepare > bound * forward:
            faults.append(f"{name}: {prepare / forward:.1f} forward passes, more than {bound:.0f}")
    lines += ["", "| nodes | for each node | beside the smallest graph |", "| --: | --: | --: |"]
    first = None
    for num_nodes in arguments.nodes:
        found, each = per_node(num_nodes)
        first = first or each
        lines.append(f"| {found:,} | {1e6 * each:.0f} us | {each / first:.2f} |")
        if each > FLATNESS * first:
            faults.append(f"{found:,} nodes: {each / first:.2f} times the time per node")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
