"""The folders passes/ and cost/ exist under one name only, cgmq_fx.passes and cgmq_fx.cost."""

import subprocess
import sys

import pytest

from source_tree import ROOT

FOLDERS = ("passes", "cost")


def stray_modules(names):
    return sorted(name for name in names if name.partition(".")[0] in FOLDERS)


def test_no_test_has_imported_a_second_copy():
    assert stray_modules(sys.modules) == []


def test_a_second_copy_would_be_seen():
    names = ["cgmq_fx.passes.meta", "passes.meta", "cost", "costly"]
    assert stray_modules(names) == ["cost", "passes.meta"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_importing_a_folder_as_a_top_level_package_is_refused(folder):
    """From the root, where `python -c` puts the folder on sys.path."""
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"ImportError: import cgmq_fx.{folder}, not {folder}" in result.stderr


@pytest.mark.parametrize("folder", ["tests", *(f"tests/{name}" for name in FOLDERS)])
def test_the_tests_form_no_package(folder):
    """tests/passes/__init__.py would make a top-level package `passes` out of the tests."""
    assert not (ROOT / folder / "__init__.py").exists()
