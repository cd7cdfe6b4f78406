"""Processes under torchrun train one model: the same bit-widths everywhere, the result of one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distributed_run

SCRIPT = Path(distributed_run.__file__)
# Batch norms see half or a quarter of a batch, and the task is noisy at so few steps.
NOISE = 0.06


def processes(number, kinds, folder):
    """Run so many processes and return what each found, by kind."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(number), str(SCRIPT), ",".join(kinds), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        kind: [torch.load(folder / f"{kind}{rank}.pt") for rank in range(number)] for kind in kinds
    }


@pytest.fixture(scope="module")
def alone():
    torch.manual_seed(0)
    return distributed_run.train("one", 0, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return processes(2, ("ddp", "fsdp"), tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return processes(4, ("ddp", "fsdp"), tmp_path_factory.mktemp("four"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("number", ["two", "four"])
class TestRanks:
    @pytest.fixture
    def ranks(self, request, kind, number):
        return request.getfixturevalue(number)[kind]

    def test_the_same_bit_widths_and_ranges_at_every_step(self, ranks):
        first = ranks[0]
        assert len(set(first["widths"])) > 2
        for other in ranks[1:]:
            assert other["widths"] == first["widths"]
            assert torch.equal(other["ranges"], first["ranges"])
            assert torch.equal(other["statistics"], first["statistics"])
            assert all(map(torch.equal, other["samples"], first["samples"]))

    def test_the_result_is_that_of_one_process_on_the_whole_batch(self, ranks, alone):
        assert all(rank["satisfied"] for rank in ranks)
        assert ranks[0]["accuracy"] == pytest.approx(alone["accuracy"], abs=NOISE)
        assert alone["accuracy"] > 0.8

    def test_a_first_range_is_that_of_the_whole_batch(self, ranks, alone):
        found, expected = ranks[0]["first_input_range"], alone["first_input_range"]
        assert torch.allclose(found, expected, rtol=0.05)


@pytest.mark.slow
def test_a_sharded_model_is_lowered_as_one_that_has_its_state(two, four):
    for ranks in (two["fsdp"], four["fsdp"]):
        assert torch.equal(ranks[0]["output"], ranks[0]["from_state"])
        assert all(rank["bits"] == ranks[0]["bits"] for rank in ranks)
        assert "are sharded by fully_shard" in ranks[0]["refused"]
        assert "'0', '3'" in ranks[0]["refused_parts"]


@pytest.mark.slow
def test_ranks_with_other_settings_are_told_so(two):
    for rank in two["ddp"]:
        assert "rank 0: {'direction': 'fisher', 'total_steps': 10" in rank["disagreement"]
        assert "rank 1: {'direction': 'fisher', 'total_steps': 11" in rank["disagreement"]
