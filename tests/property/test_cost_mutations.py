"""Mutated tables load, or are refused with a place; nothing else happens, and nothing takes long.

The usual run tries 300 tables, one with ``HYPOTHESIS_PROFILE=ci`` 2,000; ``COST_MUTATIONS`` sets
any other number.
"""

import json
import os
import re
import time
import tomllib
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cgmq_fx.cost.find import builtin_names, builtin_text
from cgmq_fx.cost.grid import WEIGHT_AXES
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.errors import CostTableError

USUAL = "2000" if os.environ.get("HYPOTHESIS_PROFILE") == "ci" else "300"
COUNT = int(os.environ.get("COST_MUTATIONS", USUAL))
MAX_SECONDS = 1.0
NPU = """\
schema = 1
name = "npu"
unit = "uJ"
source = "measured"
reference = { weight = 8, activation = 8 }
unpriced = "zero"
include = ["base.toml", "macs_like.toml"]
[[row]]
op = "linear"
where = "groups == 1 and not (in_features in (3, 4))"
per = "mac"
cost = { formula = "ceil(weight_bits / 4) * max(activation_bits, 8) / 64" }
error = "5 %"
[[row]]
op = "conv2d"
where = "groups == in_channels"
per = "output_element"
grid = [
  { weight = 8, activation = 8, cost = 1.0 },
  { weight = 4, activation = 8, cost = 0.62, error = 0.05, source = "page 12" },
  { weight = 2, activation = 8, cost = 1e-3 },
]
[[row]]
op = ["matmul", "attention", "torch.ops.aten.bmm.default"]
per = "call"
cost = "1/3"
"""
BASE = 'name = "base"\nunit = "uJ"\n[[row]]\nop = "rnn"\nper = "weight"\ncost = 1\n'
OTHER = BASE.replace("rnn", "bilinear").replace("base", "other")
SOURCES = [NPU, BASE, *(builtin_text(name).content.decode() for name in builtin_names())]
TOKEN = re.compile(r'"[^"\n]*"|[\w.]+|\s+|.', re.DOTALL)
SPLICES = st.sampled_from([
    "nan", "-1", "inf", "1e999", "0", "{}", "[]", "[[row]]", '"', "'''", "=", ".", "\n", "\0", "\\",
    "include = 'base.toml'", "include = 'npu.toml'", "include = 'bops'", "include = '.'",
    "schema = 2", "cost = { formula = '1/(weight_bits-8)' }", "where = 'eval(1)'", "0x" + "f" * 5000,  # noqa: E501
    "'__import__(\"os\")'", "true", "1979-05-27", "a.b.c.d = 1", "#", "\ud7ff", "9" * 400, "**", "//",  # noqa: E501
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([2**100, -1, "conv2d", "a.b", "bops", "1/0", "weight_bits", "base.toml"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8) | st.sampled_from(["formula", "op", "cost"]), inner, max_size=3),  # noqa: E501
    max_leaves=6,
)  # fmt: skip


@st.composite
def mutated_bytes(draw):
    """A table with some bytes changed, dropped or doubled."""
    text = bytearray(draw(st.sampled_from(SOURCES)).encode())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text) - 1))
        length = draw(st.integers(0, 12))
        text[at : at + length] = draw(st.binary(max_size=4)) * draw(st.integers(1, 3))
        text = text or bytearray(b"x")
    return "npu.toml", bytes(text)


@st.composite
def mutated_tokens(draw):
    """A table with some tokens replaced by others of its own, or by something nasty."""
    tokens = TOKEN.findall(draw(st.sampled_from(SOURCES)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(tokens) - 1))
        new = draw(st.sampled_from(tokens) | SPLICES)
        tokens[at : at + draw(st.integers(0, 2))] = [new]
        tokens = tokens or ["x"]
    return "npu.toml", "".join(tokens).encode("utf-8", "surrogatepass")


@st.composite
def mutated_structures(draw):
    """A table, as JSON, with some value replaced, dropped, or put under another key."""
    table = tomllib.loads(draw(st.sampled_from(SOURCES)))
    for _ in range(draw(st.integers(1, 3))):
        here = table
        while True:
            keys = list(here) if isinstance(here, dict) else list(range(len(here)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(here[key], (dict, list)) and draw(st.integers(0, 3)):
                here = here[key]
                continue
            action = draw(st.integers(0, 2))
            if action == 0:
                del here[key]
            elif action == 1 and isinstance(here, dict):
                here[draw(st.text(max_size=8))] = draw(VALUES)
            else:
                here[key] = draw(VALUES)
            break
    return "npu.json", json.dumps(table).encode()


PLACE = re.compile(r"npu\.(toml|json)(:\d+|: \S| is | has | cannot )")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutations")
    (folder / "base.toml").write_text(BASE)
    (folder / "macs_like.toml").write_text(OTHER)
    (folder / "npu.toml").write_text(NPU)
    assert len(load_table(folder / "npu.toml").rows) == 5
    return folder


def outcome(path):
    """Load a table; return what it was refused with, and the processor time that took."""
    start = time.process_time()
    message = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostTableWarning)
        try:
            load_table(path)
        except CostTableError as error:
            message = str(error)
    return message, time.process_time() - start


@pytest.mark.slow
@settings(max_examples=COUNT, suppress_health_check=list(HealthCheck), deadline=None)
@given(case=st.one_of(mutated_bytes(), mutated_tokens(), mutated_structures()))
def test_a_mutated_table_loads_or_is_refused_with_a_place(folder, case):
    name, content = case
    path = folder / name
    path.write_bytes(content)
    message, seconds = outcome(path)
    assert message is None or PLACE.search(message), message
    assert seconds < MAX_SECONDS, f"{seconds:.1f} s for {message}"


def rows(text, count):
    return BASE + "".join(
        f'[[row]]\nop = "conv2d"\nper = "mac"\nwhere = "kernel_0 == {i}"\n{text.format(i=i)}\n'
        for i in range(count)
    )


def grid(pairs):
    listed = ", ".join(f"{{ weight = {w}, activation = {a}, cost = {w + a} }}" for w, a in pairs)
    return f"grid = [ {listed} ]".replace("{", "{{").replace("}", "}}")


EXTREMES = {
    "formulas": rows('cost = {{ formula = "weight_bits * {i}" }}', 2000),
    "formulas that are allowed": rows(
        'cost = {{ formula = "weight_bits*activation_bits+{i}+' + "1+" * 80 + '1" }}', 18
    ),
    "large numbers": rows(
        'cost = {{ formula = "(weight_bits / activation_bits + {i}) ** 60" }}', 80
    ),
    "conditions": rows("cost = {i}", 1990),
    "chained conditions": rows("cost = 1", 350).replace("kernel_0 ==", "1 < " * 40 + "kernel_0 =="),
    "rows that tie": BASE + '[[row]]\nop = "conv2d"\nper = "mac"\ncost = 1\n' * 1999,
    "rows": BASE + "[[row]]\n" * 20_000,
    "unknown keys": "".join(f"key{i} = 1\n" for i in range(15_000)),
    "deep dotted key": "a" + ".a" * 60_000 + " = 1",
    "many dotted keys": "".join("a" + ".a" * 18 + f".k{i} = 1\n" for i in range(4000)),
    "brackets": "a = " + "[" * 100_000,
    "grids": rows(grid([*((i, 64 - i) for i in range(65)), (64, 64)]), 4),
    "wide grid": rows(grid([(i, j) for i in range(40) for j in range(40)]), 1),
    "operations": rows("cost = 1", 400).replace(
        'op = "conv2d"', f"op = {[f'a.b{i}' for i in range(64)]}"
    )[: 1 << 17].rpartition("[[row]]")[0],
    "long number": "a = 0x" + "f" * 200_000,
    "escapes": 'a = "' + "\\n" * 100_000 + '"',
}  # fmt: skip


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_tables_take_less_than_a_second(folder, name):
    path = folder / "npu.toml"
    path.write_text(EXTREMES[name])
    seconds = min(outcome(path)[1] for _ in range(2))  # a busy machine slows single runs
    assert seconds < MAX_SECONDS


FRACTIONS = st.fractions(0, 10**6, max_denominator=10**4)
ERRORS = st.none() | st.fractions(0, 1, max_denominator=100)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
WHERE = st.sampled_from([None, "groups == 1", "bias", "not bias and macs>=8", "name in ('a','b')"])
FORMULA = st.sampled_from(["weight_bits", "weight_bits*activation_bits/7", "max(weight_bits, 4)"])


@st.composite
def any_row(draw):
    fields = {
        "op": draw(st.sampled_from(["conv2d", "linear", ("conv1d", "conv2d"), "a.b"])),
        "per": draw(st.sampled_from(["mac", "weight", "call"])),
        "where": draw(WHERE),
        "source": draw(TEXTS),
        "error": draw(ERRORS),
        "layer": draw(st.integers(0, 3)),
    }
    kind = draw(st.integers(0, 2))
    if kind == 0:
        fields["cost"] = draw(FRACTIONS)
    elif kind == 1:
        fields["cost"] = {"formula": draw(FORMULA)}
    else:
        widths = draw(st.lists(st.integers(0, 64), min_size=1, max_size=3, unique=True))
        fields["grid"] = [
            {**dict(zip(WEIGHT_AXES, (w, a), strict=True)), "cost": draw(FRACTIONS),
             "source": draw(TEXTS), "error": draw(ERRORS)}
            for w in widths for a in widths
        ]  # fmt: skip
    return Row(**fields)


@given(st.lists(any_row(), min_size=1, max_size=4), TEXTS, st.integers(0, 64))
def test_toml_json_and_python_mean_the_same(found, source, bits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CostTableWarning)
        try:
            table = CostTable("t", "ms", tuple(found), source, bits, {"weight": bits})
        except CostTableError:  # two rows tie
            return
        json_again = load_table(json.loads(json.dumps(table.to_json())))
        toml_again = load_table(tomllib.loads(table.to_toml()))
    assert json_again.digest == toml_again.digest == table.digest
    assert set(json_again.rows) == set(toml_again.rows) == set(table.rows)


@pytest.mark.parametrize("name", builtin_names())
def test_built_in_tables_are_written_and_read(name):
    table = get_table(name)
    assert load_table(tomllib.loads(table.to_toml())).digest == table.digest
