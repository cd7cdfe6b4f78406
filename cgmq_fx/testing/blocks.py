"""Blocks: what a program can be made of."""

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import strategies as st

from cgmq_fx.testing.program import Program, Value

Write = Callable[[st.DrawFn, Program, Value], Value]


@dataclass(frozen=True)
class Block:
    """A piece of a program.

    Attributes:
        name: what it is called.
        write: adds it to a program, after a value, and returns the new one.
        fits: tells whether it can come after a value.
        traits: what it always brings.
        options: what it may bring.
        needs: what must be allowed for it, though it does not bring it itself.
    """

    name: str
    write: Write
    fits: Callable[[Value], bool]
    traits: frozenset[str]
    options: frozenset[str]
    needs: frozenset[str]

    def __call__(self, draw: st.DrawFn, program: Program, value: Value) -> Value:
        """Add the block to a program after `value`; return what it makes of it."""
        program.add(*self.traits)
        return self.write(draw, program, value)

    def provides(self, trait: str) -> bool:
        """Tell whether it can bring a trait."""
        return trait in self.traits or trait in self.options

    def is_usable(self, program: Program, value: Value) -> bool:
        """Tell whether it can come after a value."""
        return self.traits | self.needs <= program.allowed and self.fits(value)


def block(
    fits: Callable[[Value], bool], traits: str = "", options: str = "", needs: str = ""
) -> Callable[[Write], Block]:
    """Make a block of a function, under its own name; traits are given as words."""

    def make(write: Write) -> Block:
        found = [frozenset(text.split()) for text in (traits, options, needs)]
        return Block(write.__name__, write, fits, *found)

    return make


def is_image(value: Value) -> bool:
    """Tell whether a value has spatial axes."""
    return value.kind == "image"


def is_tokens(value: Value) -> bool:
    """Tell whether a value is a sequence."""
    return value.kind == "tokens"


def is_any(value: Value) -> bool:
    """Accept every value."""
    return True


def divisors(*numbers: int) -> list[int]:
    """Return what divides all of some numbers, rising."""
    return [n for n in range(1, min(numbers) + 1) if all(m % n == 0 for m in numbers)]


def project(draw: st.DrawFn, program: Program, value: Value, channels: int = 0) -> Value:
    """Add a layer that changes nothing but the number of channels; 0 keeps it.

    A convolution for an image, a linear layer for other kinds.
    """
    layer = projection(draw, program, value, channels)
    return program.assign(f"{layer}({value.name})", value.with_channels(channels or value.channels))


def projection(draw: st.DrawFn, program: Program, value: Value, channels: int = 0) -> str:
    """Add the layer of `project`, and return the expression that reads it, without calling it."""
    sizes = f"{value.channels}, {channels or value.channels}"
    if value.kind != "image":
        program.add("linear")
        return program.layer("linear", f"nn.Linear({sizes})")
    program.add("conv", f"{value.dims}d")
    kernel = draw(st.sampled_from((1, 3)))
    padding = f", padding={kernel // 2}" if kernel > 1 else ""
    return program.layer("conv", f"nn.Conv{value.dims}d({sizes}, {kernel}{padding})")
