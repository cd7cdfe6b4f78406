"""Blocks: norms and dropouts, which behave differently in training."""

import math

from hypothesis import strategies as st

from cgmq_fx.testing.blocks import block, is_any, is_image
from cgmq_fx.testing.program import Program, Value


def _affine(draw: st.DrawFn, program: Program, word: str) -> str:
    return f", {word}=False" if program.flag(draw, "no_affine") else ""


def _is_wide(value: Value) -> bool:
    """Tell whether a norm over part of a sample leaves more than a constant."""
    return is_image(value) and math.prod(value.shape[2:]) >= 4


def _has_channel_axis_one(value: Value) -> bool:
    return value.kind != "tokens"


def _has_statistics(value: Value) -> bool:
    """Tell whether one sample alone has more than one value in each channel."""
    return is_image(value) and math.prod(value.shape[2:]) > 1


@block(_has_channel_axis_one, "batch_norm", "no_affine momentum_none")
def batch_norm(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A batch norm with unusual options."""
    momentum = "None" if program.flag(draw, "momentum_none") else draw(st.sampled_from((0.3, 0.05)))
    return _batch_norm(draw, program, value, f"momentum={momentum}")


@block(_has_statistics, "batch_norm batch_statistics", "no_affine")
def batch_norm_of_the_batch(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A batch norm that takes the statistics of its input in evaluation too."""
    return _batch_norm(draw, program, value, "track_running_stats=False")


def _batch_norm(draw: st.DrawFn, program: Program, value: Value, options: str) -> Value:
    options = f"eps={draw(st.sampled_from((1e-3, 1e-5, 0.1)))}, {options}"
    options += _affine(draw, program, "affine")
    kind = f"nn.BatchNorm{value.dims or 1}d({value.channels}, {options})"
    return program.assign(f"{program.layer('norm', kind)}({value.name})", value)


@block(is_any, "dropout")
def dropout(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A dropout layer."""
    p = draw(st.sampled_from((0.25, 0.1, 0.5, 0.0)))
    whole = value.kind == "image" and draw(st.booleans())
    kind = f"nn.Dropout{value.dims}d({p})" if whole else f"nn.Dropout({p})"
    return program.assign(f"{program.layer('dropout', kind)}({value.name})", value)


@block(is_any, "functional_dropout")
def functional_dropout(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A dropout called as a function, as transformers do it."""
    p = draw(st.sampled_from((0.25, 0.1)))
    end = draw(st.sampled_from(("self.training", "training=self.training")))
    return program.assign(f"F.dropout({value.name}, {p}, {end})", value)


@block(_is_wide, "group_norm", "no_affine")
def group_norm(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A group norm."""
    # With one channel in a group this would be an instance norm.
    groups = draw(st.sampled_from((2, 1) if value.channels % 4 == 0 else (1,)))
    eps = draw(st.sampled_from((1e-3, 1e-5)))
    options = f"{groups}, {value.channels}, eps={eps}{_affine(draw, program, 'affine')}"
    return program.assign(
        f"{program.layer('norm', f'nn.GroupNorm({options})')}({value.name})", value
    )


@block(_is_wide, "instance_norm")
def instance_norm(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """An instance norm, with parameters, running statistics, both or neither."""
    options = f"{value.channels}, eps={draw(st.sampled_from((1e-3, 1e-5)))}"
    options += ", affine=True" if draw(st.booleans()) else ""
    options += ", track_running_stats=True" if draw(st.booleans()) else ""
    kind = f"nn.InstanceNorm{value.dims}d({options})"
    # The mean of each channel is a constant now, and would stay one without a function that bends.
    return program.assign(f"F.relu({program.layer('norm', kind)}({value.name}))", value)


@block(lambda value: value.kind != "image" and value.channels >= 4, "layer_norm", "no_affine")
def layer_norm(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """A layer norm over the channels."""
    eps = draw(st.sampled_from((1e-3, 1e-5)))
    options = f"{value.channels}, eps={eps}{_affine(draw, program, 'elementwise_affine')}"
    return program.assign(
        f"{program.layer('norm', f'nn.LayerNorm({options})')}({value.name})", value
    )
