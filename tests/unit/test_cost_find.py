import sys

import pytest

from cgmq_fx.cost.find import GROUP, builtin_names, plugin_names, table_names
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.cost.monotone import CostTableWarning
from cgmq_fx.errors import CostTableError

TEXT = """\
name = "{name}"
unit = "cycle"
[[row]]
op = "conv2d"
per = "mac"
cost = 1
"""
MODULE = """
from cgmq_fx.cost import CostTable, Row
TABLE = CostTable(name="acme-value", unit="cycle", rows=[Row(op="conv2d", per="mac", cost=2)])
def make():
    return CostTable(name="acme-made", unit="cycle", rows=[Row(op="conv2d", per="mac", cost=3)])
def fails():
    raise RuntimeError("no licence")
NUMBER = 3
"""
POINTS = {
    "acme-value": "{package}:TABLE",
    "acme-made": "{package}:make",
    "acme-file": "{package}:acme-file.toml",
    "acme-json": "{package}:acme-json.json",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    packages = []

    def install_package(points, package="acme_tables", **files):
        folder = tmp_path / package
        folder.mkdir()
        packages.append(package)
        (folder / "__init__.py").write_text(MODULE)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)
        info = tmp_path / f"{package}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"{name} = {value.format(package=package)}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))

    yield install_package
    for package in packages:
        sys.modules.pop(package, None)


def test_without_packages():
    assert table_names() == builtin_names()
    assert plugin_names() == ()


def test_every_kind_of_entry_point(install):
    files = {
        "acme-file__toml": TEXT.format(name="acme-file"),
        "acme-json__json": '{"name": "acme-json", "include": ["acme-file.toml"]}',
    }
    install(POINTS, **files)
    assert plugin_names() == tuple(sorted(POINTS))
    assert table_names() == tuple(sorted({*POINTS, *builtin_names()}))
    assert {name: get_table(name).rows[0].cost for name in POINTS} == {
        "acme-value": 2,
        "acme-made": 3,
        "acme-file": 1,
        "acme-json": 1,
    }
    assert load_table("acme-made").name == "acme-made"
    assert load_table("acme-file", strict=True).strict
    for name in ("acme-file", "acme-value"):
        mine = load_table({"name": "mine", "include": name})
        assert mine.unit == "cycle"
        assert mine.rows[0].layer == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{package}:fails", "raised RuntimeError: no licence"),
        ("{package}:gone", "raised AttributeError: .*gone"),
        ("gone_module:TABLE", "raised ModuleNotFoundError: .*gone_module"),
        ("{package}:NUMBER", "gives a int, not a CostTable"),
        ("{package}:TABLE", "gives a table called 'acme-value', not 'broken'"),
        ("{package}:gone.toml", "raised FileNotFoundError"),
        ("{package}:bad.toml", r"(?s:is refused: .*bad.toml:2: unit = 'cycl')"),
    ],
)
def test_a_broken_package_is_named(install, value, message):
    bad = TEXT.format(name="broken").replace("cycle", "cycl")
    install({"broken": value}, bad__toml=bad)
    with pytest.raises(
        CostTableError,
        match=r"'broken' of distribution acme_tables 1.2 cannot be loaded: entry point .*"
        + message
        + "(?s:.*)correct or uninstall",
    ):
        get_table("broken")
    assert "broken" in table_names(), "the others can still be listed"
    assert load_table("bops").name == "bops"


def test_a_built_in_table_goes_first(install):
    install({"bops": "{package}:TABLE", "acme-value": "{package}:TABLE"})
    match = "'bops' of distribution acme_tables 1.2 is hidden by the built-in table"
    with pytest.warns(CostTableWarning, match=match):
        names = table_names()
    assert names.count("bops") == 1
    assert get_table("bops").unit == "BOP"


def test_two_packages_with_one_name(install):
    install({"acme-value": "{package}:TABLE"})
    install({"acme-value": "{package}:TABLE"}, package="other_tables")
    message = "'acme-value' is brought by distribution .* 1.2 and distribution .* 1.2; uninstall"
    with pytest.raises(CostTableError, match=message) as caught:
        get_table("acme-value")
    assert "acme_tables" in str(caught.value)
    assert "other_tables" in str(caught.value)


def test_unknown_names_list_those_of_packages(install):
    install(POINTS)
    with pytest.raises(CostTableError, match=r"no cost table 'acme-val'.*mean 'acme-value'.*bops"):
        load_table("acme-val")


def test_a_file_with_a_suffix_is_no_name(install, tmp_path):
    install({"acme.toml": "{package}:TABLE"})
    path = tmp_path / "acme.toml"
    path.write_text(TEXT.format(name="mine"))
    assert load_table(str(path)).name == "mine"
