"""Six architectures, each with data that a CPU learns in minutes, and how they are trained.

Images come from MNIST and from a JPEG copy of CIFAR-10, a part of each, in a folder laid out as
torchvision's MNIST and ImageFolder (``cifar10-jpeg/train``) have it; the commands are synthetic.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "speed"), str(ROOT / "examples")]

from latency_networks import mobilenet, vgg  # noqa: E402
from networks import ResNet, VisionTransformer  # noqa: E402

from mnist_plain import LeNet5  # noqa: E402
from torchvision_shim import torchvision  # noqa: E402

BATCH = 64
#: Where float networks and decoded images are kept between scripts.
CACHE = ROOT / "build" / "accuracy"
_CLASSES = 10
_AUDIO_SAMPLES = 4000

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """An architecture, its data and its training.

    Attributes:
        name: what tables call it.
        build: returns the network.
        data: returns the training and the test samples of a folder, as inputs and labels.
        epochs: passes over the training samples in float.
        guided_epochs: and under a guide.
        rate: the highest learning rate of both.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[str], tuple[Split, Split]]
    epochs: int
    guided_epochs: int
    rate: float = 2e-3


def mnist(root: str) -> tuple[Split, Split]:
    """Return the first 12,000 training images, and the test images."""

    def split(train: bool) -> Split:
        held = torchvision.datasets.MNIST(root, train=train)
        return (held.data[:, None].float() / 255 - 0.1307) / 0.3081, held.targets

    images, labels = split(True)
    return (images[:12_000], labels[:12_000]), split(False)


def cifar(root: str) -> tuple[Split, Split]:
    """Return 8,000 training and 2,000 test images of the JPEG copy, as many of each class."""
    return cifar_part(root, "train", 800), cifar_part(root, "test", 200)


def small_cifar(root: str) -> tuple[Split, Split]:
    """Return the same images at half their height and width."""
    train, test = cifar(root)
    return (F.avg_pool2d(train[0], 2), train[1]), (F.avg_pool2d(test[0], 2), test[1])


def cifar_part(root: str, part: str, per_class: int) -> Split:
    """Return the first images of each class."""
    kept = CACHE / f"cifar-{part}-{per_class}.pt"
    if not kept.exists():
        held = torchvision.datasets.ImageFolder(os.path.join(root, "cifar10-jpeg", part))
        chosen = [
            index
            for label in range(_CLASSES)
            for index in [i for i, (_, own) in enumerate(held.samples) if own == label][:per_class]
        ]
        images = torch.stack([torch.from_numpy(np.array(held[i][0])) for i in chosen])
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save((images, torch.tensor([held.samples[i][1] for i in chosen])), kept)
    images, labels = torch.load(kept)
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.473) / 0.251, labels


def commands(_: str) -> tuple[Split, Split]:
    """Return 4,000 and 1,000 synthetic commands of half a second at 8 kHz, ten of them.

    Each is a sequence of three gliding tones of its own, at a pitch, a speed and a loudness of the
    speaker's, in noise.
    """
    return _commands(4000, seed=1), _commands(1000, seed=2)


def _commands(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    tones = torch.rand(_CLASSES, 3, 2, generator=torch.Generator().manual_seed(7)) * 900 + 200
    labels = torch.arange(count) % _CLASSES
    time = torch.arange(_AUDIO_SAMPLES) / 8000.0
    length = time[-1] * (0.7 + 0.3 * torch.rand(count, 1, generator=generator))
    place = (time / length * 3).clamp(max=2.999)
    part, within = place.long(), place - place.floor()
    chosen = tones[labels]
    start, end = (chosen[:, :, side].gather(1, part) for side in (0, 1))
    pitch = 0.9 + 0.2 * torch.rand(count, 1, generator=generator)
    phase = 2 * math.pi * ((start + (end - start) * within) * pitch / 8000.0).cumsum(1)
    loudness = 0.3 + torch.rand(count, 1, generator=generator)
    sound = loudness * phase.sin() * (time < length)
    sound += 0.7 * torch.randn(count, _AUDIO_SAMPLES, generator=generator)
    return sound[:, None], labels


def keyword_spotter() -> nn.Module:
    """Return a 1-D convolutional network for `commands`."""
    layers: list[nn.Module] = []
    inside = 1
    for width, kernel, stride in ((16, 32, 8), (32, 9, 4), (48, 5, 2), (64, 5, 2), (64, 5, 2)):
        conv = nn.Conv1d(inside, width, kernel, stride, kernel // 2, bias=False)
        layers += [conv, nn.BatchNorm1d(width), nn.ReLU()]
        inside = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(inside, _CLASSES)
    )


TASKS = (
    Task("LeNet-5", LeNet5, mnist, 4, 2),
    Task("ResNet-20", lambda: ResNet((3, 3, 3), (16, 32, 64), stem=False), cifar, 8, 2, 4e-3),
    Task("MobileNetV2-style", lambda: mobilenet(24, (1, 2, 2), 4), cifar, 12, 4, 4e-3),
    Task("VGG-style", lambda: vgg((32, 64, 128), 1), cifar, 8, 3),
    Task("small ViT", lambda: VisionTransformer(64, 4, 4), cifar, 8, 3, 1e-3),
    Task("keyword spotting", keyword_spotter, commands, 8, 4),
)


def float_model(task: Task, train: Split, seed: int) -> nn.Module:
    """Return the trained float network, from the cache where it is there."""
    torch.manual_seed(seed)
    model = task.build()
    name = task.name.lower().replace(" ", "-")
    kept = CACHE / f"{name}-{seed}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept))
        return model.eval()
    optimizer = Adam(model.parameters())
    scheduler = OneCycleLR(optimizer, task.rate, task.epochs * (len(train[0]) // BATCH))
    for _ in range(task.epochs):
        model.train()
        for x, y in batches(train):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), kept)
    return model.eval()


def batches(split: Split, *, augmented: bool = True) -> Iterator[Split]:
    """Yield batches in a new order, colour images shifted and mirrored."""
    inputs, labels = split
    order = torch.randperm(len(inputs))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        x = inputs[chosen]
        if augmented and x.ndim == 4 and x.shape[1] == 3:
            x = _shifted(x)
        yield x, labels[chosen]


def calibration(train: Split, samples: int = 512) -> list[Tensor]:
    """Return batches of training samples without labels, spread over all of them."""
    step = len(train[0]) // samples
    return list(train[0][::step][:samples].split(BATCH))


def _shifted(x: Tensor) -> Tensor:
    by = x.shape[-1] // 8
    padded = F.pad(x, (by, by, by, by))
    down, right = (int(torch.randint(2 * by + 1, ())) for _ in range(2))
    x = padded[:, :, down : down + x.shape[2], right : right + x.shape[3]]
    return x.flip(3) if bool(torch.randint(2, ())) else x


class Batches:
    """`batches` as something that can be iterated anew."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __iter__(self) -> Iterator[Split]:
        return batches(self._split)

    def __len__(self) -> int:
        return len(self._split[0]) // BATCH


@torch.no_grad()
def accuracy(model: nn.Module, test: Split) -> float:
    """Return the share of samples that a network classifies right, in percent."""
    right = 0
    for x, y in zip(test[0].split(500), test[1].split(500), strict=True):
        right += int((model(x).argmax(1) == y).sum())
    return 100 * right / len(test[1])
