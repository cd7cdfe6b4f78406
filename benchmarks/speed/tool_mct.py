"""Sony's model-compression-toolkit: fixed 8 bits, straight-through, batch norm folded.

Environment: ``pip install torch==2.13.0 torchvision==0.28.0 model-compression-toolkit==2.6.1``.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from networks import Workload
from torch import Tensor
from training import Step, optimizer_of, step_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from torchvision_shim import torchvision

assert torchvision
import model_compression_toolkit as mct  # noqa: E402

PACKAGES = ("model-compression-toolkit",)


def contenders(
    workload: Workload, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Step]:
    """Return the step at 8 bits."""

    def batches() -> Iterator[list[Tensor]]:
        yield [images]

    model, _ = mct.qat.pytorch_quantization_aware_training_init_experimental(
        workload.model(), batches
    )
    return {"w8a8, folded": step_of(model.train(), optimizer_of(model), images, labels)}
