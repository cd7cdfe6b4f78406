"""The names that users import: each is documented, and a changed signature shows in review."""

import importlib
import inspect
from enum import Enum
from types import ModuleType

import pytest

import cgmq_fx
from golden import check_golden

PACKAGES = ("cgmq_fx", "cgmq_fx.passes", "cgmq_fx.cost", "cgmq_fx.testing")


def public_names(package):
    """The classes and functions of a package, without what importing its modules leaves there."""
    return {
        name: value
        for name, value in sorted(vars(package).items())
        if not name.startswith("_") and not isinstance(value, ModuleType) and callable(value)
    }


def signature_text(value):
    """The arguments of a callable with their defaults, the bases of an error, an enum's members."""
    if inspect.isclass(value) and issubclass(value, Exception):
        return f"({', '.join(base.__name__ for base in value.__bases__)})"
    if inspect.isclass(value) and issubclass(value, Enum):
        return f"({', '.join(value.__members__)})"
    signature = inspect.signature(value)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(bare))


@pytest.mark.parametrize("package", PACKAGES)
def test_signatures_are_the_reviewed_ones(package):
    names = public_names(importlib.import_module(package))
    text = "\n".join(f"{name}{signature_text(value)}" for name, value in names.items())
    check_golden(f"api__{package.rpartition('.')[2]}", text)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package):
    bare = [
        name
        for name, value in public_names(importlib.import_module(package)).items()
        if len((inspect.getdoc(value) or "").split()) < 5
    ]
    assert bare == []


def test_every_error_is_one_that_a_caller_can_catch_at_once():
    errors = [v for v in public_names(cgmq_fx).values() if inspect.isclass(v)]
    errors = [error for error in errors if issubclass(error, Exception)]
    assert len(errors) > 3
    assert all(issubclass(error, cgmq_fx.CgmqError) for error in errors)
