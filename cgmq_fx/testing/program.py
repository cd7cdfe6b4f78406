"""A program under construction: the Python source of a module, written line by line.

Blocks (the files ``programs_*.py``) add layers and lines to it; `Program.source` is a script.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from hypothesis import strategies as st

#: Samples in every batch; odd, and no other extent is drawn equal to it by design.
BATCH = 3

# What surely has parameters.
_LEARNING = ("nn.Conv", "nn.Linear", "nn.Embedding", "nn.MultiheadAttention", "nn.Parameter")
_WORD = re.compile(r"[A-Za-z_][\w.]*")

Kind = Literal["image", "tokens", "flat"]


@dataclass(frozen=True)
class Value:
    """A tensor of the program.

    Attributes:
        name: the expression that reads it.
        kind: ``image``: (batch, channels, extent, ...); ``tokens``: (batch, length, channels);
            ``flat``: (batch, channels).
        shape: its shape, with the batch.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        return 1 if self.kind == "image" else len(self.shape) - 1

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return self.shape[self.axis]

    @property
    def dims(self) -> int:
        """How many spatial axes an image has; 0 for other kinds."""
        return len(self.shape) - 2 if self.kind == "image" else 0

    def with_channels(self, channels: int) -> "Value":
        """Return the same with another number of channels."""
        shape = list(self.shape)
        shape[self.axis] = channels
        return replace(self, shape=tuple(shape))


@dataclass
class Program:
    """The layers, lines and inputs of a module, and what may still come.

    Attributes:
        allowed: traits that the program may have.
        wanted: traits that it must have and does not have yet.
        traits: traits that it has.
    """

    allowed: frozenset[str]
    wanted: set[str] = field(default_factory=set)
    traits: set[str] = field(default_factory=set)
    layers: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    definitions: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    kwargs: list[str] = field(default_factory=list)
    seed: int = 0
    _names: dict[str, int] = field(default_factory=dict)

    def name(self, stem: str) -> str:
        """Return a name that is not in use: the stem, or the stem and a number."""
        self._names[stem] = self._names.get(stem, 0) + 1
        return f"{stem}{self._names[stem]}"

    def add(self, *traits: str) -> None:
        """Note that the program has these traits."""
        self.traits.update(traits)
        self.wanted.difference_update(traits)

    def flag(self, draw: st.DrawFn, trait: str, one_in: int = 2) -> bool:
        """Draw whether to use an option that is a trait; certainly where it is wanted."""
        if trait not in self.allowed:
            return False
        if trait in self.wanted or draw(st.integers(1, one_in)) == one_in:
            self.add(trait)
            return True
        return False

    def layer(self, stem: str, expression: str) -> str:
        """Add an attribute to the module; return the expression that reads it."""
        name = self.name(stem)
        self.layers.append(f"self.{name} = {expression}")
        return f"self.{name}"

    def learns(self, value: Value) -> bool:
        """Tell whether a parameter has a part in a value."""
        halves = [line.partition(" = ") for line in self.layers]
        learning = {name for name, _, kind in halves if kind.startswith(_LEARNING)}
        needed = {value.name}
        for line in reversed(self.lines):
            target, _, expression = line.partition(" = ")
            if needed.isdisjoint(_WORD.findall(target)):
                continue
            words = set(_WORD.findall(expression))
            if not words.isdisjoint(learning):
                return True
            needed |= words
        return False

    def statement(self, line: str) -> None:
        """Add a line to the forward."""
        self.lines.append(line)

    def assign(self, expression: str, like: Value) -> Value:
        """Add a line that computes a value of the kind and shape of `like`; return it."""
        name = self.name("x")
        self.lines.append(f"{name} = {expression}")
        return replace(like, name=name)

    def source(self, result: str) -> str:
        """Return the script whose forward returns the expression `result`."""
        init = ["super().__init__()", *self.layers]
        forward = [*self.lines, f"return {result}"]
        parameters = ", ".join(["self", *self.parameters])
        return _SCRIPT.format(
            imports=_imports(self.definitions),
            definitions="".join(f"{text}\n\n\n" for text in self.definitions),
            init=_block(init, 8),
            parameters=parameters,
            forward=_block(forward, 8),
            seed=self.seed,
            inputs="".join(f"{item}, " for item in self.inputs).strip(),
            kwargs=_kwargs_function(self.seed, self.kwargs),
            call="model(*make_inputs(), **make_kwargs())"
            if self.kwargs
            else "model(*make_inputs())",
        )


def _imports(definitions: Iterable[str]) -> str:
    text = "\n".join(definitions)
    standard = []
    if "@dataclass" in text:
        standard.append("from dataclasses import dataclass")
    if "NamedTuple" in text:
        standard.append("from typing import NamedTuple")
    return "".join(f"{line}\n" for line in standard) + ("\n" if standard else "")


def _block(lines: Iterable[str], indent: int) -> str:
    return "\n".join(" " * indent + line for text in lines for line in text.splitlines())


def _kwargs_function(seed: int, kwargs: list[str]) -> str:
    if not kwargs:
        return ""
    items = ", ".join(kwargs)
    return f"def make_kwargs():\n    torch.manual_seed({seed + 1})\n    return dict({items})\n\n\n"


# No parameter or running statistic keeps the value it starts with: what is lost would not show.
_SCRIPT = """\
{imports}import torch
import torch.nn.functional as F
from torch import fx, nn


{definitions}class Model(nn.Module):
    def __init__(self):
{init}

    def forward({parameters}):
{forward}


def make_model():
    torch.manual_seed({seed})
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def make_inputs():
    torch.manual_seed({seed})
    return ({inputs})


{kwargs}if __name__ == "__main__":
    model = make_model()
    print({call})
    print(fx.symbolic_trace(model).code)
"""
