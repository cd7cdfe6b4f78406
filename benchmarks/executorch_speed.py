"""How fast is a ``.pte`` file in ExecuTorch, beside float32 and ExecuTorch's own quantizer?

For each network and batch four programs run in turn, in one process, on one thread, all with
XNNPACK: the float32 network, ours at 8 and at 4 bits, and what ExecuTorch's `XNNPACKQuantizer`
makes of the float network (symmetric, per channel). Run it with

    python benchmarks/executorch_speed.py --output benchmarks/results/executorch_speed.md
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cgmq_fx.export import export

sys.path[:0] = [str(Path(__file__).parent)]  # the modules beside this script

import speeds  # noqa: E402

THEIRS = "XNNPACKQuantizer, 8 bits"


def our_file(model: nn.Module, x: Tensor, bits: int, folder: Path) -> Path:
    """Write the file of a network at one bit-width."""
    fixed = speeds.fixed_at(model, x, bits)
    return export(fixed, folder / f"ours{bits}.pte", example_inputs=(x,))


def delegated(model: nn.Module, x: Tensor, path: Path) -> Path:
    """Write the program of a network with all that XNNPACK takes delegated to it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(model, (x,))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(bytes(edge.to_executorch().buffer))
    return path


def of_executorch(model: nn.Module, x: Tensor) -> nn.Module:
    """Return what ExecuTorch's quantizer for XNNPACK makes of a network."""
    import executorch.backends.xnnpack.quantizer.xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = xnnpack.XNNPACKQuantizer()
    quantizer.set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
    observed: Any = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    observed(x)
    converted: nn.Module = convert_pt2e(observed)
    return converted


def contender(path: Path, x: Tensor) -> speeds.Contender:
    """Return what runs a file, on one thread."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    assert method is not None
    inputs = [x.contiguous()]

    def run(held: object = program) -> object:  # a method does not keep its program
        return method.execute(inputs)

    return speeds.Contender(run, speeds.size_of(path))


def contenders(
    model: nn.Module, x: Tensor, folder: Path
) -> Mapping[str, Callable[[], speeds.Contender]]:
    """Return what makes each contender."""
    plain, theirs = folder / "float32.pte", folder / "theirs.pte"
    return {
        speeds.FLOAT: lambda: contender(delegated(model, x, plain), x),
        speeds.OURS_8: lambda: contender(our_file(model, x, 8, folder), x),
        speeds.OURS_4: lambda: contender(our_file(model, x, 4, folder), x),
        THEIRS: lambda: contender(delegated(of_executorch(model, x), x, theirs), x),
    }


QUESTION = speeds.Question(
    "Speed of .pte in ExecuTorch",
    "executorch_speed.py",
    ("executorch", "torch", "torchao"),
    "size",
    contenders,
    ((speeds.OURS_8, THEIRS),),
)


if __name__ == "__main__":
    speeds.answer(QUESTION)
