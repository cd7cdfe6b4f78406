"""Small models, each with a trait that a pass could get wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ZooCase:
    """A model and inputs for it; both are made anew, and alike, at every call.

    Attributes:
        id: name of the case.
        factory: makes the model, in training mode.
        inputs: makes the arguments of its forward; two samples.
        needs_inputs: it can only be traced when shapes are known.
        batch_axis: the axis of the inputs that counts samples.
    """

    id: str
    factory: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    needs_inputs: bool = False
    batch_axis: int = 0

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """Return a model and inputs; equal at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return self.factory(), self.inputs()


class Calls(nn.Module):
    """A forward given as a function of the module, whose layers are given by name."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        """Return what the given function returns."""
        return self._forward(self, x)


class TwoInputs(nn.Module):
    """Two inputs, the second optional; a dict of outputs, one of them nested."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(4, 5)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor | None = None) -> dict[str, Any]:
        """Return sum and parts."""
        left, right = self.left(a), self.right(b)
        if scale is not None:
            right = right * scale
        return {"sum": left + right, "parts": (left, [right])}


class TiedLanguageModel(nn.Module):
    """An embedding whose weight is also that of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, ``(batch, length, 11)``."""
        return self.out(self.norm(F.gelu(self.mix(self.embed(tokens)))))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` in a pre-norm block."""

    def __init__(self, *, need_weights: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` plus its attention."""
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=self.need_weights)[0]


class CrossAttention(nn.Module):
    """Attention between two sequences of different widths, with a mask of padded keys."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the attention weights."""
        return self.attention(q, k, v, key_padding_mask=padding)


class Recurrent(nn.Module):
    """A gated recurrent unit that continues from a given state; returns its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 4, num_layers=2, batch_first=True, dropout=0.5)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(batch, length, 3)`` and the last state of every layer, batch first."""
        output, last = self.cell(x, state.transpose(0, 1))
        return self.out(output), last.transpose(0, 1)


class DropPath(nn.Module):
    """Drops samples in training; has no parameters and branches on its mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` or, in training, a random part of its samples doubled."""
        if not self.training:
            return x
        return x * 2 * torch.bernoulli(torch.full((x.shape[0], 1), 0.5, device=x.device))


class Auxiliary(nn.Module):
    """A second classifier that only training computes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        """Return logits; in training with auxiliary ones."""
        x = self.body(x).relu()
        if self.training:
            return {"out": self.head(x), "aux": self.extra(x)}
        return {"out": self.head(x)}


class Functionals(nn.Module):
    """Bare parameters, functional calls, operators and methods instead of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 1, 3, 3) * 0.2)
        self.bias = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 5) * 0.2)
        self.register_buffer("shift", torch.randn(5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, 5)``."""
        x = F.conv2d(x, weight=self.kernel, bias=self.bias, stride=2)
        x = F.dropout(x.relu(), 0.25, self.training).mean((2, 3))
        return torch.sigmoid(x @ self.matrix + self.shift) * 2 - 1


def _in_place_alias(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    alias = y.view(y.shape[0], -1)
    y += 1
    y[:, :1] *= 2
    F.relu(y, inplace=True)
    return alias.mul_(0.5)


def _changed_between_reads(self: Any, x: Tensor) -> Tensor:
    y = self.first(x)
    view = y.view_as(y)
    before = self.second(view)
    y.mul_(0.5)
    return before - self.second(view)


def _branches(self: Any, x: Tensor) -> Tensor:
    left = self.left(x)
    right = self.right(F.avg_pool2d(x, 3, 1, 1))
    return torch.cat([left, right, x[:, :2]], dim=1)


def _twice(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    once = self.layer(x)
    return once, self.layer(torch.tanh(once))


def _products(self: Any, x: Tensor) -> list[Tensor]:
    scores = torch.bmm(x, x.transpose(1, 2)).softmax(-1)
    mixed = torch.einsum("bij,bjk->bik", scores, x)
    return [mixed @ self.proj.weight.t(), torch.baddbmm(x, scores, mixed), scores.matmul(x)]


def _sdpa(self: Any, x: Tensor) -> Tensor:
    q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.out(y.transpose(1, 2).flatten(2))


def _unet(self: Any, x: Tensor) -> Tensor:
    down = self.down(x).relu()
    up = self.up(down, output_size=x.shape[2:])
    return self.last(torch.cat((up, x), 1))


def _loop_on_shape(self: Any, x: Tensor) -> Tensor:
    total = self.cell(x[:, 0])
    for step in range(1, x.shape[1]):
        total = total + self.cell(x[:, step])
    return total / len(x[0])


def _recurrent_twice(self: Any, x: Tensor) -> Tensor:
    once, state = self.cell(x)
    return self.cell(once.tanh(), state)[0]


def _cells(self: Any, x: Tensor) -> Tensor:
    first, second = None, None
    for step in range(x.shape[1]):
        first = self.lstm(x[:, step], first)
        second = self.gru(first[0], second)
    return second


def _frozen_part(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = self.first(x).relu()
    return self.second(frozen) + self.first(frozen)


def _other_products(self: Any, x: Tensor) -> Tensor:
    rows = torch.einsum(x, [0, 1, 2], self.proj.weight, [3, 2], [0, 1, 3])
    mixed = torch.tensordot(rows, self.proj.weight, dims=([2], [0]))
    return torch.inner(mixed, self.proj.weight)


def _images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, *shape),)


def _separable(self: Any, x: Tensor) -> Tensor:
    return F.hardswish(self.point(self.depth(x))) * F.hardsigmoid(self.gate(x.mean((2, 3), True)))


def _residual(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.norm(self.conv(x)) + x)


def _plain(self: Any, x: Tensor) -> Tensor:
    return self.linear(x.flatten(1))


ZOO = (
    ZooCase(
        "lenet",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(24, 3)),
        ),
        _images(1, 12, 12),
    ),
    ZooCase(
        "residual",
        lambda: Calls(
            _residual, conv=nn.Conv2d(4, 4, 3, padding=1, bias=False), norm=nn.BatchNorm2d(4, 1e-3)
        ),
        _images(4, 5, 5),
    ),
    ZooCase(
        "branches",
        lambda: Calls(_branches, left=nn.Conv2d(3, 2, 1), right=nn.Conv2d(3, 4, 3, padding="same")),
        _images(3, 6, 5),
    ),
    ZooCase(
        "separable",
        lambda: Calls(
            _separable,
            depth=nn.Conv2d(4, 8, (3, 2), stride=(2, 1), groups=4, dilation=(1, 2)),
            point=nn.Conv2d(8, 6, 1),
            gate=nn.Conv2d(4, 6, 1),
        ),
        _images(4, 7, 6),
    ),
    ZooCase(
        "padding modes",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect", stride=3),
            nn.Conv2d(3, 3, (1, 3), padding=(0, 1), padding_mode="circular", groups=3),
            nn.Conv2d(3, 2, 2, padding="same", padding_mode="replicate", dilation=2),
        ),
        _images(2, 9, 7),
    ),
    ZooCase(
        "conv1d",
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 6, 3, stride=2, groups=3), nn.BatchNorm1d(6), nn.ELU()),
            *(nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, groups=2), nn.GroupNorm(2, 4)),
        ),
        _images(3, 11),
    ),
    ZooCase(
        "conv3d",
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 4, (1, 3, 2), padding=1), nn.InstanceNorm3d(4, affine=True), nn.SiLU()),
            nn.ConvTranspose3d(4, 2, 2, stride=(1, 2, 2), dilation=(2, 1, 1)),
        ),
        _images(2, 3, 5, 4),
    ),
    ZooCase(
        "unet",
        lambda: Calls(
            _unet,
            down=nn.Conv2d(3, 4, 3, stride=2, padding=1),
            up=nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=2),
            last=nn.Conv2d(7, 1, 1),
        ),
        _images(3, 6, 7),
    ),
    ZooCase(
        "in-place alias", lambda: Calls(_in_place_alias, conv=nn.Conv2d(1, 2, 3)), _images(1, 5, 5)
    ),
    ZooCase(
        "changed between reads",
        lambda: Calls(_changed_between_reads, first=nn.Linear(4, 4), second=nn.Linear(4, 3)),
        _images(4),
    ),
    ZooCase("module twice", lambda: Calls(_twice, layer=nn.Linear(4, 4)), _images(4)),
    ZooCase("products", lambda: Calls(_products, proj=nn.Linear(6, 3, bias=False)), _images(5, 6)),
    ZooCase("functionals", Functionals, _images(1, 7, 7)),
    ZooCase("sdpa", lambda: Calls(_sdpa, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8)), _images(5, 8)),
    ZooCase("attention", lambda: SelfAttention(need_weights=False), _images(5, 8)),
    ZooCase(
        "attention with weights",
        lambda: SelfAttention(need_weights=True, batch_first=False),
        lambda: (torch.randn(5, 2, 8),),
        batch_axis=1,
    ),
    ZooCase(
        "cross attention",
        CrossAttention,
        lambda: (
            *(torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)),
            torch.arange(5).expand(2, 5) > 3,
        ),
    ),
    ZooCase(
        "transformer layer",
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        _images(4, 8),
    ),
    ZooCase("tied", TiedLanguageModel, lambda: (torch.randint(11, (2, 4)),)),
    ZooCase("two inputs", TwoInputs, lambda: (torch.randn(2, 6), torch.randn(2, 4))),
    ZooCase(
        "drop path",
        lambda: nn.Sequential(nn.Linear(5, 5), DropPath(), nn.Linear(5, 2)),
        _images(5),
    ),
    ZooCase("auxiliary", Auxiliary, _images(6)),
    ZooCase(
        "loop on shape", lambda: Calls(_loop_on_shape, cell=nn.Linear(3, 4)), _images(4, 3), True
    ),
    ZooCase(
        "recurrent",
        lambda: Calls(
            lambda self, x: self.head(self.cell(x)[0][:, -1]),
            cell=nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3),
            head=nn.Linear(8, 2),
        ),
        _images(5, 3),
    ),
    ZooCase(
        "recurrent with state",
        Recurrent,
        lambda: (torch.randn(2, 5, 3), torch.randn(2, 2, 4).tanh()),
    ),
    ZooCase(
        "recurrent relu",
        lambda: Calls(
            lambda self, x: self.cell(x)[0].sum(0),
            cell=nn.RNN(3, 4, num_layers=2, nonlinearity="relu", bias=False),
        ),
        lambda: (torch.randn(5, 2, 3),),
        batch_axis=1,
    ),
    ZooCase(
        "recurrent twice",
        lambda: Calls(_recurrent_twice, cell=nn.LSTM(4, 4, batch_first=True, bias=False)),
        _images(5, 4),
    ),
    ZooCase(
        "recurrent cells",
        lambda: Calls(_cells, lstm=nn.LSTMCell(3, 4), gru=nn.GRUCell(4, 5, bias=False)),
        _images(2, 3),
        needs_inputs=True,
    ),
    ZooCase(
        "bilinear",
        lambda: Calls(lambda self, x: self.form(x, x.tanh()), form=nn.Bilinear(3, 3, 4)),
        _images(3),
    ),
    ZooCase(
        "frozen part",
        lambda: Calls(_frozen_part, first=nn.Linear(4, 4), second=nn.Linear(4, 4)),
        _images(4),
    ),
    ZooCase(
        "other products",
        lambda: Calls(_other_products, proj=nn.Linear(4, 3, bias=False)),
        _images(5, 4),
    ),
    ZooCase("no parameters", lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), _images(2, 2)),
    ZooCase("plain", lambda: Calls(_plain, linear=nn.Linear(6, 2, bias=False)), _images(2, 3)),
)


def case(name: str) -> ZooCase:
    """Return the case called `name`."""
    return next(item for item in ZOO if item.id == name)
