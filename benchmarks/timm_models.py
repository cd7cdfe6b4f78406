"""300 of timm's models for the sweep, drawn with a fixed seed.

    pip install 'timm==1.0.31'

Each module of `timm.models` gives one model in turn, in an order shuffled with `SEED`, until there
are `COUNT`; a model of more than `MOST_PARAMETERS` is passed over. So every family occurs, the rare
ones as often as the vision transformers. Models are made by `timm.create_model` with its defaults,
without pretrained weights, for the smallest image that they take.
"""

import random
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
from sweep_models import fill, no_initialisation, random_input, smallest_shape
from sweep_runner import Subject
from torch import Tensor, nn

from torchvision_shim import torchvision  # timm imports it

assert torchvision
import timm  # noqa: E402
from timm.layers import weight_init  # noqa: E402
from timm.models import model_entrypoint  # noqa: E402

GROUP = "timm"
SEED = 2026
COUNT = 300
#: Below, the second budget, the first batch and a backward pass are tried too.
SMALL_PARAMETERS = 6_000_000
MOST_PARAMETERS = 200_000_000
_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)


def draw(count: int = COUNT) -> list[str]:
    """Return the names of the models, sorted."""
    by_family: dict[str, list[str]] = {}
    for name in timm.list_models():
        by_family.setdefault(family(name), []).append(name)
    shuffler = random.Random(SEED)
    turns = [_within_size(shuffler.sample(names, len(names))) for names in by_family.values()]
    drawn: list[str] = []
    while turns and len(drawn) < count:
        turn = turns.pop(0)
        name = next(turn, None)
        if name is not None:
            drawn.append(name)
            turns.append(turn)
    return sorted(drawn)


def family(name: str) -> str:
    """Return the module of `timm.models` that defines a model."""
    return str(model_entrypoint(name).__module__).rpartition(".")[2]


def _within_size(names: list[str]) -> Iterator[str]:
    for name in names:
        with torch.device("meta"), no_initialisation():
            model = timm.create_model(name)
        if sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMETERS:
            yield name


def subject(name: str) -> Subject:
    """Return the model of that name as a subject of the sweep."""
    return Subject(
        name, GROUP, family(name), partial(build, name), inputs, small_parameters=SMALL_PARAMETERS
    )


def build(name: str, seed: int = 0) -> nn.Module:
    """Return the model for its smallest image, with random weights."""
    model = _smallest(name)
    fill(model, torch.Generator().manual_seed(seed))
    return model


def _smallest(name: str) -> nn.Module:
    """Return the model; one that is made for a size of image, for the smallest that it takes."""
    default = timm.get_pretrained_cfg(name).input_size[-1]
    for size in _SIZES:
        if size >= default:
            break
        try:
            model = _create(name, img_size=size)
            smallest_shape(model, [(3, size, size)])
        except TypeError as error:
            if "img_size" in str(error):  # it is not made for a size
                break
        except Exception:  # whatever a model says to a size that it does not take
            continue
        else:
            return model
    return _create(name)


def _create(name: str, **options: int) -> nn.Module:
    # timm has a truncated normal distribution of its own.
    internal = mock.patch.object(weight_init, "_trunc_normal_", lambda tensor, *_: tensor)
    with no_initialisation(), internal:
        model: nn.Module = timm.create_model(name, **options)
    return model


def inputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return one image and two, of the smallest size that the model takes."""
    shape = smallest_shape(model, [(3, size, size) for size in _SIZES])
    return random_input(shape, 1), random_input(shape, 2)
