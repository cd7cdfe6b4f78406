"""The runner of the sweeps: models of timm, what counts as a miss, and a run that goes on."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_sweep(script, *arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_models_of_timm_are_prepared_with_every_law(tmp_path):
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    models = "lcnet_075,efficientvit_m2,levit_192"
    done = run_sweep("timm_sweep.py", "--models", models, "--rows", rows, "--output", page)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {outcome["name"] for outcome in outcomes} == set(models.split(","))
    assert "exact MACs 3/3" in page.read_text()

    again = run_sweep("timm_sweep.py", "--models", models, "--rows", rows, "--resume")
    assert again.returncode == 0
    assert "[1/3]" not in again.stdout
