"""How fast is a ``.pt2`` file that Inductor compiles, beside the float32 network, compiled alike?

For each network and batch the exported file, the float network and, where it takes the network,
what torchao's own quantizer for x86 makes of it are compiled with frozen weights, and timed in
turn, in one process, on one thread. Run it with

    python benchmarks/inductor_speed.py --output benchmarks/results/inductor_speed.md

Speeds are medians of the ratios of neighbouring runs. Weights are untrained: they change no time.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from cgmq_fx import export, lower, prepare
from cgmq_fx.load_exported import load_exported

sys.path[:0] = [str(Path(__file__).parents[1] / "examples")]

from torchvision_shim import torchvision  # noqa: E402

NETWORKS = ("resnet18", "mobilenet_v2")
#: How the calls of oneDNN's int8 convolutions and linear layers start in Inductor's code.
KERNELS = "torch.ops.onednn.q"


def exported(model: nn.Module, x: Tensor, bits: int, folder: Path) -> nn.Module:
    """Return the program of the file of a network at one bit-width."""
    prepared = prepare(model, "100%", example_inputs=(x,), widths=(bits,)).eval()
    with torch.no_grad():
        prepared(x)
        prepared.set_bit_widths([min(site.allowed) for site in prepared.plan.accounting.sites])
        prepared(x)
    fixed = lower(prepared, allow_untrained=True)
    return load_exported(export(fixed, folder / "model.pt2", example_inputs=(x,)))


def of_torchao(model: nn.Module, x: Tensor) -> nn.Module:
    """Return what torchao's quantizer for x86 makes of a network."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    observed: Any = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    observed(x)
    converted: nn.Module = convert_pt2e(observed)
    return converted


def compiled(module: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """Return a compiled module and the calls of int8 kernels in its code."""
    torch._dynamo.reset()
    run: Callable[[Tensor], Tensor] = torch.compile(module)
    _, code = run_and_get_code(run, x)
    return run, sum(text.count(KERNELS) for text in code)


def ratios(
    runs: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int
) -> dict[str, tuple[float, float]]:
    """Return for each the median time in ms, and how much faster than ``float32`` it is."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            times[name].append(1e3 * (time.perf_counter() - start))
    base = times["float32"]
    return {
        name: (
            statistics.median(own),
            statistics.median(b / o for b, o in zip(base, own, strict=True)),
        )
        for name, own in times.items()
    }


def measure(name: str, batch: int, rounds: int, folder: Path) -> list[str]:
    """Return the lines of one network and batch."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(batch, 3, 224, 224)
    made: dict[str, Callable[[], nn.Module]] = {
        "float32": lambda: model,
        ".pt2, 8 bits": lambda: exported(model, x, 8, folder),
        ".pt2, 4 bits": lambda: exported(model, x, 4, folder),
        "torchao X86InductorQuantizer": lambda: of_torchao(model, x),
    }
    runs, calls, lines = {}, {}, []
    for kind, make in made.items():
        try:
            runs[kind], calls[kind] = compiled(make(), x)
        except Exception as error:  # other people's code
            lines.append(f"| {name} | {batch} | {kind} | refused: {type(error).__name__} | | |")
    for kind, (milliseconds, ratio) in ratios(runs, x, rounds).items():
        row = f"{milliseconds:.1f} ms | {ratio:.2f} | {calls[kind]}"
        lines.append(f"| {name} | {batch} | {kind} | {row} |")
    return lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    config.freezing = True
    lines = [
        f"torch {torch.__version__}, one thread; times of float32 / times, medians of "
        f"{arguments.rounds} interleaved runs",
        "",
        "| network | batch | what | time | times float32 | int8 kernels |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in arguments.networks:
            for batch in arguments.batches:
                lines += measure(name, batch, arguments.rounds, Path(folder))
                print("\n".join(lines[-4:]), flush=True)
    if arguments.output:
        arguments.output.write_text("# Speed of .pt2 under Inductor\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
