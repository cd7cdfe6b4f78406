"""Does a run that is killed again and again end as one that is not?

A small network with dropout and a shuffling loader is trained by `fit` with a checkpoint, in a
process of its own. That process gets SIGKILL at random moments, in the middle of steps and of
writes, and is started again, until so many kills have hit it; then it runs to its end. Bit-widths,
weights, history and the output of the lowered module must equal, bit for bit, those of
a run that nobody killed.

    python benchmarks/kill_and_resume.py --kills 20 --output benchmarks/results/kill_and_resume.md
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cgmq_fx

SAMPLES, BATCH = 96, 16
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 2e-2, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
}


def train(folder: Path, kind: str, every: int, epochs: int) -> None:
    """Train from where the checkpoint in `folder` is, and write the result beside it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 36, 24),
        nn.ReLU(),
        nn.Linear(24, 3),
    )
    x = torch.randn(SAMPLES, 1, 8, 8)
    data = TensorDataset(x, x.flatten(1)[:, :3].argmax(1))
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(1))
    prepared = cgmq_fx.prepare(model, "3%")
    print("ready", flush=True)
    result = cgmq_fx.fit(
        prepared,
        loader,
        F.cross_entropy,
        epochs=epochs,
        optimizer=OPTIMIZERS[kind](prepared.parameters()),
        val_loader=[data[:32]],
        progress=False,
        checkpoint=folder / "run.ckpt",
        every=every,
    )
    found = {
        "bits": prepared.bit_widths,
        "state": dict(prepared.state_dict()),
        "history": repr(result.history),
        "best": result.best_epoch,
        "output": result.fixed(x),
    }
    torch.save(found, folder / "result.pt")


def start(folder: Path, kind: str, options: list[str]) -> subprocess.Popen[str]:
    """Start a process that trains, and return when it is about to."""
    command = [sys.executable, __file__, "--train", str(folder), "--optimizer", kind, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if line != "ready\n":
        raise SystemExit(f"the training process said {line!r} and ended with {process.wait()}")
    return process


def finish(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """Wait for a run's end and return what it found."""
    if code := process.wait():
        raise SystemExit(f"the training process ended with {code}")
    found: dict[str, Any] = torch.load(folder / "result.pt", weights_only=True)
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return what two results do not have in common, bit for bit."""
    found = [key for key in ("bits", "history", "best") if first[key] != second[key]]
    tensors = [{**result["state"], "output": result["output"]} for result in (first, second)]
    names = dict.fromkeys((*tensors[0], *tensors[1]))
    both = [name for name in names if name in tensors[0] and name in tensors[1]]
    found += [name for name in names if name not in both]
    return found + [name for name in both if not torch.equal(tensors[0][name], tensors[1][name])]


def compare(
    kind: str, kills: int, options: list[str], seed: int, scratch: Path
) -> tuple[list[str], str]:
    """Kill a run so many times; return in what it differs from an unharmed one, and a row."""
    rng = random.Random(seed)
    whole, killed = scratch / f"{kind}-whole", scratch / f"{kind}-killed"
    whole.mkdir()
    killed.mkdir()
    process = start(whole, kind, options)
    began = time.monotonic()
    expected = finish(process, whole)
    seconds = time.monotonic() - began
    hits, faults = 0, []
    while hits < kills:
        process = start(killed, kind, options)
        time.sleep(rng.uniform(0, 1.5 * seconds / kills))
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            hits += 1
            continue
        # The run was over before the kill: it counts as a result, and another one begins.
        faults += differences(expected, finish(process, killed))
        (killed / "run.ckpt").unlink()
    faults += differences(expected, finish(start(killed, kind, options), killed))
    leftovers = sorted(path.name for path in killed.iterdir())
    if leftovers != ["result.pt", "run.ckpt"]:
        faults.append(f"left behind: {leftovers}")
    verdict = "the same, bit for bit" if not faults else f"DIFFERS: {', '.join(faults[:5])}"
    print(
        f"{kind}: run of {seconds:.1f} s, {hits} kills, {' '.join(options)}: {verdict}", flush=True
    )
    row = f"| {kind} | {seconds:.1f} | {hits} | {' '.join(options)} | {verdict} |"
    return faults, row


def document(rows: list[str], seed: int) -> str:
    """Return the page of a comparison."""
    head = (
        "| optimizer | run alone, s | kills | options | result |\n| --- | --: | --: | --- | --- |"
    )
    return (
        f"# Killed and resumed\n\nA guided run gets SIGKILL at random moments (seed {seed}) and is "
        f"started again; then bit-widths, weights, history and the lowered module's output are "
        f"compared with those of a run that nobody killed. torch {torch.__version__}.\n\n"
        f"{head}\n" + "\n".join(rows) + "\n"
    )


def main() -> int:
    """Run the comparison, or one training process of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="for each optimizer")
    parser.add_argument("--every", type=int, default=2, help="steps between two writes")
    parser.add_argument("--epochs", type=int, default=30, help="of six steps")
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), help="one instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="a page of the results")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    kinds = [chosen.optimizer] if chosen.optimizer else sorted(OPTIMIZERS)
    if chosen.train:
        train(chosen.train, kinds[0], chosen.every, chosen.epochs)
        return 0
    options = ["--every", str(chosen.every), "--epochs", str(chosen.epochs)]
    with tempfile.TemporaryDirectory() as scratch:
        compared = [
            compare(kind, chosen.kills, options, chosen.seed, Path(scratch)) for kind in kinds
        ]
    if chosen.output:
        chosen.output.write_text(document([row for _, row in compared], chosen.seed))
    return 1 if any(faults for faults, _ in compared) else 0


if __name__ == "__main__":
    sys.exit(main())
