"""The scripts that compare runtimes and files: turns, ratios, rows, and what they refuse."""

import pytest
import torch
from torch import nn

from benchmark_scripts import script

mutated_files = script("mutated_files")
pages, speeds, latency_networks = script("pages"), script("speeds"), script("latency_networks")


class Clock:
    """A clock that the runs move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def run(self, seconds, name, turns):
        def run():
            self.now += seconds
            turns.append(name)

        return run


def test_runs_take_turns_and_the_first_do_not_count():
    clock, turns = Clock(), []
    runs = {"a": clock.run(0.002, "a", turns), "b": clock.run(0.003, "b", turns)}
    times = speeds.timed(runs, 3, clock)
    assert "".join(turns) == "ab" * 5
    assert [round(ms, 6) for ms in times["a"]] == [2.0] * 3
    assert speeds.ratio(times, "b", "a") == pytest.approx(1.5)
    assert speeds.ratio({"a": [1, 2, 100], "b": [2, 4, 100]}, "b", "a") == 2


def test_a_settled_network_shifts_in_its_batch_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 8, 8) + 1
    speeds.settle(model, x)
    assert not model.training
    assert model[1].bias.all()
    assert model[1].running_mean.abs().min() > 1e-4
    assert model(x).std(dim=(0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=0.05)


def question(tolerance):
    def contenders(model, x, folder):
        turns: list[str] = []
        clock = Clock()
        return {
            speeds.FLOAT: lambda: speeds.Contender(clock.run(0, "", turns), "1 MiB"),
            "slow": lambda: speeds.Contender(lambda: sum(range(300_000)), "2 MiB"),
            "quick": lambda: speeds.Contender(lambda: sum(range(3_000)), "2 MiB"),
            "broken": lambda: 1 / 0,
        }

    return speeds.Question(
        "Speed", "speed.py", ("torch",), "size", contenders, (("slow", "quick"),), tolerance
    )


def test_a_page_has_what_refused_and_a_slow_one_ends_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speeds.torchvision.models, "resnet18", lambda weights: nn.Flatten())
    page = tmp_path / "page.md"
    given = ["--networks", "resnet18", "--batches", "1", "--rounds", "3", "--output", str(page)]
    speeds.answer(question(None), given)
    lines = page.read_text().splitlines()
    assert lines[:3] == ["# Speed", "", "`python benchmarks/speed.py`"]
    assert any(line.startswith("| resnet18 | 1 | broken | refused: ZeroDiv") for line in lines)
    assert sum(line.startswith("| resnet18 | 1 |") for line in lines) == 4
    with pytest.raises(SystemExit, match=r"more than 1\.03 times .*: resnet18, batch 1, slow over"):
        speeds.answer(question(1.03), given)


def test_a_table_has_a_ruler():
    assert pages.table(("a", "b"), [(1, 2)]) == ["| a | b |", "| --- | ---: |", "| 1 | 2 |"]


@pytest.mark.parametrize("code", ["exec('1')", "__import__('marshal').loads(b'N')"])
def test_code_that_opening_a_file_runs_is_seen(code):
    with mutated_files.no_code():
        pass
    with pytest.raises(AssertionError, match="runs or loads code"), mutated_files.no_code():
        eval(compile(code, "file", "eval"))


def test_networks_are_chosen_by_how_their_names_start():
    names = [name for name, _, _ in latency_networks.only(latency_networks.OTHERS, "signal")]
    assert names == ["signal 48-96-192 k7"]
    assert latency_networks.only(latency_networks.OTHERS, "") == [*latency_networks.OTHERS]
