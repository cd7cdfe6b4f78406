"""The examples in docstrings are right; each module is imported by its real name."""

import doctest
import importlib

import pytest

import torchvision_shim  # noqa: F401  # lightning imports torchvision
from source_tree import PACKAGE_OF_FOLDER, module_files

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", sorted(module_files()))
def test_the_examples_of_a_module_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples in {name} are wrong"


def test_modules_of_all_three_folders_are_found():
    assert set(PACKAGE_OF_FOLDER.values()) <= set(module_files())
