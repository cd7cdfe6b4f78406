"""torchao, PT2E: an exported graph at fixed 8 bits for x86, ranges by moving averages.

Environment: ``pip install torch==2.13.0 torchao==0.18.0``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from networks import Workload
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)
from training import Step, optimizer_of, step_of

PACKAGES = ("torchao",)


def contenders(
    workload: Workload, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Step]:
    """Return the step at 8 bits."""
    exported = torch.export.export(workload.model().train(), (images,)).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    model = prepare_qat_pt2e(exported, quantizer)
    return {"w8a8": step_of(model, optimizer_of(model), images, labels)}
