import subprocess
import sys

import pytest

from cgmq_fx.cli import main
from cgmq_fx.cost.load import get_table
from source_tree import ROOT

BOPS = ROOT / "cost" / "tables" / "bops.toml"
FAULTY = """
name = "faulty"
unit = "furlong"
input_bits = 99

[[row]]
op = "conv2"
per = "mac"
cost = 1
"""
FALLING = """
name = "falling"
unit = "cycle"

[[row]]
op = "linear"
per = "mac"
grid = [
    { weight = 4, activation = 8, cost = 3 },
    { weight = 8, activation = 8, cost = 2 },
]
"""


@pytest.fixture
def table_file(tmp_path):
    def write(text):
        file = tmp_path / "table.toml"
        file.write_text(text)
        return str(file)

    return write


def test_version_is_that_of_the_installation(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("cgmq-fx 0.")


def test_tables_list_names_every_table_and_resource(capsys):
    assert main(["tables", "list"]) == 0
    out = capsys.readouterr().out
    for name in ("bops", "macs", "weight_memory"):
        assert f"\n{name} " in out


def test_tables_show_prints_rows_and_facts(capsys):
    assert main(["tables", "show", "bops"]) == 0
    out = capsys.readouterr().out
    assert "weight_bits * activation_bits" in out
    assert get_table("bops").digest in out


def test_tables_show_reads_a_file_with_a_grid_and_brackets(capsys, table_file):
    text = FALLING.replace("cost = 3", "cost = 1").replace("[[row]]", 'source = "[b]"\n[[row]]')
    assert main(["tables", "show", table_file(text)]) == 0
    out = capsys.readouterr().out
    assert "weight \\ activation 8 4 1 8 2" in " ".join(out.split())
    assert "[b]" in out


def test_tables_show_of_an_unknown_name(capsys):
    assert main(["tables", "show", "bop"]) == 1
    captured = capsys.readouterr()
    assert "there is no cost table 'bop' (did you mean 'bops'?)" in captured.err
    assert captured.out == ""


def test_tables_check_of_a_sound_table(capsys):
    assert main(["tables", "check", str(BOPS)]) == 0
    out = capsys.readouterr().out
    assert f"{BOPS}: sound; table 'bops' in BOP, 3 rows" in out
    assert get_table("bops").digest in out


def test_tables_check_prints_every_fault(capsys, table_file):
    file = table_file(FAULTY)
    assert main(["tables", "check", file]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3 faults" in captured.err
    for fault in (f"{file}:3: unit = 'furlong'", f"{file}:4: input_bits = 99", "row 1, op"):
        assert fault in captured.err


def test_tables_check_warns_of_falling_costs(capsys, table_file):
    assert main(["tables", "check", table_file(FALLING)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: ")
    assert "falling" in captured.out


def test_tables_check_does_not_take_a_name_for_a_file(capsys):
    assert main(["tables", "check", "bops"]) == 1
    assert "bops" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["tables"], "the following arguments are required: ACTION"),
        (["paint"], "invalid choice: 'paint'"),
        (["demo", "--epochs", "0"], "'0' is not a whole number of at least 1"),
        (["demo", "--float-epochs", "2.5"], "'2.5' is not a whole number of at least 1"),
        (["demo", "--seed", "-1"], "'-1' is not a whole number of at least 0"),
    ],
)
def test_wrong_arguments_are_refused_with_the_rule(capsys, argv, complaint):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        ("0.3%", "is below the floor"),
        ("60", "write '60%' for a share"),
        ("3 furlong", "unknown unit 'furlong'"),
    ],
)
def test_a_bad_budget_is_an_error_without_a_traceback(capsys, tmp_path, budget, complaint):
    assert main(["demo", "--out", str(tmp_path / "out"), "--budget", budget]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("cgmq-fx: ")
    assert complaint in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file(capsys, tmp_path):
    file = tmp_path / "out"
    file.write_text("")
    assert main(["demo", "--out", str(file)]) == 1
    assert f"the results cannot go to {file}: File exists" in capsys.readouterr().err


def test_without_scikit_learn_the_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "pip install 'cgmq_fx[demo]'" in capsys.readouterr().err


def test_ctrl_c_ends_without_a_traceback(capsys, monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cgmq_fx.demo.run_demo", interrupt)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "cgmq-fx: interrupted\n"


def test_help_does_not_wait_for_what_the_commands_need():
    code = (
        "import sys\n"
        "from cgmq_fx.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('cgmq_fx.demo', 'sklearn')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"tables" in done.stdout
