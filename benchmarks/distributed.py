"""Do several processes find what one does?

A LeNet-5 is trained to a budget by one process, and by two and four under torchrun on the same
global batches, wrapped by DistributedDataParallel and sharded by fully_shard. At every step the
bit-widths and ranges of all ranks are gathered and must be equal; the accuracy of the lowered
modules on test data stands beside that of one process.

    python benchmarks/distributed.py --seeds 3 --output benchmarks/results/distributed.md
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cgmq_fx

BATCH = 96
RUNS = (("one", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4))
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def network(side: int) -> nn.Module:
    """Return a LeNet-5 for images of `side` pixels; half as wide for the small ones."""
    wide, padding = (32, 0) if side == 28 else (16, 2)
    pixels = (side + 2 * padding - 4) // 2
    pixels = (pixels + 2 * padding - 4) // 2
    return nn.Sequential(
        nn.Conv2d(1, wide, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(wide, 2 * wide, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * wide * pixels**2, 8 * wide), nn.ReLU(),
        nn.Linear(8 * wide, 10),
    )  # fmt: skip


def load(root: str | None) -> Data:
    """Return training images and labels, and those of the test."""
    if root is None:
        from sklearn.datasets import load_digits

        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(found.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, test = order[:1397], order[1397:]
        return images[train], labels[train], images[test], labels[test]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from torchvision_shim import torchvision

    parts: list[Tensor] = []
    for is_training in (True, False):
        data = torchvision.datasets.MNIST(root, train=is_training)
        parts += [(data.data[:, None].float() / 255 - 0.1307) / 0.3081, data.targets]
    return parts[0], parts[1], parts[2], parts[3]


def train(kind: str, chosen: argparse.Namespace, seed: int, data: Data) -> dict[str, Any]:
    """Train this rank's part and return what was found; the widths of all ranks are compared."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(seed)
    x, y, test_x, test_y = data
    model = network(x.shape[-1])
    prepared = cgmq_fx.prepare(model, chosen.budget, example_inputs=(x[:2],))
    wrapped: nn.Module = prepared
    if kind == "ddp":
        wrapped = DistributedDataParallel(prepared)
    elif kind == "fsdp":
        fully_shard(prepared)
    optimizer = torch.optim.Adam(wrapped.parameters(), 2e-3)
    steps = chosen.epochs * (len(y) // BATCH)
    cgmq_fx.attach(wrapped, optimizer, total_steps=steps)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    orders = torch.Generator().manual_seed(seed)
    differing, began = 0, time.monotonic()
    for _ in range(chosen.epochs):
        for batch in torch.randperm(len(y), generator=orders).split(BATCH):
            if len(batch) < BATCH:
                continue
            own = batch[rank::size]
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(wrapped(x[own]), y[own]))
            optimizer.step()
            scheduler.step()
            differing += not _is_same_everywhere(prepared, size)
    seconds = time.monotonic() - began
    fixed = cgmq_fx.lower(wrapped)
    right = (fixed(test_x).argmax(1) == test_y).float().mean()
    return {
        "accuracy": 100 * float(right),
        "steps": steps,
        "differing": differing,
        "seconds": seconds,
        "bits": fixed.bit_widths,
    }


def _is_same_everywhere(prepared: Any, size: int) -> bool:
    """Tell whether every rank has these bit-widths and ranges."""
    if size == 1:
        return True
    bits = torch.tensor(list(prepared.bit_widths.values()), dtype=torch.float32)
    ranges = [quantizer.base.flatten() for quantizer in prepared.quantizers.values()]
    own = torch.cat([bits, *ranges])
    everyone = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(everyone, own)
    return all(torch.equal(other, own) for other in everyone)


def worker(chosen: argparse.Namespace) -> None:
    """Run one kind for all seeds, as one process of a group or alone."""
    torch.set_num_threads(1)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    data = load(chosen.data_root)
    found = [train(chosen.worker, chosen, seed, data) for seed in range(chosen.seeds)]
    if int(os.environ.get("RANK", "0")) == 0:
        chosen.result.write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


def launch(kind: str, size: int, chosen: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Start the processes of one row and return what rank 0 found, by seed."""
    result = scratch / f"{kind}{size}.json"
    command = [sys.executable]
    if size > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += [__file__, "--worker", kind, "--result", str(result), "--budget", chosen.budget]
    command += ["--epochs", str(chosen.epochs), "--seeds", str(chosen.seeds)]
    if chosen.data_root:
        command += ["--data-root", chosen.data_root]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: list[dict[str, Any]] = json.loads(result.read_text())
    return found


def row_of(kind: str, size: int, found: list[dict[str, Any]]) -> str:
    """Return a line of the table."""
    scores = [run["accuracy"] for run in found]
    spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
    steps, differing = (sum(run[key] for run in found) for key in ("steps", "differing"))
    each = ", ".join(f"{score:.2f}" for score in scores)
    line = f"| {kind} | {size} | {statistics.mean(scores):.2f} | {spread:.2f} | {each} |"
    return f"{line} {differing} of {steps} |"


def document(rows: list[str], chosen: argparse.Namespace) -> str:
    """Return the page."""
    data = "MNIST" if chosen.data_root else "scikit-learn's digits"
    return (
        f"# Several processes against one\n\nLeNet-5 on {data}, budget {chosen.budget} of the "
        f"32-bit bit operations, {chosen.epochs} epochs of global batches of {BATCH}, seeds 0 to "
        f"{chosen.seeds - 1}, gloo on CPU, torch {torch.__version__}. Accuracy in percent of the "
        f"lowered module on test data; every one is within the budget, or `lower` would have "
        f"raised. The last column counts steps after which a rank had another bit-width or range "
        f"than the others.\n\n| training | processes | accuracy | spread | each seed | steps that "
        f"differ |\n| --- | --: | --: | --: | --- | --: |\n" + "\n".join(rows) + "\n"
    )


def main() -> int:
    """Run every row, or one process of one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", help="a folder with MNIST; without it, the digits")
    parser.add_argument("--budget", default="1%")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a page of the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        worker(chosen)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        found = {run: launch(*run, chosen, Path(scratch)) for run in RUNS}
    page = document([row_of(*run, results) for run, results in found.items()], chosen)
    print(page)
    if chosen.output:
        chosen.output.write_text(page)
    return int(any(result["differing"] for results in found.values() for result in results))


if __name__ == "__main__":
    sys.exit(main())
