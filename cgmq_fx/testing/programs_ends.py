"""How a program begins, with inputs, and ends, with outputs."""

from collections.abc import Callable, Sequence

from hypothesis import strategies as st

from cgmq_fx.errors import UsageError
from cgmq_fx.testing.blocks import project
from cgmq_fx.testing.program import BATCH, Program, Value
from cgmq_fx.testing.programs_attention import embedded

_LENGTHS = (5, 4, 7)
_EXTENTS = {1: (8, 9, 7), 2: (6, 5, 7), 3: (4, 5)}
# How rare another input is.
_ONE_IN = 6
_NAMEDTUPLE = "class Output(NamedTuple):\n    first: torch.Tensor\n    second: torch.Tensor"
_DATACLASS = "@dataclass\nclass Output:\n    first: torch.Tensor\n    second: torch.Tensor"


def _image(dims: int) -> Callable[[st.DrawFn, Program], Value]:
    def write(draw: st.DrawFn, program: Program) -> Value:
        program.add(f"{dims}d")
        channels = draw(st.sampled_from((2, 4)))
        extents = [draw(st.sampled_from(_EXTENTS[dims])) for _ in range(dims)]
        return _given(program, Value("x", "image", (BATCH, channels, *extents)))

    return write


def _tokens(draw: st.DrawFn, program: Program) -> Value:
    length, channels = draw(st.sampled_from(_LENGTHS)), draw(st.sampled_from((4, 6)))
    return _given(program, Value("x", "tokens", (BATCH, length, channels)))


def _flat(draw: st.DrawFn, program: Program) -> Value:
    return _given(program, Value("x", "flat", (BATCH, draw(st.sampled_from((4, 6))))))


def _given(program: Program, value: Value) -> Value:
    program.parameters.append(value.name)
    program.inputs.append(f"torch.randn{value.shape}")
    return value


def _integers(draw: st.DrawFn, program: Program) -> Value:
    program.add("integer_input")
    length = draw(st.sampled_from(_LENGTHS))
    program.parameters.append("tokens")
    program.inputs.append(f"torch.randint(9, ({BATCH}, {length}))")
    return embedded(draw, program, "tokens", length)


# What a program can begin with: the kind of its first value, what must be allowed, and the writer.
_BEGINNINGS: Sequence[tuple[str, frozenset[str], Callable[[st.DrawFn, Program], Value]]] = (
    ("image", frozenset({"conv", "2d"}), _image(2)),
    ("flat", frozenset({"linear"}), _flat),
    ("image", frozenset({"conv", "1d"}), _image(1)),
    ("tokens", frozenset({"linear"}), _tokens),
    ("tokens", frozenset({"linear", "integer_input", "embedding"}), _integers),
    ("image", frozenset({"conv", "3d"}), _image(3)),
)


def begin(draw: st.DrawFn, program: Program, kinds: frozenset[str]) -> Value:
    """Add the inputs; return the first value, of one of some kinds."""
    found = [
        (needs, write)
        for kind, needs, write in _BEGINNINGS
        if kind in kinds and needs <= program.allowed
    ]
    for trait in sorted(program.wanted & {"1d", "2d", "3d", "integer_input", "embedding"}):
        found = [item for item in found if trait in item[0]] or found
    if not found:
        raise UsageError(
            f"there is nothing to begin a model with in {sorted(program.allowed)}; allow 'linear', "
            f"or 'conv' and one of '1d', '2d', '3d'"
        )
    value = draw(st.sampled_from(found))[1](draw, program)
    return _more_inputs(draw, program, value)


def _more_inputs(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Maybe add inputs of the first value's shape, given by place, by keyword or not at all."""
    if program.flag(draw, "two_inputs", _ONE_IN):
        program.parameters.append("other")
        program.inputs.append(f"torch.randn{value.shape}")
        text = draw(st.sampled_from(("{0} + other", "{0} * torch.sigmoid(other)", "other - {0}")))
        value = program.assign(text.format(value.name), value)
    if program.flag(draw, "default_input", _ONE_IN):
        default = draw(st.sampled_from((0.5, 2.0)))
        program.parameters.append(f"scale={default}")
        value = program.assign(f"{value.name} * scale", value)
    if program.flag(draw, "keyword_input", _ONE_IN):
        program.parameters.append("shift=None")
        program.kwargs.append(f"shift=torch.randn{value.shape}")
        value = program.assign(f"{value.name} + shift", value)
    return value


def end(draw: st.DrawFn, program: Program, value: Value) -> str:
    """Return the expression that the forward returns, maybe with a second output."""
    kinds = ("tuple", "dict", "nested", "namedtuple", "dataclass")
    wanted = [kind for kind in kinds if f"{kind}_output" in program.wanted]
    allowed = [kind for kind in kinds if f"{kind}_output" in program.allowed]
    kind = draw(st.sampled_from(wanted or [*[""] * len(allowed), "", *allowed]))
    if not kind:
        return value.name
    program.add(f"{kind}_output")
    return _structured(draw, program, kind, value.name, project(draw, program, value).name)


def _structured(draw: st.DrawFn, program: Program, kind: str, first: str, second: str) -> str:
    if kind == "tuple":
        return f"({first}, {second})"
    if kind == "dict":
        return f'{{"first": {first}, "second": {second}}}'
    if kind == "nested":
        return _nested(draw, program, first, second)
    program.definitions.append(_NAMEDTUPLE if kind == "namedtuple" else _DATACLASS)
    return f"Output({first}, second={second})"


def _nested(draw: st.DrawFn, program: Program, first: str, second: str) -> str:
    texts = ["[{0}, ({1}, [{0}])]"]
    if "dict_output" in program.allowed:
        texts += ['{{"out": {0}, "parts": ({0}, [{1}])}}', '[{0}, {{"second": {1}}}]']
    text = draw(st.sampled_from(texts))
    if "{{" in text:
        program.add("dict_output")
    return text.format(first, second)
