"""Runs exported ``.pte`` files in ExecuTorch's runtime."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def run(path: Path, inputs: Sequence[Tensor | float]) -> list[Tensor]:
    """Return the outputs of a file, all of them; Python numbers are inputs too."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)  # a method does not keep it
    method = program.load_method("forward")
    assert method is not None
    given = [item.contiguous() if isinstance(item, Tensor) else item for item in inputs]
    return [output.clone() for output in method.execute(given)]
