"""Torchvision's models for the sweep: built fast, filled with numbers, with the smallest input."""

import inspect
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from sweep_counting import run_fake
from torch import Tensor, nn

from torchvision_shim import torchvision

_IMAGE_SIZES = (32, 64, 96, 128, 160, 192, 224, 299, 384)
_VIDEO_SIZES = (32, 64, 112, 224)
_FRAMES = (2, 4, 8, 16)
_FAST_ELEMENTS = 50_000
_LEFT_OUT = (".detection.", ".optical_flow.")


def model_names() -> list[str]:
    """Return every classification, segmentation and video model of torchvision."""
    names = torchvision.models.list_models()
    return [name for name in names if not any(part in _module(name) for part in _LEFT_OUT)]


def _module(name: str) -> str:
    return str(torchvision.models.get_model_builder(name).__module__)


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model with random weights and batch-norm statistics that keep it alive."""
    builder = torchvision.models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    options: dict[str, object] = dict.fromkeys({"weights", "weights_backbone"} & {*accepted})
    with _no_initialisation():
        model: nn.Module = builder(**options)
    _fill(model, torch.Generator().manual_seed(seed))
    return model


@contextmanager
def _no_initialisation() -> Iterator[None]:
    """Make `torch.nn.init` do nothing: what it would fill is filled afterwards, in one go."""
    with ExitStack() as stack:
        for key in dir(nn.init):
            if key.endswith("_") and not key.startswith("_"):
                stack.enter_context(
                    mock.patch.object(nn.init, key, lambda tensor, *_, **__: tensor)
                )
        yield


def _leave(tensor: Tensor, *_: object, **__: object) -> Tensor:
    return tensor


@torch.no_grad()
def _fill(model: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            bound = math.sqrt(3 * parameter.shape[0] / parameter.numel())
            parameter.uniform_(-bound, bound, generator=generator)
        elif name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.uniform_(-0.1, 0.1, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("num_batches_tracked"):
            buffer.zero_()


@torch.no_grad()
def smallest_input(name: str, model: nn.Module) -> tuple[int, ...]:
    """Return the shape of the smallest sample that the model takes, without the batch axis.

    Small means few elements; sizes and frame counts come from a ladder. The model must take one
    sample in evaluation and two in training.

    Raises:
        ValueError: it takes none of them.
    """
    ladder: list[tuple[int, ...]] = [(3, size, size) for size in _IMAGE_SIZES]
    if ".video." in _module(name):
        ladder = [(3, count, size, size) for count in _FRAMES for size in _VIDEO_SIZES]
    last = "no size was tried"
    for shape in sorted(ladder, key=math.prod):
        try:
            for training in (False, True):
                _run(model.train(training), random_input(shape, 2 if training else 1))
        except Exception as error:  # whatever the model says to a size that it does not take
            last = f"{shape}: {type(error).__name__}: {error}"
            continue
        return shape
    raise ValueError(f"{name} takes no input of the ladder; the last answer was {last}")


def _run(model: nn.Module, images: Tensor) -> None:
    """Run the model, on tensors without data where that is faster."""
    if images.numel() <= _FAST_ELEMENTS:
        model(images)
    else:
        run_fake(model, (images,))


def random_input(shape: tuple[int, ...], batch: int, seed: int = 1) -> Tensor:
    """Return a batch of images in the range that normalised images have."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
