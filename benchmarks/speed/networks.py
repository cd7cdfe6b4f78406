"""The networks of the speed benchmarks, written out so that every environment has the same ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 10


class LeNet5(nn.Module):
    """20C5-MP2-50C5-MP2-FC500-FC10 for images ``(batch, 1, 28, 28)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network (arXiv 1512.03385): the ones for CIFAR, with `stem` those for ImageNet."""

    def __init__(self, blocks: tuple[int, ...], widths: tuple[int, ...], *, stem: bool) -> None:
        super().__init__()
        if stem:
            first: list[nn.Module] = [nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)]
        else:
            first = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)]
        first += [nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*first, *([nn.MaxPool2d(3, 2, 1)] if stem else []))
        layers, inputs = [], widths[0]
        for stage, (count, outputs) in enumerate(zip(blocks, widths, strict=True)):
            for place in range(count):
                layers.append(BasicBlock(inputs, outputs, 2 if stage and not place else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection (arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [] if expansion == 1 else [conv_norm_relu6(inputs, hidden, 1)]
        layers += [conv_norm_relu6(hidden, hidden, 3, stride, groups=hidden)]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        return x + self.layers(x) if self.is_residual else self.layers(x)


def conv_norm_relu6(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Return the unit that MobileNetV2 is made of."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class MobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381, table 2); `strides` are those of the stem and the stages."""

    def __init__(self, strides: tuple[int, ...] = (2, 1, 2, 2, 2, 1, 2, 1)) -> None:
        super().__init__()
        rows = (
            (1, 16, 1),
            (6, 24, 2),
            (6, 32, 3),
            (6, 64, 4),
            (6, 96, 3),
            (6, 160, 3),
            (6, 320, 1),
        )
        layers: list[nn.Module] = [conv_norm_relu6(3, 32, 3, strides[0])]
        inputs = 32
        for (expansion, outputs, count), stride in zip(rows, strides[1:], strict=True):
            for place in range(count):
                block = InvertedResidual(inputs, outputs, 1 if place else stride, expansion)
                layers.append(block)
                inputs = outputs
        self.features = nn.Sequential(*layers, conv_norm_relu6(inputs, 1280, 1))
        self.head = nn.Linear(1280, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, dim))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block with GELU."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT-tiny (arXiv 2012.12877, table 1: width 192, depth 12, 3 heads), patches of 4 x 4."""

    def __init__(self, dim: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, 65, dim) * 0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


@dataclass(frozen=True)
class Workload:
    """A network and the batch that it is trained on.

    Attributes:
        build: returns the network.
        batch: samples of a batch.
        image: shape of a sample.
    """

    build: Callable[[], nn.Module]
    batch: int
    image: tuple[int, ...]

    def model(self) -> nn.Module:
        """Return the network, the same numbers every time."""
        torch.manual_seed(0)
        return self.build()

    def data(self) -> tuple[Tensor, Tensor]:
        """Return images and labels, the same every time."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, *self.image, generator=generator)
        return images, torch.randint(0, NUM_CLASSES, (self.batch,), generator=generator)


#: Strides of MobileNetV2 as it is used for images of 32 x 32.
_SMALL_IMAGES = (1, 1, 1, 2, 2, 1, 2, 1)

WORKLOADS = {
    "lenet5": Workload(LeNet5, 128, (1, 28, 28)),
    "resnet20": Workload(lambda: ResNet((3, 3, 3), (16, 32, 64), stem=False), 64, (3, 32, 32)),
    "mobilenet_v2": Workload(lambda: MobileNetV2(_SMALL_IMAGES), 64, (3, 32, 32)),
    "vit_tiny": Workload(VisionTransformer, 32, (3, 32, 32)),
}

#: Networks for images of 224 x 224, one image at a time.
LARGE = {
    "resnet18": Workload(
        lambda: ResNet((2, 2, 2, 2), (64, 128, 256, 512), stem=True), 1, (3, 224, 224)
    ),
    "mobilenet_v2": Workload(MobileNetV2, 1, (3, 224, 224)),
}
