"""AIMET: fixed 8 bits, learned ranges.

Environment: ``pip install torch==2.13.0 torchvision==0.28.0 aimet-torch==2.42.0``.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from networks import Workload
from torch import Tensor
from training import Step, optimizer_of, step_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from torchvision_shim import torchvision

assert torchvision
from aimet_torch import QuantizationSimModel  # noqa: E402

PACKAGES = ("aimet-torch",)


def contenders(
    workload: Workload, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Step]:
    """Return the step at 8 bits, batch norm kept."""
    sim = QuantizationSimModel(
        workload.model().eval(), images, default_param_bw=8, default_output_bw=8
    )
    sim.compute_encodings(lambda model: model(images))
    model = sim.model.train()
    return {"w8a8": step_of(model, optimizer_of(model), images, labels)}
