"""How fast is a ``.pt2`` file that Inductor compiles, beside the float32 network, compiled alike?

For each network and batch the exported file, the float network and, where it takes the network,
what torchao's own quantizer for x86 makes of it are compiled with frozen weights, and timed in
turn, in one process, on one thread. Run it with

    python benchmarks/inductor_speed.py --output benchmarks/results/inductor_speed.md
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from cgmq_fx.export import export
from cgmq_fx.load_exported import load_exported

sys.path[:0] = [str(Path(__file__).parent)]  # the modules beside this script

import speeds  # noqa: E402

THEIRS = "torchao X86InductorQuantizer"
#: How the calls of oneDNN's int8 convolutions and linear layers start in Inductor's code.
KERNELS = "torch.ops.onednn.q"


def exported(model: nn.Module, x: Tensor, bits: int, folder: Path) -> nn.Module:
    """Return the program of the file of a network at one bit-width."""
    fixed = speeds.fixed_at(model, x, bits)
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


def compiled(module: nn.Module, x: Tensor) -> speeds.Contender:
    """Return what runs a module that is compiled, with the calls of int8 kernels in its code."""
    torch._dynamo.reset()
    run: Callable[[Tensor], Tensor] = torch.compile(module)
    _, code = run_and_get_code(run, x)
    return speeds.Contender(lambda: run(x), str(sum(text.count(KERNELS) for text in code)))


def contenders(
    model: nn.Module, x: Tensor, folder: Path
) -> Mapping[str, Callable[[], speeds.Contender]]:
    """Return what makes each contender; a reset of dynamo compiles those before it once more."""
    config.freezing = True
    return {
        speeds.FLOAT: lambda: compiled(model, x),
        speeds.OURS_8: lambda: compiled(exported(model, x, 8, folder), x),
        speeds.OURS_4: lambda: compiled(exported(model, x, 4, folder), x),
        THEIRS: lambda: compiled(of_torchao(model, x), x),
    }


QUESTION = speeds.Question(
    "Speed of .pt2 under Inductor",
    "inductor_speed.py",
    ("torch", "torchao"),
    "int8 kernels",
    contenders,
    ((speeds.OURS_8, THEIRS),),
)


if __name__ == "__main__":
    speeds.answer(QUESTION)
