"""A real training process gets SIGKILL at random moments, and ends as if it had not."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_and_resume.py"


@pytest.mark.slow
def test_six_kills_change_nothing():
    command = [sys.executable, str(SCRIPT), "--kills", "6", "--epochs", "8", "--every", "2"]
    command += ["--optimizer", "adamw"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills" in done.stdout
    assert "the same, bit for bit" in done.stdout
