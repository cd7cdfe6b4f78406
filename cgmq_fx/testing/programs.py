"""Draw a program: a beginning, some blocks, and an end."""

from types import ModuleType

from hypothesis import strategies as st

from cgmq_fx.errors import UsageError
from cgmq_fx.testing import (
    programs_attention,
    programs_convolutions,
    programs_elementwise,
    programs_norms,
    programs_shapes,
    programs_structures,
)
from cgmq_fx.testing.blocks import Block, project
from cgmq_fx.testing.case import Case
from cgmq_fx.testing.program import BATCH, Kind, Program, Value
from cgmq_fx.testing.programs_ends import begin, end

_FILES = (
    programs_convolutions,
    programs_structures,
    programs_elementwise,
    programs_norms,
    programs_shapes,
    programs_attention,
)
# What a step draws from: convolutions and attention twice, as most is at stake there.
_FAMILIES = (*_FILES, programs_convolutions, programs_attention)
#: Every block by name, in the order in which they are preferred when a case shrinks.
BLOCKS = {
    found.name: found
    for file in _FILES
    for found in vars(file).values()
    if isinstance(found, Block)
}
# The order in which one program can have values of these kinds, and samples of them.
_CHAIN: tuple[Kind, ...] = ("image", "tokens", "flat")
_SAMPLES = (
    *(Value("", "image", (BATCH, 4, *[6 if dims < 3 else 4] * dims)) for dims in (1, 2, 3)),
    *(Value("", "tokens", (BATCH, 5, 4)), Value("", "flat", (BATCH, 4))),
)


@st.composite
def programs(draw: st.DrawFn, allowed: frozenset[str], require: frozenset[str], most: int) -> Case:
    """Draw a case with up to `most` blocks, or as many as `require` needs."""
    program = Program(allowed, wanted=set(require), seed=draw(st.integers(0, 999)))
    value = begin(draw, program, _first_kinds(program))
    value, used = _required(draw, program, value)
    for _ in range(draw(st.integers(min(1, most), most)) - used):
        value = draw(_step(program, value, list(BLOCKS.values())))
    if not program.learns(value):
        value = project(draw, program, value)
    result = end(draw, program, value)
    if program.wanted:
        raise _impossible(program)
    return Case(program.source(result), frozenset(program.traits))


@st.composite
def _step(draw: st.DrawFn, program: Program, value: Value, blocks: list[Block]) -> Value:
    """Draw a family and a block of it; one strategy, so that shrinking can leave it out."""
    usable = [found for found in blocks if found.is_usable(program, value)]
    families = [family for file in _FAMILIES if (family := _of_file(file, usable))]
    return draw(st.sampled_from(draw(st.sampled_from(families))))(draw, program, value)


def _of_file(file: ModuleType, blocks: list[Block]) -> list[Block]:
    return [found for found in blocks if vars(file).get(found.name) is found]


def _required(draw: st.DrawFn, program: Program, value: Value) -> tuple[Value, int]:
    """Add blocks until every wanted trait that a block can bring is there."""
    used = 0
    while blocks := _bringers(program):
        usable = [found for found in blocks if found.is_usable(program, value)]
        if usable and used < 2 * len(BLOCKS):
            value = draw(_step(program, value, usable))
        elif value.kind in _kinds_of(blocks) and used < 2 * len(BLOCKS):
            value = _restored(draw, program, value)
        else:
            value = _next_kind(draw, program, value)
        used += 1
    return value, used


def _bringers(program: Program) -> list[Block]:
    return [
        found
        for found in BLOCKS.values()
        if found.traits | found.needs <= program.allowed
        and any(found.provides(trait) for trait in program.wanted)
    ]


def _kinds_of(blocks: list[Block]) -> set[Kind]:
    return {value.kind for value in _SAMPLES for found in blocks if found.fits(value)}


def _first_kinds(program: Program) -> frozenset[Kind]:
    """Return the kinds with which a program can begin and still get every wanted trait."""
    latest = len(_CHAIN) - 1
    for trait in program.wanted:
        blocks = [found for found in _bringers(program) if found.provides(trait)]
        if blocks:
            latest = min(latest, max(_CHAIN.index(kind) for kind in _kinds_of(blocks)))
    return frozenset(_CHAIN[: latest + 1])


def _restored(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Return the value with extents and channels that every block of its kind can follow."""
    if value.kind == "image":
        extent = 6 if value.dims < 3 else 4
        like = Value("", "image", (*value.shape[:2], *[extent] * value.dims))
        value = program.assign(f"F.interpolate({value.name}, size={extent})", like)
    return project(draw, program, value, 4)


def _next_kind(draw: st.DrawFn, program: Program, value: Value) -> Value:
    found = BLOCKS["pooled_tokens" if value.kind == "tokens" else "to_tokens"]
    if not found.is_usable(program, value):
        raise _impossible(program)
    return found(draw, program, value)


def _impossible(program: Program) -> UsageError:
    return UsageError(
        f"no model can have the required traits {sorted(program.wanted)} with nothing but "
        f"{sorted(program.allowed)}; allow more, or require fewer at once"
    )
