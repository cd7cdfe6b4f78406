"""Torchvision's models for the sweep."""

import inspect
from functools import partial

import torch
from sweep_models import fill, no_initialisation, random_input, smallest_shape
from sweep_runner import Subject
from torch import Tensor, nn

from cgmq_fx.testing.compare import Inputs
from torchvision_shim import torchvision

_IMAGE_SIZES = (32, 64, 96, 128, 160, 192, 224, 299, 384)
_VIDEO_SIZES = (32, 64, 112, 224)
_FRAMES = (2, 4, 8, 16)
PLAIN = "classification, segmentation, video"
DETECTION, FLOW = "detection", "optical flow"
_OTHER_GROUPS = {".detection.": DETECTION, ".optical_flow.": FLOW}
# What is prepared in place of a detector, whose proposals are as many as the data says.
_RCNN = ("backbone", "rpn.head")
_PARTS = {"faster_rcnn": _RCNN, "mask_rcnn": _RCNN, "keypoint_rcnn": _RCNN}
_SCENE = (3, 64, 64)
_FLOW_IMAGE = (3, 128, 128)


def subjects() -> list[Subject]:
    """Return every model of torchvision."""
    return [_subject(name) for name in torchvision.models.list_models()]


def _module(name: str) -> str:
    return str(torchvision.models.get_model_builder(name).__module__)


def _subject(name: str) -> Subject:
    module = _module(name)
    group = next((group for part, group in _OTHER_GROUPS.items() if part in module), PLAIN)
    return Subject(
        name,
        group,
        module.partition("torchvision.models.")[2],
        partial(build, name),
        {PLAIN: partial(_images, name), DETECTION: _scenes, FLOW: _pairs}[group],
        parts=_PARTS.get(module.rpartition(".")[2], ("backbone", "head"))
        if group == DETECTION
        else (),
    )


def _images(name: str, model: nn.Module) -> tuple[Tensor, Tensor]:
    ladder: list[tuple[int, ...]] = [(3, size, size) for size in _IMAGE_SIZES]
    if ".video." in _module(name):
        ladder = [(3, count, size, size) for count in _FRAMES for size in _VIDEO_SIZES]
    shape = smallest_shape(model, ladder)
    return random_input(shape, 1), random_input(shape, 2)


def _scenes(_: nn.Module) -> tuple[Inputs, Inputs]:
    """Return one image, and two with a box in each, as training wants it."""
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    return ([*random_input(_SCENE, 1)],), ([*random_input(_SCENE, 2)], [target, {**target}])


def _pairs(_: nn.Module) -> tuple[Inputs, Inputs]:
    """Return pairs of images of the smallest size that the pyramid takes."""
    one, two = (
        tuple(random_input(_FLOW_IMAGE, batch, seed) for seed in (1, 2)) for batch in (1, 2)
    )
    return one, two


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model with random weights and batch-norm statistics that keep it alive."""
    builder = torchvision.models.get_model_builder(name)
    accepted = inspect.signature(builder).parameters
    options: dict[str, object] = dict.fromkeys({"weights", "weights_backbone"} & {*accepted})
    with no_initialisation():
        model: nn.Module = builder(**options)
    fill(model, torch.Generator().manual_seed(seed))
    return model
