import json
import re

import pytest

from cgmq_fx.cost.include import MAX_FILES, MAX_INCLUDE_DEPTH
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.errors import CostTableError
from cost_cases import conv, linear, matmul

BASE = """\
name = "base"
unit = "cycle"
source = "data sheet"
input_bits = 4
reference = { weight = 16, activation = 16 }
unpriced = "zero"
[[row]]
op = ["conv2d", "linear"]
per = "mac"
cost = 1
[[row]]
op = "conv2d"
where = "groups == 2 and bias"
per = "mac"
cost = 2
source = "page 3"
"""
HEAD = 'name = "top"\ninclude = "base.toml"\n'
ROW = '[[row]]\nop = {op}\nwhere = "{where}"\nper = "mac"\ncost = {cost}\n'


def row(cost, op='"conv2d"', where=""):
    return ROW.format(op=op, where=where, cost=cost)


@pytest.fixture
def write(tmp_path):
    def write_files(**texts):
        for name, text in texts.items():
            path = tmp_path / f"{name}.toml"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_files


def refused(path):
    with pytest.raises(CostTableError) as caught:
        load_table(path)
    return str(caught.value)


def test_rows_and_fields_are_inherited(write):
    table = load_table(write(base=BASE, top=HEAD))
    assert (table.name, table.unit, table.input_bits, table.unpriced) == ("top", "cycle", 4, "zero")
    assert table.reference.weight == 16
    assert table.source == ""
    assert [row.source for row in table.rows] == ["data sheet", "page 3"]
    assert [row.layer for row in table.rows] == [1, 1]
    assert table.rows[0].origin.endswith("base.toml:7")


def test_own_fields_go_first(write):
    table = load_table(write(base=BASE, top=HEAD + 'input_bits = 8\nunpriced = "error"\n'))
    assert (table.input_bits, table.unpriced) == (8, "error")


def test_same_operations_and_condition_replace(write):
    text = HEAD + row(5, '["linear", "conv2d"]') + row(7, where="bias and (groups==2)")
    table = load_table(write(base=BASE, top=text))
    assert [row.cost for row in table.rows] == [5, 7]


def test_specificity_decides_between_files(write):
    table = load_table(write(base=BASE, top=HEAD + row(5, where="groups == 2")))
    assert table.cost(conv(macs=1, groups=2), (8, 8)) == 2, "two conditions beat one"
    assert table.cost(conv(macs=1, groups=2, bias=False), (8, 8)) == 5
    assert table.cost(linear(macs=1), (8, 8)) == 1


def test_the_including_table_wins_a_tie(write):
    text = HEAD + row(5, where="kernel_size == 9 and bias") + row(6, '["conv2d", "conv1d"]')
    table = load_table(write(base=BASE, top=text))
    assert table.cost(conv(macs=1, groups=2), (8, 8)) == 5
    assert table.cost(conv(macs=1, bias=False), (8, 8)) == 6, "neither list holds the other"


def test_what_includes_mean_outlives_writing(write):
    table = load_table(write(base=BASE, top=HEAD + row(5, '["conv2d", "conv1d"]')))
    written = json.loads(json.dumps(table.to_json()))
    again = load_table(written)
    assert again.digest == table.digest
    assert again.cost(conv(macs=1), (8, 8)) == 5


def test_order_of_includes_and_diamonds(write):
    write(base=BASE, left='name = "left"\ninclude = "base.toml"\n' + row(9, '["conv2d","linear"]'))
    write(right='name = "right"\ninclude = "base.toml"\n')
    tables = [
        load_table(write(top=f'name = "top"\ninclude = {names}\n'))
        for names in ('["left.toml", "right.toml"]', '["right.toml", "left.toml"]')
    ]
    assert tables[0].digest == tables[1].digest
    assert tables[0].cost(linear(macs=1), (8, 8)) == 9
    assert len(tables[0].rows) == 2


def test_built_in_names_and_chains():
    table = load_table({"name": "mine", "include": "bops", "row": [
        {"op": "opaque", "per": "mac", "cost": 1},
    ]})  # fmt: skip
    bops = get_table("bops")
    assert table.unit == "BOP"
    assert table.cost(conv(), (4, 8)) == bops.cost(conv(), (4, 8))
    assert table.cost(matmul(), (4, 8)) == bops.cost(matmul(), (4, 8))
    assert {row.cost for row in table.rows if row.op == ("opaque",)} == {1}


def test_json_and_toml_include_each_other(write, tmp_path):
    (tmp_path / "top.json").write_text(json.dumps({"name": "top", "include": ["base.toml"]}))
    write(base=BASE, last='name = "last"\ninclude = "top.json"\n')
    last = load_table(tmp_path / "last.toml")
    assert [row.layer for row in last.rows] == [2, 2]


def test_paths_start_at_the_including_file(write, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "top.toml").write_text('name = "top"\ninclude = "../base.toml"\n')
    write(base=BASE)
    monkeypatch.chdir(tmp_path / "deep")
    assert load_table("top.toml").unit == "cycle"
    absolute = {"name": "t", "include": str(tmp_path / "base.toml")}
    assert load_table(absolute).unit == "cycle"
    assert load_table({"name": "t", "include": "../base.toml"}).unit == "cycle", "current folder"


def test_recursion_names_the_chain(write, tmp_path):
    write(a='name = "a"\ninclude = "b.toml"\n', b='name = "b"\ninclude = "c.toml"\n')
    path = write(c='name = "c"\ninclude = "./a.toml"\n')
    a, b, c = (str(tmp_path / f"{name}.toml") for name in "abc")
    text = refused(a)
    assert f"{a}:2: include = 'b.toml': cannot be included" in text
    assert (
        f"{c}:2: include = './a.toml': cannot be included: it includes itself: {a} > {b} > {c}"
        in text
    )
    assert "remove one of these includes" in text
    assert "includes itself" in refused(path)
    assert "includes itself" in refused(write(own='name = "own"\ninclude = "own.toml"\n'))


def test_depth(write, tmp_path):
    for index in range(MAX_INCLUDE_DEPTH + 1):
        write(**{f"t{index}": f'name = "t"\ninclude = "t{index + 1}.toml"\n'})
    write(**{f"t{MAX_INCLUDE_DEPTH + 1}": BASE})
    assert load_table(tmp_path / "t1.toml").rows[0].layer == MAX_INCLUDE_DEPTH
    assert f"go deeper than {MAX_INCLUDE_DEPTH}: {tmp_path / 't0.toml'} > " in refused(
        tmp_path / "t0.toml"
    )


def test_number_of_files(write, tmp_path):
    """Every file of a level includes all of the next one; each is read once."""
    wide = 5
    for level in range(3):
        for index in range(wide):
            names = [f"l{level + 1}_{i}.toml" for i in range(wide)]
            write(**{f"l{level}_{index}": f'name = "t"\ninclude = {names}\n'})
    for index in range(wide):
        write(**{f"l3_{index}": BASE})
    assert len(load_table(tmp_path / "l1_0.toml").rows) == 2
    write(one='name = "t"\ninclude = ["l0_0.toml", "l0_1.toml", "l0_2.toml"]\n')
    assert f"over {MAX_FILES} files" in refused(tmp_path / "one.toml")


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ('"gone.toml"', r"top.toml:2: include = 'gone.toml': cannot be included: .*gone.toml cannot be read: .*No such file.*; give the path"),  # noqa: E501
        ('"."', r"include = '.': cannot be included: there is no cost table '.'"),
        ('"sub.toml"', r"include = 'sub.toml': cannot be included: .*sub.toml is a folder; give the path"),  # noqa: E501
        ('"huge.toml"', r"cannot be included: .*huge.toml has 52,428,800 bytes; at most"),
        ('"bosp"', r"include = 'bosp': .*no cost table 'bosp' .did you mean 'bops'"),
        ('["base.toml", "./base.toml"]', r"top.toml:2: include 2 = './base.toml': stands twice"),
        ("3", r"top.toml:2: include = 3: must be a list"),
        ("[3]", r"top.toml:2: include 1 = 3: must be a text"),
        ("[]", r"top.toml:2: include: has 0 items; it must have 1 to 8"),
        ('""', r"include = '': must not be empty"),
        ('"a\\u0000.toml"', r"cannot be included: .*cannot be read: .*null"),
        (f'"{"x" * 1500}.toml"', r"cannot be included: .*cannot be read: .*File name too long"),
        ('"bad.toml"', r"(?s)include = 'bad.toml': cannot be .*refused for 2 faults:.*bad.toml:2: unit"),  # noqa: E501
        ('"bops"\nunit = "cycle"', r"top.toml:3: unit = 'cycle': the included bops.toml counts 'BOP'"),  # noqa: E501
        ('["bops", "macs"]', r"top.toml:2: include: the included tables differ in unit: BOP in bops"),  # noqa: E501
        ('["base.toml", "other.toml"]', r"differ in input_bits: 4 in .*base.toml, 8 in .*other.toml; say"),  # noqa: E501
    ],
)  # fmt: skip
def test_faults_of_an_include(write, tmp_path, include, message):
    (tmp_path / "sub.toml").mkdir()
    write(base=BASE, huge=b"#" * (50 << 20), bad='name = "bad"\nunit = "x"\nrow = 3\n')
    write(other='name = "o"\nunit = "cycle"\n' + row(1, '"matmul"'))
    path = write(top=f'name = "top"\ninclude = {include}\n')
    assert re.search(message, refused(path)), refused(path)


def test_included_rows_that_contradict_each_other(write):
    write(base=BASE, other=BASE.replace("cost = 2", "cost = 3"))
    path = write(top='name = "top"\ninclude = ["base.toml", "other.toml"]\n')
    text = refused(path)
    assert "top.toml:2: include: the included rows" in text
    assert "base.toml:11 and" in text
    assert "other.toml:11 price conv2d under the same condition; write the row" in text
    chosen = 'name = "top"\ninclude = ["base.toml", "other.toml"]\n'
    fixed = load_table(write(top=chosen + row(4, where="groups == 2 and bias")))
    assert fixed.cost(conv(macs=1, groups=2), (8, 8)) == 4


def test_all_faults_at_once(write):
    path = write(top='name = "top!"\ninclude = "gone.toml"\ninput_bist = 3\n' + row(-1))
    text = refused(path)
    assert "refused for 4 faults" in text
    for place in ("top.toml:1: name", ":2: include = 'gone.toml'", ":3: input_bist", ":8: row 1"):
        assert place in text


def test_falling_costs_warn_once(write, recwarn):
    falling = BASE + row('{ formula = "1 / weight_bits" }', '"bilinear"')
    load_table(write(base=falling, top=HEAD))
    assert len(recwarn) == 1
    assert "base.toml:17" in str(recwarn[0].message)


@pytest.mark.parametrize("layer", ["-1", "65", "true", "1.0"])
def test_layer_is_checked(write, layer):
    path = write(base=BASE + f"layer = {layer}\n")
    assert "base.toml:17: row 2, layer = " in refused(path)
