"""Networks of the latency benchmarks: those that the table is made from, and others.

Each takes one image of 3 x 64 x 64, a signal of 16 x 256, or 256 features. The second list has
other depths, widths and shapes than the first.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

IMAGE, SIGNAL, FEATURES = (1, 3, 64, 64), (1, 16, 256), (1, 256)
Network = tuple[str, Callable[[], nn.Module], tuple[int, ...]]


def _conv(
    inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside))


class _Residual(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv(inside, outside, 3, stride), nn.ReLU())
        self.second = _conv(outside, outside, 3)
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inside, outside, 1, stride)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.second(self.first(x)) + self.shortcut(x))


class _Inverted(nn.Module):
    """Expansion, depthwise convolution and projection, as in MobileNetV2."""

    def __init__(self, inside: int, outside: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inside * expand
        self.body = nn.Sequential(
            _conv(inside, wide, 1),
            nn.ReLU(),
            _conv(wide, wide, 3, stride, groups=wide),
            nn.ReLU(),
            _conv(wide, outside, 1),
        )
        self.has_shortcut = inside == outside and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.has_shortcut else self.body(x)


def resnet(width: int, depths: tuple[int, ...], classes: int = 10) -> nn.Module:
    """Return residual stages of doubling width and halving size."""
    layers: list[nn.Module] = [_conv(3, width, 3), nn.ReLU()]
    inside = width
    for stage, depth in enumerate(depths):
        outside = width << stage
        for index in range(depth):
            layers.append(_Residual(inside, outside, 2 if stage and not index else 1))
            inside = outside
    return nn.Sequential(*layers, *_head(inside, classes))


def mobilenet(width: int, depths: tuple[int, ...], expand: int, classes: int = 10) -> nn.Module:
    """Return stages of inverted residuals; every stage halves the size."""
    layers: list[nn.Module] = [_conv(3, width, 3, 2), nn.ReLU()]
    inside = width
    for stage, depth in enumerate(depths):
        outside = width + stage * width // 2
        for index in range(depth):
            layers.append(_Inverted(inside, outside, 1 if index else 2, expand))
            inside = outside
    layers += [_conv(inside, 4 * inside, 1), nn.ReLU()]
    return nn.Sequential(*layers, *_head(4 * inside, classes))


def vgg(widths: tuple[int, ...], depth: int, classes: int = 10) -> nn.Module:
    """Return stages of plain 3 x 3 convolutions, each with a pooling layer behind it."""
    layers: list[nn.Module] = []
    inside = 3
    for width in widths:
        for _ in range(depth):
            layers += [_conv(inside, width, 3), nn.ReLU()]
            inside = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_head(inside, classes))


def separable(width: int, depth: int, classes: int = 10) -> nn.Module:
    """Return depthwise and pointwise convolutions in turn, as in MobileNetV1."""
    layers: list[nn.Module] = [_conv(3, width, 3, 2), nn.ReLU()]
    inside = width
    for index in range(depth):
        outside = inside * (2 if index % 2 == 0 else 1)
        stride = 2 if index % 2 == 0 else 1
        layers += [_conv(inside, inside, 3, stride, groups=inside), nn.ReLU()]
        layers += [_conv(inside, outside, 1), nn.ReLU()]
        inside = outside
    return nn.Sequential(*layers, *_head(inside, classes))


def _head(inside: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes)]


def mlp(widths: tuple[int, ...], classes: int = 10) -> nn.Module:
    """Return linear layers with a ReLU between them."""
    layers: list[nn.Module] = []
    inside = FEATURES[1]
    for width in widths:
        layers += [nn.Linear(inside, width), nn.ReLU()]
        inside = width
    return nn.Sequential(*layers, nn.Linear(inside, classes))


def signal(widths: tuple[int, ...], kernel: int, classes: int = 10) -> nn.Module:
    """Return one-dimensional convolutions of stride 2."""
    layers: list[nn.Module] = []
    inside = SIGNAL[1]
    for width in widths:
        conv = nn.Conv1d(inside, width, kernel, 2, kernel // 2)
        layers += [conv, nn.BatchNorm1d(width), nn.ReLU()]
        inside = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inside * (256 >> len(widths)), classes))


#: What the table is made from.
MADE_FROM: tuple[Network, ...] = (
    ("resnet 64 [2 2 2 2]", lambda: resnet(64, (2, 2, 2, 2)), IMAGE),
    ("resnet 24 [1 1 1]", lambda: resnet(24, (1, 1, 1)), IMAGE),
    ("mobilenet 32 [1 2 2] x6", lambda: mobilenet(32, (1, 2, 2), 6), IMAGE),
    ("mobilenet 16 [1 2] x3", lambda: mobilenet(16, (1, 2), 3), IMAGE),
    ("vgg 32-128-256 x1", lambda: vgg((32, 128, 256), 1), IMAGE),
    ("separable 32 x8", lambda: separable(32, 8), IMAGE),
    ("mlp 512-1024-256", lambda: mlp((512, 1024, 256)), FEATURES),
    ("signal 32-64-128-256 k5", lambda: signal((32, 64, 128, 256), 5), SIGNAL),
)
#: What its predictions are tried on.
OTHERS: tuple[Network, ...] = (
    ("resnet 32 [2 2 2]", lambda: resnet(32, (2, 2, 2)), IMAGE),
    ("resnet 48 [1 2 3]", lambda: resnet(48, (1, 2, 3)), IMAGE),
    ("resnet 16 [3 3 3]", lambda: resnet(16, (3, 3, 3)), IMAGE),
    ("resnet 80 [1 1 1 1]", lambda: resnet(80, (1, 1, 1, 1)), IMAGE),
    ("mobilenet 24 [2 3 3] x6", lambda: mobilenet(24, (2, 3, 3), 6), IMAGE),
    ("mobilenet 40 [1 2 3] x4", lambda: mobilenet(40, (1, 2, 3), 4), IMAGE),
    ("mobilenet 48 [2 2] x3", lambda: mobilenet(48, (2, 2), 3), IMAGE),
    ("vgg 48-96-192 x2", lambda: vgg((48, 96, 192), 2), IMAGE),
    ("vgg 64-128 x1", lambda: vgg((64, 128), 1), IMAGE),
    ("separable 48 x6", lambda: separable(48, 6), IMAGE),
    ("mlp 768-768", lambda: mlp((768, 768)), FEATURES),
    ("signal 48-96-192 k7", lambda: signal((48, 96, 192), 7), SIGNAL),
)


def only(networks: Sequence[Network], start: str) -> list[Network]:
    """Return the networks whose names start so."""
    return [network for network in networks if network[0].startswith(start)]


def built(networks: Sequence[Network]) -> list[tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Return the networks with random weights, and an input for each."""
    torch.manual_seed(0)
    return [(make().eval(), (torch.randn(shape),)) for _, make, shape in networks]
