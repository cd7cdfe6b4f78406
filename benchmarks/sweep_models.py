"""Models for the sweeps: built fast, filled with numbers, with the smallest fitting input."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor, nn

from cgmq_fx.testing.counting import run_fake

_FAST_ELEMENTS = 50_000


@contextmanager
def no_initialisation() -> Iterator[None]:
    """Make `torch.nn.init` do nothing: `fill` gives the numbers afterwards, in one go."""
    with ExitStack() as stack:
        for key in dir(nn.init):
            if key.endswith("_") and not key.startswith("_"):
                stack.enter_context(
                    mock.patch.object(nn.init, key, lambda tensor, *_, **__: tensor)
                )
        yield


@torch.no_grad()
def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Give the model random weights, and batch-norm statistics that keep it alive."""
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
def smallest_shape(model: nn.Module, ladder: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of the smallest sample that the model takes, without the batch axis.

    Small means few elements. The model must take one sample in evaluation and two in training.

    Raises:
        ValueError: it takes none of them.
    """
    last = "no size was tried"
    for shape in sorted(ladder, key=math.prod):
        try:
            for training in (False, True):
                _run(model.train(training), random_input(shape, 2 if training else 1))
        except Exception as error:  # whatever the model says to a size that it does not take
            last = f"{shape}: {type(error).__name__}: {error}"
            continue
        return shape
    raise ValueError(f"no input of the ladder is taken; the last answer was {last}")


def _run(model: nn.Module, images: Tensor) -> None:
    """Run the model, on tensors without data where that is faster."""
    if images.numel() <= _FAST_ELEMENTS:
        model(images)
    else:
        run_fake(model, (images,))


def random_input(shape: tuple[int, ...], batch: int, seed: int = 1) -> Tensor:
    """Return a batch of images in the range that normalised images have."""
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
