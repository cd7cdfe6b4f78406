"""What `verify` reads out of a file is what `report` says of the module; damage is refused."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmark_scripts import script
from cgmq_fx.testing import models

verify_agrees = script("verify_agrees")
mutated_files = script("mutated_files")


@settings(max_examples=60)
@given(models(), st.data())
def test_the_file_alone_says_what_the_report_says(drawn, data):
    with TemporaryDirectory() as folder:
        verify_agrees.check(drawn, data, Path(folder))


@settings(max_examples=6)
@given(models(), st.data())
def test_a_program_alone_says_what_the_report_says(drawn, data):
    with TemporaryDirectory() as folder:
        verify_agrees.check(drawn, data, Path(folder), ".pt2")


@settings(max_examples=4)
@given(models(), st.data())
def test_a_program_of_executorch_alone_says_what_the_report_says(drawn, data):
    with TemporaryDirectory() as folder:
        verify_agrees.check(drawn, data, Path(folder), ".pte")


@pytest.mark.parametrize("suffix", [".onnx", ".qonnx.onnx"])
@settings(max_examples=6)
@given(models(), st.data())
def test_an_onnx_file_alone_says_what_the_report_says(suffix, drawn, data):
    with TemporaryDirectory() as folder:
        verify_agrees.check(drawn, data, Path(folder), suffix)


def test_mutated_programs_of_executorch_are_refused_or_say_the_same():
    outcomes, longest = mutated_files.run(150, seed=1, suffix=".pte")
    assert sum(n for name, n in outcomes.items() if name.endswith("refused")) > 90
    assert longest < mutated_files.LIMIT_S


@pytest.mark.parametrize("suffix", [".onnx", ".qonnx.onnx"])
def test_mutated_onnx_files_are_refused_or_say_the_same(suffix):
    outcomes, longest = mutated_files.run(150, seed=1, suffix=suffix)
    assert sum(n for name, n in outcomes.items() if name.endswith("refused")) > 90
    assert longest < mutated_files.LIMIT_S


def test_mutated_programs_are_refused_or_say_the_same():
    outcomes, longest = mutated_files.run(150, seed=1, suffix=".pt2")
    assert sum(n for name, n in outcomes.items() if name.endswith("refused")) > 90
    assert longest < mutated_files.LIMIT_S


def test_mutated_files_are_refused_or_say_the_same():
    outcomes, longest = mutated_files.run(300, seed=1)
    assert sum(outcomes.values()) == 300
    assert sum(n for name, n in outcomes.items() if name.endswith("refused")) > 250
    assert longest < mutated_files.LIMIT_S
