"""Networks whose peak activation memory is worked out by hand, and random ones with their plan."""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lenet5() -> nn.Module:
    """Return LeNet-5 for inputs of shape ``(batch, 1, 28, 28)``."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class _Block(nn.Module):
    """Two convolutions and a shortcut, which subsamples and pads with zeros where it must."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)
        self.skip = nn.Conv2d(before, channels, 1, stride, bias=False) if stride > 1 else None
        self.skip_norm = nn.BatchNorm2d(channels) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        y = F.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        if self.skip is not None and self.skip_norm is not None:
            x = self.skip_norm(self.skip(x))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """ResNet-20 for images of 32 x 32 (He et al. 2016, section 4.2), with projection shortcuts."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        before = 16
        for stage, channels in enumerate((16, 32, 64)):
            for place in range(3):
                blocks.append(_Block(before, channels, 2 if stage and not place else 1))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """Two levels down and up, for inputs of shape ``(batch, 3, 16, 16)``."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(3, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 16, 3, padding=1)
        self.bottom = nn.Conv2d(16, 32, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.join2 = nn.Conv2d(32, 16, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.join1 = nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for each pixel, ``(batch, 2, 16, 16)``."""
        first = F.relu(self.down1(x))
        second = F.relu(self.down2(F.max_pool2d(first, 2)))
        y = F.relu(self.bottom(F.max_pool2d(second, 2)))
        y = F.relu(self.join2(torch.cat([self.up2(y), second], 1)))
        y = F.relu(self.join1(torch.cat([self.up1(y), first], 1)))
        return self.last(y)


@dataclass(frozen=True)
class Step:
    """One call of a random network: what it does, and the numbers of the tensors it reads."""

    kind: str
    reads: tuple[int, ...]


class Plan(nn.Module):
    """A network given as steps; tensor 0 is the input, tensor n the result of step n.

    All tensors have the shape ``(batch, CHANNELS, n, n)``, up to `n` and twice the channels between
    a concatenation and the convolution that follows it.
    """

    CHANNELS = 4

    def __init__(self, steps: tuple[Step, ...], outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        self.layers = nn.ModuleDict()
        for number, step in enumerate(steps, 1):
            layer = self._layer(step.kind)
            if layer is not None:
                self.layers[str(number)] = layer

    def _layer(self, kind: str) -> nn.Module | None:
        channels = self.CHANNELS
        return {
            "conv": lambda: nn.Conv2d(channels, channels, 3, padding=1),
            "conv_wide": lambda: nn.Conv2d(2 * channels, channels, 1),
            "norm": lambda: nn.BatchNorm2d(channels),
            "layer_norm": lambda: nn.GroupNorm(2, channels),
            "dropout": lambda: nn.Dropout(0.1),
        }.get(kind, lambda: None)()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs."""
        tensors = [x]
        for number, step in enumerate(self.steps, 1):
            given = [tensors[place] for place in step.reads]
            tensors.append(self._run(number, step.kind, given))
        return tuple(tensors[place] for place in self.outputs)

    def _run(self, number: int, kind: str, given: list[Tensor]) -> Tensor:
        match kind:
            case "relu":
                return F.relu(given[0])
            case "relu_":
                return F.relu(given[0], inplace=True)
            case "double":
                return given[0] * 2.0
            case "view":
                return given[0].view_as(given[0])
            case "max_pool":
                return F.max_pool2d(given[0], 3, 1, 1)
            case "avg_pool":
                return F.avg_pool2d(given[0], 3, 1, 1)
            case "clone":
                return given[0].clone()
            case "add":
                return given[0] + given[1]
            case "mul":
                return given[0] * given[1]
            case "cat":
                return torch.cat(given, 1)
            case _:
                layer = self.layers[str(number)]
                result: Tensor = layer(given[0])
                return result


_ONE = ("conv", "conv", "norm", "relu", "relu", "double", "view", "max_pool", "avg_pool", "clone")
_MORE = ("layer_norm", "dropout", "relu_")


def random_plan(seed: int) -> Plan:
    """Return a network of 3 to 14 steps; it always ends in something that all of it leads to."""
    rng = random.Random(seed)
    steps: list[Step] = []
    wide: set[int] = set()
    overwritten: set[int] = set()
    for number in range(1, rng.randint(3, 14)):
        usable = [place for place in range(number) if place not in wide | overwritten]
        recent = usable[-3:]
        if number - 1 in wide:
            steps.append(Step("conv_wide", (number - 1,)))
            continue
        kind = rng.choice((*_ONE, *_MORE, "add", "mul", "cat", "add"))
        if kind in ("add", "mul", "cat"):
            if len(usable) < 2:
                kind, reads = "conv", (usable[-1],)
            else:
                reads = (recent[-1], rng.choice(usable[:-1]))
        else:
            reads = (rng.choice(recent),)
        if kind == "relu_" and not _is_free_to_overwrite(steps, reads[0]):
            kind = "relu"
        if kind == "relu_":
            overwritten.add(reads[0])
        if kind == "cat":
            wide.add(number)
        steps.append(Step(kind, reads))
    if len(steps) in wide:
        steps.append(Step("conv_wide", (len(steps),)))
    read = {place for step in steps for place in step.reads}
    ends = [number for number in range(1, len(steps) + 1) if number not in read]
    return Plan(tuple(steps), tuple(ends))


def _is_free_to_overwrite(steps: list[Step], place: int) -> bool:
    """Tell whether a tensor is the result of a convolution that nothing has read."""
    is_product = place > 0 and steps[place - 1].kind.startswith("conv")
    return is_product and all(place not in step.reads for step in steps)
