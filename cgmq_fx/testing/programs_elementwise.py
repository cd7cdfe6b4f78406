"""Blocks: functions, methods, operators and in-place operations on one value."""

from hypothesis import strategies as st

from cgmq_fx.testing.blocks import block, is_any, project
from cgmq_fx.testing.program import Program, Value

_LAYERS = ("ReLU()", "GELU()", "Hardswish()", "LeakyReLU(0.1)", "SiLU()", "Sigmoid()", "ELU(0.5)")
_FUNCTIONS = (
    *("F.relu({})", "F.gelu({})", "torch.tanh({})", "F.hardswish({})", "torch.sigmoid({})"),
    *("F.silu({})", "torch.sin({})", "F.softplus({})"),
)
_METHODS = (
    "{}.relu()",
    "{}.tanh()",
    "{}.abs()",
    "{}.neg().add(1)",
    "{}.sigmoid()",
    "{}.exp().log1p()",
)
_OPERATORS = (
    *("{0} * 2 - 1", "1 / (1 + {0} * {0})", "1 - {0}", "-{0} + 1.25", "{0} ** 2 / 3"),
    *("2 * {0}", "abs({0}) + 0.1"),
)
_CONSTANTS = (
    *("F.leaky_relu({}, 0.1)", "F.leaky_relu({}, negative_slope=0.3)", "torch.clamp({}, -2, 2)"),
    *("torch.clamp({}, min=-0.5)", "torch.add({}, 1, alpha=0.5)", "F.elu({}, alpha=0.7)"),
    *("F.hardtanh({}, -1.5, max_val=2.5)", "F.gelu({}, approximate='tanh')"),
    *("F.softplus({}, beta=2)", "torch.roll({}, 1, dims=-1)", "torch.cumsum({}, dim=-1) * 0.5"),
)
# What keeps its result for the backward comes last: a change afterwards would be an error.
_IN_PLACE = (
    *("{0} += 0.5", "{0}.mul_(0.75)", "{0}[:, :1].mul_(2)", "{0} *= 1.5"),
    "{0}.add_(1, alpha=0.25)",
)
_IN_PLACE_LAST = ("F.leaky_relu({0}, 0.2, inplace=True)", "torch.sigmoid_({0})", "{0}.tanh_()")


def _one_of(draw: st.DrawFn, texts: tuple[str, ...], program: Program, value: Value) -> Value:
    return program.assign(draw(st.sampled_from(texts)).format(value.name), value)


@block(is_any, "activation")
def activation(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """An activation layer."""
    kind = draw(st.sampled_from(_LAYERS))
    return program.assign(f"{program.layer('act', f'nn.{kind}')}({value.name})", value)


@block(is_any, "function_call")
def function(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A function of torch."""
    return _one_of(draw, _FUNCTIONS, program, value)


@block(is_any, "method_call")
def method(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A method of the tensor."""
    return _one_of(draw, _METHODS, program, value)


@block(is_any, "operator")
def operator(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Operators with constants."""
    return _one_of(draw, _OPERATORS, program, value)


@block(is_any, "constants")
def constants(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A function with constants among its arguments."""
    return _one_of(draw, _CONSTANTS, program, value)


@block(is_any, "in_place", "dropout")
def in_place(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """In-place operations on the output of a layer, which is maybe read again."""
    found = project(draw, program, value)
    program.statement(draw(st.sampled_from(_IN_PLACE)).format(found.name))
    if program.flag(draw, "dropout", one_in=4):
        layer = program.layer("dropout", "nn.Dropout(0.25, inplace=True)")
        found = program.assign(f"{layer}({found.name})", found)
    if draw(st.booleans()):
        program.statement(draw(st.sampled_from(_IN_PLACE_LAST)).format(found.name))
    if draw(st.booleans()):
        return program.assign(f"{found.name} + {value.name}", found)
    return found


@block(is_any, "alias in_place")
def alias(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A view read before and after its tensor changes; who moves a read computes another thing."""
    found = project(draw, program, value)
    seen = program.assign(f"{found.name}.view_as({found.name})", found)
    # The layer keeps its input for the backward: that must be a copy, since the view will change.
    kept = program.assign(f"{seen.name}.clone()", seen)
    before = project(draw, program, kept)
    program.statement(f"{found.name}.mul_(0.5)")
    after = project(draw, program, seen)
    return program.assign(f"{before.name} - {after.name}", found)


@block(is_any, "buffer")
def buffer(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A buffer, in the state dict or not."""
    name = program.name("shift")
    shape = _broadcast(value)
    end = "" if draw(st.booleans()) else ", persistent=False"
    # Positive: after a ReLU, a factor below zero and another ReLU would leave nothing.
    program.layers.append(f"self.register_buffer({name!r}, torch.rand({shape}) + 0.5{end})")
    sign = draw(st.sampled_from("+*"))
    return program.assign(f"{value.name} {sign} self.{name}", value)


@block(is_any, "bare_parameter")
def bare_parameter(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A parameter of the module itself."""
    kind = f"nn.Parameter(torch.rand({_broadcast(value)}) + 0.5)"
    sign = draw(st.sampled_from("*+"))
    return program.assign(f"{value.name} {sign} {program.layer('scale', kind)}", value)


@block(is_any, "shape_operation")
def shape_operation(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Numbers that come from sizes."""
    texts = ("{0} / {0}.size(1)", "{0} * {0}.shape[-1] ** -0.5", "{0} + 0.1 * {0}.size(dim=-1)")
    return _one_of(draw, texts, program, value)


@block(is_any, "functional bare_parameter")
def functional(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A layer called as a function, with bare parameters."""
    out, ins = value.channels, value.channels
    bias = program.layer("bias", f"nn.Parameter(torch.randn({out}))")
    given = draw(st.sampled_from((f", {bias}", f", bias={bias}", f" * 0.5, {bias}")))
    if value.kind != "image":
        weight = program.layer("weight", f"nn.Parameter(torch.randn({out}, {ins}) * 0.4)")
        return program.assign(f"F.linear({value.name}, {weight}{given})", value)
    ones = ", ".join("1" * value.dims)
    weight = program.layer("weight", f"nn.Parameter(torch.randn({out}, {ins}, {ones}) * 0.4)")
    return program.assign(f"F.conv{value.dims}d({value.name}, {weight}{given})", value)


def _broadcast(value: Value) -> str:
    """Return the extents of a tensor of one number for each channel."""
    trailing = ", 1" * value.dims
    return f"{value.channels}{trailing}"
