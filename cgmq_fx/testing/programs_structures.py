"""Blocks: how layers are joined, shared and reused."""

from hypothesis import strategies as st

from cgmq_fx.testing.blocks import block, is_any, is_tokens, project, projection
from cgmq_fx.testing.program import Program, Value

_MOST_CHANNELS = 8


def _is_narrow(value: Value) -> bool:
    return value.channels * 2 <= _MOST_CHANNELS


def _is_even(value: Value) -> bool:
    return value.channels % 2 == 0


def branch(draw: st.DrawFn, program: Program, value: Value, most: int = 2) -> Value:
    """Add layers that keep the shape; some of them with an activation."""
    for _ in range(draw(st.integers(1, most))):
        value = project(draw, program, value)
        if draw(st.booleans()):
            value = program.assign(f"F.relu({value.name})", value)
    return value


@block(is_any, "residual")
def residual(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A sum with a skip connection, maybe in place."""
    found = branch(draw, program, value)
    texts = ["{0} + {1}", "{1} + {0}", "torch.add({0}, {1})"]
    if "constants" in program.allowed:
        texts.append("torch.add({0}, {1}, alpha=0.5)")
    # A ReLU keeps its output for the backward, where it must not have changed.
    if "in_place" in program.allowed and "relu" not in program.lines[-1]:
        texts.append("{0}.add_({1}).relu_()")
    text = draw(st.sampled_from(texts))
    if "_(" in text:
        program.add("in_place")
    elif "alpha" in text:
        program.add("constants")
    return program.assign(text.format(found.name, value.name), found)


@block(is_any, "branching", "concat gate")
def branching(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Two branches of unequal depth, joined by a sum, a product or a concatenation."""
    left = project(draw, program, value)
    right = branch(draw, program, project(draw, program, value), most=1)
    if _is_narrow(value) and program.flag(draw, "concat"):
        joined = f"torch.cat(({left.name}, {right.name}), {value.axis})"
        return program.assign(joined, value.with_channels(2 * value.channels))
    if program.flag(draw, "gate"):
        return program.assign(f"{left.name} * torch.sigmoid({right.name})", left)
    return program.assign(f"{left.name} + {right.name}", left)


@block(_is_narrow, "concat")
def concat(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A concatenation with the input, as dense nets have it."""
    found = project(draw, program, value)
    axis = draw(st.sampled_from((f"{value.axis}", f"dim={value.axis}")))
    joined = f"torch.cat([{found.name}, {value.name}], {axis})"
    return program.assign(joined, value.with_channels(2 * value.channels))


@block(is_any, "gate")
def gate(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A product with a function of the input; for images maybe of its mean, squeeze and excite."""
    if value.kind == "image" and draw(st.booleans()):
        axes = tuple(range(2, len(value.shape)))
        small = program.assign(f"{value.name}.mean({axes}, keepdim=True)", _squeezed(value))
        found = project(draw, program, small)
    else:
        found = project(draw, program, value)
    curve = draw(st.sampled_from(("torch.sigmoid", "F.hardsigmoid", "torch.tanh")))
    return program.assign(f"{value.name} * {curve}({found.name})", value)


def _squeezed(value: Value) -> Value:
    return Value(value.name, "image", (*value.shape[:2], *(1 for _ in value.shape[2:])))


@block(_is_even, "chunk concat")
def chunk(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A split along the channels, joined the other way round or by a product."""
    found = project(draw, program, value)
    first, second = program.name("part"), program.name("part")
    texts = ("{0}.chunk(2, {1})", "torch.chunk({0}, chunks=2, dim={1})", "{0}.split({2}, {1})")
    text = draw(st.sampled_from(texts)).format(found.name, value.axis, value.channels // 2)
    program.statement(f"{first}, {second} = {text}")
    return program.assign(f"torch.cat(({second}, {first}.tanh()), dim={value.axis})", value)


@block(is_any, "reused")
def reused(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A module called on its own output."""
    layer = projection(draw, program, value)
    once = program.assign(f"{layer}({value.name})", value)
    between = draw(st.sampled_from(("{0}", "torch.tanh({0})", "{0} - {1}")))
    return program.assign(f"{layer}({between.format(once.name, value.name)})", value)


@block(lambda value: value.kind != "flat", "reused reused_shapes")
def reused_shapes(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A module called with two shapes."""
    layer = projection(draw, program, value)
    first = program.assign(f"{layer}({value.name})", value)
    part = f"{value.name}[:, :, :2]" if value.kind == "image" else f"{value.name}[:, :2]"
    second = program.assign(f"{layer}({part})", value)
    axes = tuple(range(2, len(value.shape))) if value.kind == "image" else 1
    return program.assign(f"{first.name} + {second.name}.mean({axes}, keepdim=True)", value)


@block(is_any, "tied")
def tied(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Two layers of the same shape that share a weight."""
    first = projection(draw, program, value)
    kind = program.layers[-1].partition(" = ")[2]
    second = program.layer(first.removeprefix("self.").rstrip("0123456789"), kind)
    program.layers.append(f"{second}.weight = {first}.weight")
    once = program.assign(f"torch.tanh({first}({value.name}))", value)
    return program.assign(f"{second}({once.name})", value)


@block(is_any, "dead_code")
def dead_code(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A layer whose output nobody reads."""
    project(draw, program, value)
    return value


@block(is_any, "unused_parameter")
def unused_parameter(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A parameter and a layer that the forward does not mention."""
    program.layer("unused", "nn.Parameter(torch.randn(2))")
    return value


@block(is_any, "nested_module")
def nested_module(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Layers inside containers."""
    layer = projection(draw, program, value)
    kind = program.layers.pop().partition(" = ")[2]
    stages = draw(st.sampled_from((f"{kind}, nn.ReLU()", f"nn.Tanh(), nn.Sequential({kind})")))
    body = program.layer("body", f"nn.Sequential({stages})")
    assert layer
    return program.assign(f"{body}({value.name})", value)


@block(lambda value: value.kind != "image", "linear")
def dense(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A layer across the channels that changes their number."""
    return project(draw, program, value, draw(st.sampled_from((4, 6, 2))))


@block(is_tokens, "matmul")
def products(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Products of two activations; maybe two with one right operand, as one key for all heads."""
    name = value.name
    if draw(st.booleans()):
        key = program.assign(f"{name}.transpose(1, 2)", value).name
        left = program.assign(f"torch.matmul({name}, {key})", value).name
        right = program.assign(f"torch.matmul({name}.tanh(), {key})", value).name
        return program.assign(f"torch.tanh({left} - {right}) @ {name}", value)
    scores = f"torch.matmul({name}, {name}.transpose(1, 2))"
    weights = program.assign(f"torch.softmax({scores} * 0.3, dim=-1)", value)
    texts = ("{0} @ {1}", "torch.bmm({0}, {1})", "torch.baddbmm({1}, {0}, {1})")
    return program.assign(draw(st.sampled_from(texts)).format(weights.name, name), value)


@block(is_any, "einsum")
def einsum(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Products in Einstein's notation, of two activations or of one and a parameter."""
    if value.kind == "tokens" and draw(st.booleans()):
        scores = f'torch.einsum("bic,bjc->bij", {value.name}, {value.name})'
        weights = program.assign(f"torch.tanh({scores} * 0.3)", value)
        return program.assign(f'torch.einsum("bij,bjc->bic", {weights.name}, {value.name})', value)
    size = f"{value.channels}, {value.channels}"
    weight = program.layer("weight", f"nn.Parameter(torch.randn({size}) * 0.4)")
    equation = "bc...,cd->bd..." if value.kind == "image" else "...c,cd->...d"
    return program.assign(f'torch.einsum("{equation}", {value.name}, {weight})', value)


@block(lambda value: value.kind != "image", "bilinear")
def bilinear(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A layer of two inputs."""
    layer = program.layer("form", f"nn.Bilinear({value.channels}, {value.channels}, 4)")
    return program.assign(f"{layer}({value.name}, {value.name}.tanh())", value.with_channels(4))
