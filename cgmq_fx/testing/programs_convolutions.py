"""Blocks: convolutions with every option that shapes allow."""

from hypothesis import strategies as st

from cgmq_fx.testing.blocks import block, divisors, is_image
from cgmq_fx.testing.program import Program, Value

_CHANNELS = (4, 2, 6)
_MOST_CHANNELS = 8
_LONGEST = 9


def _written(values: list[int]) -> str:
    """Return an option of each axis as it is written: one number where all are equal."""
    return str(values[0] if len(set(values)) == 1 else tuple(values))


def _each_axis(draw: st.DrawFn, dims: int, choices: tuple[int, ...]) -> list[int]:
    return [draw(st.sampled_from(choices)) for _ in range(dims)]


def _beyond_one(draw: st.DrawFn, program: Program, dims: int, trait: str) -> list[int]:
    """Draw strides or dilations: all one, or, with the trait, at least one of them 2 or 3."""
    if not program.flag(draw, trait):
        return [1] * dims
    values = _each_axis(draw, dims, (2, 1, 3))
    return values if max(values) > 1 else [2] * dims


def _strides(draw: st.DrawFn, program: Program, extents: tuple[int, ...]) -> list[int]:
    """Draw strides below the extents, so that no kernel meets nothing but padding."""
    if max(extents) < 3:
        return [1] * len(extents)
    drawn = _beyond_one(draw, program, len(extents), "strided")
    stride = [min(s, extent - 1) for s, extent in zip(drawn, extents, strict=True)]
    if max(drawn) > 1 and max(stride) == 1:
        stride[extents.index(max(extents))] = 2
    return stride


def _groups(draw: st.DrawFn, program: Program, ins: int, outs: int) -> int:
    several = divisors(ins, outs)[1:]
    if not several or not program.flag(draw, "grouped"):
        return 1
    return draw(st.sampled_from(several))


def _padding(
    draw: st.DrawFn,
    extents: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    reach: int,
    *,
    sure: bool,
) -> list[int]:
    """Draw a padding of each axis that leaves at least two positions; `sure`: above zero."""
    paddings = []
    for extent, k, s in zip(extents, kernel, stride, strict=True):
        least = max(0, -(-(reach * (k - 1) + 1 + s - extent) // 2))
        paddings.append(least + (not least if sure else draw(st.integers(0, 1))))
    return paddings


def convolution(
    draw: st.DrawFn, program: Program, value: Value, out: int, groups: int
) -> tuple[str, Value]:
    """Add a convolution; return the expression that reads it and what calling it gives."""
    dims, extents = value.dims, value.shape[2:]
    program.add("conv", f"{dims}d")
    kernel = _each_axis(draw, dims, (3, 1, 2))
    stride = _strides(draw, program, extents)
    dilation = _beyond_one(draw, program, dims, "dilated")
    sure = "padding_mode" in program.wanted
    padding = _padding(draw, extents, kernel, stride, max(dilation), sure=sure)
    options = _options(stride=stride, dilation=dilation, padding=padding)
    even = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    # torch warns where it has to pad unevenly.
    if max(stride) == 1 and all(n % 2 == 0 for n in even) and draw(st.booleans()):
        padding = [n // 2 for n in even]
        options = [*_options(stride=stride, dilation=dilation, padding=[0]), "padding='same'"]
    # Reflection needs less padding than there is to reflect.
    fitting = all(p < extent for p, extent in zip(padding, extents, strict=True))
    if any(padding) and fitting and program.flag(draw, "padding_mode"):
        modes = ("reflect", "circular", "replicate") if dims < 3 else ("circular", "replicate")
        options.append(f"padding_mode={draw(st.sampled_from(modes))!r}")
    if groups > 1:
        options.append(f"groups={groups}")
    if not draw(st.booleans()):
        options.append("bias=False")
    found = [
        (extent + 2 * p - d * (k - 1) - 1) // s + 1
        for extent, p, d, k, s in zip(extents, padding, dilation, kernel, stride, strict=True)
    ]
    arguments = ", ".join([str(value.channels), str(out), _written(kernel), *options])
    layer = program.layer("conv", f"nn.Conv{dims}d({arguments})")
    return layer, Value("", "image", (value.shape[0], out, *found))


def _options(*, stride: list[int], dilation: list[int], padding: list[int]) -> list[str]:
    written = [("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)]
    return [
        f"{name}={_written(values)}" for name, values, usual in written if set(values) != {usual}
    ]


def transposed_convolution(
    draw: st.DrawFn, program: Program, value: Value, out: int, groups: int
) -> tuple[str, Value]:
    """Add a transposed convolution; return what `convolution` returns."""
    dims, extents = value.dims, value.shape[2:]
    program.add("transposed", f"{dims}d")
    kernel = _each_axis(draw, dims, (2, 3, 1))
    if "output_padding" in program.wanted and "strided" in program.allowed:
        program.wanted.add("strided")
    stride = [min(s, 2) for s in _beyond_one(draw, program, dims, "strided")]
    dilation = [min(d, 2) for d in _beyond_one(draw, program, dims, "dilated")]
    extra = [0] * dims
    if max(stride) > 1 and program.flag(draw, "output_padding"):
        extra = [s - 1 for s in stride]
    found = [
        (n - 1) * s + d * (k - 1) + e + 1
        for n, s, d, k, e in zip(extents, stride, dilation, kernel, extra, strict=True)
    ]
    padding = [draw(st.integers(0, 1)) if extent >= 4 else 0 for extent in found]
    found = [extent - 2 * p for extent, p in zip(found, padding, strict=True)]
    options = _options(stride=stride, dilation=dilation, padding=padding)
    options += [f"output_padding={_written(extra)}"] if any(extra) else []
    options += [f"groups={groups}"] if groups > 1 else []
    options += [] if draw(st.booleans()) else ["bias=False"]
    arguments = ", ".join([str(value.channels), str(out), _written(kernel), *options])
    layer = program.layer("up", f"nn.ConvTranspose{dims}d({arguments})")
    return layer, Value("", "image", (value.shape[0], out, *found))


def _can_grow(value: Value) -> bool:
    longest = _LONGEST if value.dims < 3 else 5
    return is_image(value) and max(value.shape[2:]) <= longest


@block(is_image, "conv", "1d 2d 3d strided dilated padding_mode grouped")
def conv(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A convolution."""
    out = draw(st.sampled_from(_CHANNELS))
    groups = _groups(draw, program, value.channels, out)
    layer, like = convolution(draw, program, value, out, groups)
    return program.assign(f"{layer}({value.name})", like)


@block(is_image, "conv depthwise", "strided dilated padding_mode")
def depthwise(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A convolution of each channel by itself, maybe with a multiplier, and one across them."""
    few = value.channels * 2 <= _MOST_CHANNELS
    out = value.channels * (draw(st.sampled_from((1, 2))) if few else 1)
    layer, like = convolution(draw, program, value, out, value.channels)
    found = program.assign(f"{layer}({value.name})", like)
    if draw(st.booleans()):
        channels = draw(st.sampled_from(_CHANNELS))
        point = program.layer("conv", f"nn.Conv{value.dims}d({out}, {channels}, 1)")
        found = program.assign(f"{point}({found.name})", found.with_channels(channels))
    return found


@block(_can_grow, "transposed", "strided dilated grouped output_padding")
def transposed(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A transposed convolution."""
    out = draw(st.sampled_from(_CHANNELS[:2]))
    groups = _groups(draw, program, value.channels, out)
    layer, like = transposed_convolution(draw, program, value, out, groups)
    return program.assign(f"{layer}({value.name})", like)


@block(
    is_image,
    "conv_bn batch_norm",
    "conv 1d 2d 3d transposed grouped strided dilated no_affine reused",
    "conv",
)
def conv_bn(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A convolution and its batch norm; folding is wrong where the former is read twice."""
    out = draw(st.sampled_from(_CHANNELS[:2]))
    groups = _groups(draw, program, value.channels, out)
    grows = _can_grow(value) and program.flag(draw, "transposed")
    write = transposed_convolution if grows else convolution
    layer, like = write(draw, program, value, out, groups)
    found = program.assign(f"{layer}({value.name})", like)
    eps = draw(st.sampled_from((1e-3, 1e-5, 0.1)))
    plain = ", affine=False" if program.flag(draw, "no_affine") else ""
    kind = f"nn.BatchNorm{value.dims}d({out}, eps={eps}{plain})"
    normed = program.assign(f"{program.layer('norm', kind)}({found.name})", found)
    if "reused" in program.wanted or draw(st.integers(1, 4)) == 4:
        if program.flag(draw, "reused"):
            found = program.assign(f"{layer}(torch.tanh({value.name}))", like)
        if draw(st.booleans()):
            found = program.assign(f"{program.layer('norm', kind)}({found.name})", found)
        # Not all of it: two norms of one tensor may be the same.
        return program.assign(f"{normed.name} - 0.5 * {found.name}", normed)
    return program.assign(f"F.relu({normed.name})", normed) if draw(st.booleans()) else normed


@block(is_image, "weight_norm conv")
def normalised_weight(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A convolution whose weight is parametrized."""
    layer, like = convolution(draw, program, value, value.channels, 1)
    name, _, expression = program.layers.pop().partition(" = ")
    program.layers.append(f"{name} = nn.utils.parametrizations.weight_norm({expression})")
    return program.assign(f"{layer}({value.name})", like)
