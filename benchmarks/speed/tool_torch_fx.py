"""`torch.ao.quantization`, FX graph mode: fixed 8 bits, ranges by moving averages.

Environment: ``pip install torch==2.13.0``.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from networks import Workload
from torch import Tensor
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from training import Step, optimizer_of, step_of

PACKAGES: tuple[str, ...] = ()


def contenders(
    workload: Workload, images: Tensor, labels: Tensor, options: Mapping[str, Any]
) -> dict[str, Step]:
    """Return the step at 8 bits for x86."""
    warnings.simplefilter("ignore")  # it is deprecated, and says so at every call
    mapping = get_default_qat_qconfig_mapping("x86")
    model = prepare_qat_fx(workload.model().train(), mapping, (images[:1],))
    return {"w8a8": step_of(model, optimizer_of(model), images, labels)}
