"""Import torchvision, also where its binary operators do not fit the installed torch.

A torchvision wheel built for another variant of torch (CPU or CUDA) cannot load its operator
library, and then stops at the first operator that it describes but never declared. No
classification, segmentation or video model uses those operators, so declaring them is enough for
everything in this repository. Examples, benchmarks and tests all say
`from torchvision_shim import torchvision`.
"""

import importlib
import sys
from types import ModuleType

import torch

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Kept alive: a Library takes its declarations back when it is collected.
_libraries: list[torch.library.Library] = []


def _declare_missing_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)


def _forget_partial_import() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def import_torchvision() -> ModuleType:
    """Return torchvision, with its two missing operators declared where that is what stops it.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision fails for any other reason than the missing operators.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    _forget_partial_import()
    _declare_missing_operators()
    return importlib.import_module("torchvision")


torchvision = import_torchvision()
