import csv
import io
import json
from fractions import Fraction

import pytest
import torch
from rich.console import Console

from cgmq_fx.demo import DigitsNet, run_demo
from cgmq_fx.demo_data import load_digits

FILES = {"report.txt", "report.json", "report.csv", "history.json", "float.pt", "lowered.pt"}
# MACs by hand: 3 x 3 kernels on twice 8 x 8 and twice 4 x 4 pixels; 192 features to 10 classes.
MACS = [64 * 16 * 9, 64 * 24 * 16 * 9, 16 * 32 * 24 * 9, 16 * 48 * 32 * 9, 192 * 10]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    console = Console(file=io.StringIO(), width=100, highlight=False)
    return run_demo(out, float_epochs=3, epochs=5, console=console), out, console.file.getvalue()


def test_the_budget_is_met_and_the_network_works(run):
    result, _, _ = run
    assert result.report.satisfied
    assert result.float_accuracy > 0.9
    assert result.quantized_accuracy > 0.8


def test_the_budget_holds_when_it_is_recomputed_from_the_file(run):
    _, out, _ = run
    lines = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    work = [line for line in lines if line["macs"] != "0"]
    assert [int(line["macs"]) for line in work] == MACS
    total = sum(
        int(line["macs"]) * int(line["weight_bits"]) * int(line["activation_bits"]) for line in work
    )
    assert work[0]["activation_bits"] == "8"  # the image
    assert Fraction(total, sum(MACS) * 1024) <= Fraction(6, 1000)
    assert json.loads((out / "report.json").read_text())["resources"]["bops"]["total"] == total


def test_every_artefact_is_written(run):
    result, out, printed = run
    assert {file.name for file in out.iterdir()} == FILES
    assert {file.name for file in result.files} == FILES
    assert (out / "report.txt").read_text() == f"{result.report}\n"
    history = json.loads((out / "history.json").read_text())
    assert len(history["float"]) == 3
    assert len(history["guided"]["epochs"]) == 5
    assert str(out) in printed.replace("\n", "")


def test_the_float_network_loads_into_the_model(run):
    _, out, _ = run
    model = DigitsNet()
    model.load_state_dict(torch.load(out / "float.pt", weights_only=True))
    torch.load(out / "lowered.pt", weights_only=True)


def test_both_accuracies_and_each_epoch_are_shown(run):
    result, _, printed = run
    assert f"{100 * result.float_accuracy:.2f} %" in printed
    assert f"{100 * result.quantized_accuracy:.2f} %" in printed
    for line in ("float training 3/3", "guided training 5/5", "within budget"):
        assert line in printed


def test_the_parts_of_the_data_are_apart_and_follow_the_seed():
    first, again, other = load_digits(3), load_digits(3), load_digits(4)
    sizes = [len(part.dataset) for part in (first.train, first.validation, first.test)]
    assert sum(sizes) == 1797
    assert first.num_test == sizes[2]
    images = [part.dataset.tensors[0] for part in (first.train, first.validation, first.test)]
    assert all(part.min() >= 0 and part.max() == 1 for part in images)
    assert torch.equal(images[2], again.test.dataset.tensors[0])
    assert not torch.equal(images[2], other.test.dataset.tensors[0])
