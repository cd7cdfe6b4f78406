"""Blocks: attention of every kind, and recurrence, on sequences."""

from hypothesis import strategies as st

from cgmq_fx.testing.blocks import block, is_tokens
from cgmq_fx.testing.program import BATCH, Program, Value


def _has_heads(value: Value) -> bool:
    return is_tokens(value) and value.channels % 2 == 0 and value.channels >= 4


@block(_has_heads, "attention multihead_attention", "layer_norm")
def multihead_attention(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """`nn.MultiheadAttention`, with the batch first or second, with or without weights."""
    size, found = value.channels, value
    if program.flag(draw, "layer_norm"):
        norm = program.layer("norm", f"nn.LayerNorm({size})")
        found = program.assign(f"{norm}({value.name})", value)
    first = draw(st.booleans())
    options = ", batch_first=True" if first else ""
    options += draw(st.sampled_from(("", ", dropout=0.1", ", bias=False")))
    layer = program.layer("attention", f"nn.MultiheadAttention({size}, 2{options})")
    if not first:
        found = program.assign(f"{found.name}.transpose(0, 1)", found)
    weights = draw(st.sampled_from((", need_weights=False", "")))
    called = f"{layer}({found.name}, {found.name}, {found.name}{weights})[0]"
    found = program.assign(called if first else f"{called}.transpose(0, 1)", value)
    return program.assign(f"{value.name} + {found.name}", value)


@block(_has_heads, "attention scaled_attention chunk linear")
def scaled_attention(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """`F.scaled_dot_product_attention` of one or two heads."""
    size = value.channels
    layer = program.layer("qkv", f"nn.Linear({size}, {3 * size})")
    names = [program.name(stem) for stem in "qkv"]
    program.statement(f"{', '.join(names)} = {layer}({value.name}).chunk(3, dim=-1)")
    end = draw(st.sampled_from(("", ", is_causal=True", ", scale=0.3", ", dropout_p=0.0")))
    if draw(st.booleans()):
        for name in names:
            program.statement(f"{name} = {name}.unflatten(-1, (2, {size // 2})).transpose(1, 2)")
        called = f"F.scaled_dot_product_attention({', '.join(names)}{end})"
        return program.assign(f"{called}.transpose(1, 2).flatten(2)", value)
    return program.assign(f"F.scaled_dot_product_attention({', '.join(names)}{end})", value)


@block(_has_heads, "attention written_attention matmul linear")
def written_attention(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """Two products and a softmax, with the output projected and added."""
    size = value.channels
    q, k, v, out = (
        program.layer(stem, f"nn.Linear({size}, {size})") for stem in ("q", "k", "v", "out")
    )
    x = value.name
    scores = f"{q}({x}) @ {k}({x}).transpose(-2, -1)"
    scale = draw(st.sampled_from((f" / {size}**0.5", " * 0.5")))
    curve = draw(st.sampled_from(("softmax(dim=-1)", "softmax(-1)")))
    weights = program.assign(f"({scores}{scale}).{curve}", value)
    found = program.assign(f"{out}({weights.name} @ {v}({x}))", value)
    return program.assign(f"{x} + {found.name}", value)


@block(_has_heads, "attention transformer")
def transformer(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """`nn.TransformerEncoderLayer`, with the norms before or after."""
    end = draw(st.sampled_from(("", ", norm_first=True", ", activation='gelu'", ", dropout=0.25")))
    sizes = f"{value.channels}, 2, {2 * value.channels}"
    layer = program.layer("encoder", f"nn.TransformerEncoderLayer({sizes}, batch_first=True{end})")
    return program.assign(f"{layer}({value.name})", value)


@block(is_tokens, "recurrent")
def recurrent(draw: st.DrawFn, program: Program, value: Value) -> Value:
    """`nn.LSTM` or `nn.GRU`, of one or two layers and directions."""
    kind, ways = draw(st.sampled_from(("LSTM", "GRU"))), draw(st.sampled_from((1, 2)))
    end = ", bidirectional=True" if ways == 2 else ""
    end += draw(st.sampled_from(("", ", num_layers=2", ", bias=False")))
    options = f"{value.channels}, 4, batch_first=True{end}"
    layer = program.layer("cell", f"nn.{kind}({options})")
    return program.assign(f"{layer}({value.name})[0]", value.with_channels(4 * ways))


def embedded(draw: st.DrawFn, program: Program, tokens: str, length: int) -> Value:
    """Add the embedding of integers in [0, 9)."""
    program.add("embedding")
    width = draw(st.sampled_from((4, 6)))
    end = draw(st.sampled_from(("", ", padding_idx=0")))
    layer = program.layer("embed", f"nn.Embedding(9, {width}{end})")
    like = Value("", "tokens", (BATCH, length, width))
    return program.assign(f"{layer}({tokens})", like)
