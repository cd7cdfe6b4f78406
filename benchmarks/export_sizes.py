"""How large are exported files, beside the float32 network and what the budget counts?

Each network is lowered at 8 bits and at 2, 4 and 8 bits in turn, what additions and averages read
included, under a budget on the memory of its weights, and exported to every format. Run it with

    python benchmarks/export_sizes.py --output benchmarks/results/export_sizes.md

It ends with 1 where a packed file takes more than 3 % and 8 KiB above what the budget counts.
"""

import argparse
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.export import export
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

import pages  # noqa: E402
import speeds  # noqa: E402

from torchvision_shim import torchvision  # noqa: E402

SUFFIXES = (".safetensors", ".pt2", ".onnx", ".qonnx.onnx", ".pte")
CHOICES: Mapping[str, tuple[int, ...]] = {"8": (8,), "2, 4, 8": (2, 4, 8)}
#: What the packed file may take above the budget's count: a share of it, and a manifest.
MORE, MANIFEST = Fraction(3, 100), 8 * 1024


def lenet5() -> nn.Module:
    """Return LeNet-5 for images of 28 by 28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet5": (lenet5, (1, 28, 28)),
    "resnet18": (torchvision.models.resnet18, (3, 224, 224)),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, (3, 224, 224)),
}


def lowered(model: nn.Module, x: Tensor, widths: tuple[int, ...]) -> LoweredModule:
    """Return a network whose tensors have these bit-widths in turn; what arrives has 8."""
    bounds = {"bops": "100%", speeds.READS["name"]: "100%", "weight_memory": "100%"}
    tables = ["bops", speeds.READS]
    made = prepare(model, bounds, example_inputs=(x,), cost_table=tables, widths=widths).eval()
    turn = itertools.cycle(widths)
    bits = [next(turn) if s.learned else s.allowed[0] for s in made.plan.accounting.sites]
    with torch.no_grad():
        made(x)
        made.set_bit_widths(bits)
        made(x)
    return lower(made, allow_untrained=True)


def sizes(network: str, widths: tuple[int, ...], folder: Path) -> tuple[int, int, dict[str, int]]:
    """Return the bytes of the float32 tensors, what the budget counts, and the bytes of files.

    A format that refuses the network has no entry.
    """
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    model, x = make().eval(), torch.randn(2, *shape)
    plain = folder / "float32.safetensors"
    save_file(model.state_dict(), plain)
    fixed = lowered(model, x, widths)
    found = {}
    for suffix in SUFFIXES:
        try:
            path = export(fixed, folder / f"model{suffix}", example_inputs=(x,))
        except UnsupportedModelError:
            continue
        found[suffix] = path.stat().st_size
    counted = report(fixed).totals["weight_memory"]
    return plain.stat().st_size, int(counted), found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, large = [], []
    for network, (bits, widths) in itertools.product(arguments.networks, CHOICES.items()):
        with tempfile.TemporaryDirectory() as folder:
            plain, counted, found = sizes(network, widths, Path(folder))
        packed = found[".safetensors"]
        above = packed / counted - 1
        files = [_beside(found[s], plain) if s in found else "refused" for s in SUFFIXES]
        rows.append((network, bits, _size(plain), _beside(counted, plain), *files, f"{above:+.1%}"))
        print(*rows[-1], sep=" | ", flush=True)
        if packed > counted * (1 + MORE) + MANIFEST:
            large.append(f"{network} at {bits} bits")
    if arguments.output:
        columns = (
            *("network", "bits", "float32", "counted by the budget"),
            *(f"`{suffix}`" for suffix in SUFFIXES),
            "`.safetensors` above the count",
        )
        lines = [
            f"{pages.versions('torch', 'onnx', 'executorch')}. In brackets: times smaller than the "
            "float32 tensors in a `.safetensors` file. With several bit-widths tensors have them "
            "in turn. A packed file holds each weight at its own width, and may take "
            f"{float(MORE):.0%} and {MANIFEST // 1024} KiB above what `weight_memory` counts; "
            "other formats have types of 4, 8 and 16 bits, or of 8.",
            "",
            *pages.table(columns, rows),
        ]
        pages.write(arguments.output, "Sizes of files", "python benchmarks/export_sizes.py", lines)
    if large:
        sys.exit(f"more than {float(MORE):.0%} and {MANIFEST} bytes above: {', '.join(large)}")


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _beside(count: int, plain: int) -> str:
    return f"{_size(count)} ({plain / count:.1f})"


if __name__ == "__main__":
    main()
