"""Hypothesis strategies for small random models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_DROPOUT = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_FLOAT_FUNCTIONS = (
    *(torch.relu, F.gelu, F.hardswish, torch.sigmoid, lambda x: x.tanh(), lambda x: -x.abs()),
    *(lambda x: F.leaky_relu(x, 0.1), lambda x: x * 2 - 1, lambda x: 1 / (1 + x * x)),
)


@dataclass(frozen=True)
class Drawn:
    """A drawn model; `build` makes it and its inputs anew, alike at every call.

    Attributes:
        text: what was drawn, for a failing test.
        make: makes the model.
        inputs: makes the arguments of its forward; two samples.
    """

    text: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """Return a model in training mode and inputs."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return self.make(), self.inputs()

    def __repr__(self) -> str:
        """Return what was drawn."""
        return f"Drawn({self.text})"


class Stage(nn.Module):
    """A function of layers and a tensor."""

    def __init__(self, run: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> Any:
        """Return ``run(*layers, *inputs)``."""
        return self.run(*self.layers, *inputs)


class Chain(nn.Module):
    """Stages one after the other, then a head that sees all inputs of the model."""

    def __init__(self, stages: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages, self.head = nn.Sequential(*stages), head

    def forward(self, x: Tensor, other: Tensor) -> Any:
        """Return what the head makes of the last stage and the second input."""
        return self.head(self.stages(x), other)


@dataclass(frozen=True)
class _Maker:
    """Makes one stage; `channels` is what it hands on, from what it gets."""

    text: str
    make: Callable[[], nn.Module]
    channels: int


@st.composite
def _divisors(draw: st.DrawFn, *numbers: int) -> int:
    common = [n for n in range(1, min(numbers) + 1) if all(m % n == 0 for m in numbers)]
    return draw(st.sampled_from(common))


@st.composite
def _convolutions(draw: st.DrawFn, dims: int, channels: int) -> _Maker:
    out = draw(st.sampled_from((2, 4, 6)))
    kernel, stride, dilation = (draw(st.integers(1, most)) for most in (3, 2, 2))
    symmetric = (kernel - 1) * dilation % 2 == 0  # torch warns where it pads unevenly
    options = {
        "stride": stride,
        "dilation": dilation,
        "groups": draw(_divisors(channels, out)),
        "bias": draw(st.booleans()),
        "padding": draw(st.sampled_from(("same", 2) if stride == 1 and symmetric else (2,))),
        "padding_mode": draw(st.sampled_from(("zeros", "replicate", "circular"))),
    }
    text = f"Conv{dims}d({channels}, {out}, {kernel}, {options})"
    return _Maker(text, lambda: _CONV[dims](channels, out, kernel, **options), out)


@st.composite
def _transposed(draw: st.DrawFn, dims: int, channels: int) -> _Maker:
    out = draw(st.sampled_from((2, 4)))
    stride = draw(st.integers(1, 2 if dims < 3 else 1))
    options = {
        "stride": stride,
        "groups": draw(_divisors(channels, out)),
        "dilation": draw(st.integers(1, 2)),
        "output_padding": draw(st.integers(0, stride - 1)),
    }
    kernel = draw(st.integers(1, 3))
    text = f"ConvTranspose{dims}d({channels}, {out}, {kernel}, {options})"
    return _Maker(text, lambda: _TRANSPOSED[dims](channels, out, kernel, **options), out)


@st.composite
def _normalizations(draw: st.DrawFn, dims: int, channels: int) -> _Maker:
    eps, affine = draw(st.sampled_from((1e-5, 1e-2))), draw(st.booleans())
    makers = {
        "batch": lambda: _BATCH_NORM[dims](channels, eps, momentum=0.3, affine=affine),
        "group": lambda: nn.GroupNorm(2, channels, eps, affine=affine),
        "dropout": lambda: _DROPOUT[dims](0.3),
        "drop": lambda: nn.Dropout(0.25, inplace=affine),
    }
    kind = draw(st.sampled_from(sorted(makers)))
    return _Maker(f"{kind}({eps}, {affine})", makers[kind], channels)


@st.composite
def _elementwise(draw: st.DrawFn, dims: int, channels: int) -> _Maker:
    index = draw(st.integers(0, len(_FLOAT_FUNCTIONS) - 1))
    function = _FLOAT_FUNCTIONS[index]
    return _Maker(f"function {index}", lambda: Stage(function), channels)


def _add_in_place(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    kept = y
    y += 0.5
    y = F.relu(y, inplace=True)
    return torch.cat((kept, y), 1)


def _changed_between_reads(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    y = first(x)
    view = y.view_as(y)
    before = second(view)
    y.mul_(0.5)
    return before - second(view)


def _twice(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(layer(x) - x)


@st.composite
def _composites(draw: st.DrawFn, dims: int, channels: int) -> _Maker:
    conv = _CONV[dims]

    def same(out: int = channels, groups: int = 1) -> nn.Module:
        return conv(channels, out, 3, padding=1, groups=groups)

    depthwise = lambda: nn.Sequential(same(groups=channels), conv(channels, channels, 1))  # noqa: E731
    makers = {
        "residual": (lambda: Stage(lambda f, x: x + f(x), same()), 1),
        "residual in place": (lambda: Stage(lambda f, x: f(x).add_(x).relu_(), same()), 1),
        "concat": (lambda: Stage(lambda f, x: torch.cat([f(x), x], 1), same()), 2),
        "gate": (lambda: Stage(lambda f, x: x * torch.sigmoid(f(x)), same()), 1),
        "depthwise": (depthwise, 1),
        "twice": (lambda: Stage(_twice, same()), 1),
        "changed between reads": (lambda: Stage(_changed_between_reads, same(), same()), 1),
        "in place": (lambda: Stage(_add_in_place, same()), 2),
        "chunk": (
            lambda: Stage(lambda f, x: torch.cat(f(x).chunk(2, 1)[::-1], 1), same(2 * channels)),
            2,
        ),
    }
    kind = draw(st.sampled_from(sorted(makers)))
    make, factor = makers[kind]
    return _Maker(kind, make, channels * factor)


def _pooled(dims: int, channels: int) -> st.SearchStrategy[_Maker]:
    return st.sampled_from(
        (
            _Maker("max_pool", lambda: Stage(lambda x: _MAX_POOL[dims](x, 2, 1)), channels),
            _Maker("avg_pool", lambda: _avg_pool(dims), channels),
        )
    )


def _avg_pool(dims: int) -> nn.Module:
    if dims < 3:
        return _AVG_POOL[dims](3, stride=1, padding=1)
    # In three dimensions torch refuses a kernel larger than the input without its padding.
    return nn.Sequential(nn.ZeroPad3d(1), nn.AvgPool3d(3, stride=1))


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2)[..., :12].transpose(1, 2)


def _self_attention(norm: nn.Module, attention: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    y = norm(_tokens(x))
    return y + attention(y, y, y, need_weights=False)[0]


def _scaled_attention(project: nn.Module, x: Tensor, other: Tensor) -> dict[str, Tensor]:
    q, k, v = project(_tokens(x)).chunk(3, -1)
    return {"out": F.scaled_dot_product_attention(q, k, v), "query": q}


def _scores(project: nn.Module, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    y = project(_tokens(x))
    scores = torch.einsum("bic,bjc->bij", y, y)
    return scores.softmax(-1) @ y, torch.bmm(scores, y)


def _classifier(left: nn.Module, right: nn.Module, x: Tensor, other: Tensor) -> dict[str, Any]:
    pooled = left(x.flatten(2).mean(-1))
    second = right(other)
    return {"logits": pooled + second, "parts": [pooled, {"second": second}]}


def _functional(weight: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    return F.linear(x.flatten(2).amax(-1), weight.weight * 0.5) * other


def _heads(channels: int) -> dict[str, Callable[[], nn.Module]]:
    return {
        "plain": lambda: Stage(lambda x, other: x),
        "classifier": lambda: Stage(_classifier, nn.Linear(channels, 3), nn.Linear(5, 3)),
        "attention": lambda: Stage(
            _self_attention,
            nn.LayerNorm(channels),
            nn.MultiheadAttention(channels, 2, dropout=0.1, batch_first=True),
        ),
        "scaled attention": lambda: Stage(_scaled_attention, nn.Linear(channels, 3 * channels)),
        "scores": lambda: Stage(_scores, nn.Linear(channels, 4, bias=False)),
        "functional": lambda: Stage(_functional, nn.Linear(channels, 5, bias=False)),
    }


@st.composite
def convolutional_models(draw: st.DrawFn) -> Drawn:
    """Chains of one- to three-dimensional stages with a head; all channel counts are even."""
    dims = draw(st.sampled_from((1, 2, 2, 3)))
    channels = first = draw(st.sampled_from((2, 4)))
    makers: list[_Maker] = []
    kinds = (_convolutions, _transposed, _normalizations, _elementwise, _composites, _pooled)
    for _ in range(draw(st.integers(1, 4))):
        wide = channels > 8
        kind = draw(st.sampled_from((_convolutions,) if wide else kinds))
        makers.append(draw(kind(dims, channels)))
        channels = makers[-1].channels
    last = channels
    head = draw(st.sampled_from(sorted(_heads(last))))
    shape = (2, first, *draw(st.tuples(*[st.integers(4, 6)] * dims)))
    text = f"{shape}: {[maker.text for maker in makers]} -> {head}"
    return Drawn(
        text,
        lambda: Chain([maker.make() for maker in makers], _heads(last)[head]()),
        lambda: (torch.randn(shape), torch.randn(2, 5)),
    )


class LanguageModel(nn.Module):
    """Embedding, mixing layers, and an output layer that may have the embedding's weight."""

    def __init__(self, *, tied: bool, layers: int, width: int, shared: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, width, padding_idx=0)
        first = nn.Linear(width, width)
        self.mix = nn.ModuleList(
            first if shared else nn.Linear(width, width) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 9, bias=not tied)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, ``(batch, length, 9)``."""
        x = self.embed(tokens)
        for layer in self.mix:
            x = x + F.dropout(F.silu(layer(self.norm(x))), 0.1, self.training)
        return self.out(x)


@st.composite
def language_models(draw: st.DrawFn) -> Drawn:
    """Models of tokens, with tied weights and one layer used several times."""
    options = draw(
        st.fixed_dictionaries(
            {
                "tied": st.booleans(),
                "layers": st.integers(1, 3),
                "width": st.sampled_from((4, 6)),
                "shared": st.booleans(),
            }
        )
    )
    return Drawn(
        f"language model {options}",
        lambda: LanguageModel(**options),
        lambda: (torch.randint(9, (2, 5)),),
    )


def models() -> st.SearchStrategy[Drawn]:
    """Any of the models above."""
    return st.one_of(convolutional_models(), convolutional_models(), language_models())
