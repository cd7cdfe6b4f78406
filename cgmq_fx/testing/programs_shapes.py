"""Blocks: pooling, and what turns images into sequences and vectors."""

import math

from hypothesis import strategies as st

from cgmq_fx.testing.blocks import block, is_image, is_tokens
from cgmq_fx.testing.program import BATCH, Program, Value

_MOST_FEATURES = 64


def _can_shrink(value: Value) -> bool:
    return is_image(value) and min(value.shape[2:]) >= 4


@block(_can_shrink, "pooling")
def pooling(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A pooling layer, or function, of any kind."""
    dims, extents = value.dims, value.shape[2:]
    halves, less = [n // 2 for n in extents], [n - 1 for n in extents]
    texts = [
        (f"nn.MaxPool{dims}d(2)", halves),
        (f"nn.AvgPool{dims}d(2)", halves),
        (f"nn.MaxPool{dims}d(3, stride=1, padding=1)", list(extents)),
        (f"nn.AvgPool{dims}d(2, stride=1)", less),
        (f"nn.AdaptiveAvgPool{dims}d(2)", [2] * dims),
        (f"F.max_pool{dims}d({{}}, 2, 1)", less),
        (f"F.avg_pool{dims}d({{}}, kernel_size=3, stride=1)", [n - 2 for n in extents]),
        (f"F.adaptive_max_pool{dims}d({{}}, 3)", [3] * dims),
    ]
    text, found = draw(st.sampled_from(texts))
    like = Value("", "image", (*value.shape[:2], *found))
    if text.startswith("F."):
        return program.assign(text.format(value.name), like)
    return program.assign(f"{program.layer('pool', text)}({value.name})", like)


@block(is_image, "reshape", needs="linear")
def to_tokens(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """One token for each position, as vision transformers have it."""
    length = math.prod(value.shape[2:])
    texts = ["{0}.flatten(2).transpose(1, 2)", "torch.flatten({0}, start_dim=2).permute(0, 2, 1)"]
    texts.append("{0}.reshape({0}.size(0), {1}, -1).transpose(1, 2)")
    text = draw(st.sampled_from(texts)).format(value.name, value.channels)
    like = Value("", "tokens", (BATCH, length, value.channels))
    found = program.assign(text, like)
    if length > 12:  # products of sequences grow with the square of the length
        like = Value("", "tokens", (BATCH, 12, value.channels))
        found = program.assign(f"{found.name}[:, :12]", like)
    return found


@block(is_image, "reshape linear")
def to_flat(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """One vector for each sample: by a mean over positions or by all of them, then a layer."""
    axes, length = tuple(range(2, len(value.shape))), math.prod(value.shape[1:])
    texts = [f"{{0}}.mean({axes})", f"{{0}}.amax(dim={axes})", "F.adaptive_avg_pool{1}d({0}, 1)"]
    if length <= _MOST_FEATURES:
        texts = ["torch.flatten({0}, 1)", "{0}.view({0}.size(0), -1)", "{0}.flatten(1)", *texts]
    text = draw(st.sampled_from(texts))
    found = text.format(value.name, value.dims)
    if "adaptive" in text:
        found += ".flatten(1)"
    features = value.channels if texts.index(text) >= len(texts) - 3 else length
    layer = program.layer("linear", f"nn.Linear({features}, {draw(st.sampled_from((4, 6)))})")
    if "view" in text:
        found = found.replace(f"{value.name}.view", f"{value.name}.contiguous().view")
    flat = program.assign(found, Value("", "flat", (BATCH, features)))
    out = int(program.layers[-1].rpartition(", ")[2].rstrip(")"))
    return program.assign(f"{layer}({flat.name})", flat.with_channels(out))


@block(is_tokens, "reshape")
def pooled_tokens(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """One vector for each sequence: a mean, or its first or last token."""
    texts = ("{0}.mean(1)", "{0}[:, 0]", "{0}[:, -1]", "torch.mean({0}, dim=1)")
    text = draw(st.sampled_from(texts)).format(value.name)
    return program.assign(text, Value("", "flat", (BATCH, value.channels)))


@block(lambda value: value.kind != "flat", "reshape")
def permuted(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Axes moved there and back around a function."""
    last = len(value.shape) - 1
    curve = draw(st.sampled_from(("torch.tanh", "F.silu", "F.relu")))
    there = f"{value.name}.transpose(1, {last})"
    moved = program.assign(f"{curve}({there})", value)
    return program.assign(f"{moved.name}.transpose(1, {last}).contiguous()", value)
