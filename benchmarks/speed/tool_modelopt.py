"""NVIDIA ModelOpt: fixed 8 bits with the scales of a calibration.

Environment: ``pip install torch==2.13.0 nvidia-modelopt==0.47.0 requests huggingface_hub`` (the
last two are imported and not declared).
"""

from collections.abc import Mapping
from typing import Any

import modelopt.torch.quantization as mtq
from networks import Workload
from torch import Tensor
from training import Step, optimizer_of, step_of

PACKAGES = ("nvidia-modelopt",)


def contenders(
    workload: Workload, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Step]:
    """Return the step at 8 bits."""
    model = workload.model()
    model = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda quantized: quantized(images))
    return {"w8a8": step_of(model.train(), optimizer_of(model), images, labels)}
