"""The kit still finds what it found in passes that ship with torch; see the benchmark for all."""

import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch.fx.experimental.normalize import NormalizeOperators

from cgmq_fx.passes.base import Numerics
from cgmq_fx.testing import Case, LawError, check_pass, graph_modules

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch warns of itself
    from torch.fx.experimental.optimization import fuse

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="the defects are those of torch 2.13"
)


def breaking_case(
    cases: st.SearchStrategy[Case], pass_: Callable[[Any], Any], numerics: Numerics
) -> Case:
    """Return a drawn case on which the numbers of a pass are wrong, or fail."""

    def breaks(case: Case) -> bool:
        try:
            check_pass(pass_, case, numerics=numerics, training=False)
        except LawError as error:
            return error.law == "numerics"
        return False

    few = settings(
        max_examples=60,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return hypothesis.find(cases, breaks, settings=few)


def test_fuse_folds_a_layer_that_is_also_called_elsewhere():
    case = breaking_case(
        graph_modules(max_layers=2, require={"conv_bn", "reused"}), fuse, Numerics.REASSOCIATED
    )
    model, inputs = case.model().eval(), case.inputs()
    with torch.no_grad():
        wanted = torch.utils._pytree.tree_leaves(model(*inputs, **case.kwargs()))
        found = torch.utils._pytree.tree_leaves(fuse(model)(*inputs, **case.kwargs()))
    assert not all(torch.allclose(a, b, atol=1e-2) for a, b in zip(wanted, found, strict=True))


def test_normalising_operators_loses_alpha():
    case = breaking_case(
        graph_modules(max_layers=2, require={"constants"}),
        lambda gm: NormalizeOperators(gm).transform(),
        Numerics.EXACT,
    )
    assert "alpha=" in case.source
