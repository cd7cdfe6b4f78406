"""Where the user's code stands, as opposed to that of torch and of this package."""

import inspect
import os
import traceback
from pathlib import Path

import torch

from cgmq_fx.errors import UnsupportedModelError

# Folders, with a separator at the end: torchvision is no part of torch.
_LIBRARY_PATHS = tuple(
    f"{Path(file).parent}{os.sep}"
    for file in (torch.__file__, __file__, inspect.getfile(UnsupportedModelError))
)
_STANDARD_LIBRARY = str(Path(inspect.__file__).parent)


def is_library(filename: str) -> bool:
    """Tell whether a frame is of torch, of this package or of Python, not of the user."""
    installed = "site-packages" in filename
    standard = filename.startswith(_STANDARD_LIBRARY) and not installed
    return filename.startswith((*_LIBRARY_PATHS, "<")) or standard


def user_place() -> str:
    """Return the file and line of the user's code that is running."""
    for frame in reversed(traceback.extract_stack()):
        if not is_library(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return "the model"
