"""Hypothesis strategies that draw models and graphs for tests of graph transforms."""

import difflib
from collections.abc import Collection

from hypothesis import note
from hypothesis import strategies as st

from cgmq_fx.errors import UsageError
from cgmq_fx.testing.case import Case
from cgmq_fx.testing.programs import programs
from cgmq_fx.testing.traits import OPT_IN, TRAITS


def models(
    *,
    max_layers: int = 6,
    traits: Collection[str] | None = None,
    exclude: Collection[str] = (),
    require: Collection[str] = (),
) -> st.SearchStrategy[Case]:
    """Draw eager models in training mode, each with inputs and with its source.

    Where a test fails, Hypothesis prints the source of the smallest model found: a script that runs
    by itself, without this package.

    >>> from hypothesis import find
    >>> case = find(models(), lambda case: "depthwise" in case.traits)
    >>> "groups=" in case.source, case.model()(*case.inputs()).shape[0]
    (True, 3)

    Args:
        max_layers: how many blocks a model has at most; a block is one layer or a small structure
            such as a residual branch. What is required may need more.
        traits: all that models may have, names of `TRAITS`; by default everything but what has to
            be asked for (`OPT_IN`).
        exclude: what no model has.
        require: what every model has.

    Raises:
        UsageError: a name is unknown, or nothing can be built of what is allowed.
    """
    return _cases(max_layers, traits, exclude, require)


def graph_modules(
    *,
    max_layers: int = 6,
    traits: Collection[str] | None = None,
    exclude: Collection[str] = (),
    require: Collection[str] = (),
) -> st.SearchStrategy[Case]:
    """Draw models that `torch.fx.symbolic_trace` traces; take the graph with `Case.graph_module`.

    >>> from hypothesis import find
    >>> case = find(graph_modules(require={"residual"}), lambda case: True)
    >>> sorted({node.op for node in case.graph_module().graph.nodes} - {"call_function"})
    ['call_module', 'output', 'placeholder']

    The arguments are those of `models`.
    """
    return _cases(max_layers, traits, exclude, require)


#: What `torch.export` cannot export: a dataclass that it was not told of, and, in training mode, an
#: average that depends on the number of batches seen.
NOT_EXPORTED = frozenset({"dataclass_output", "momentum_none"})


def exported_programs(
    *,
    max_layers: int = 6,
    traits: Collection[str] | None = None,
    exclude: Collection[str] = (),
    require: Collection[str] = (),
) -> st.SearchStrategy[Case]:
    """Draw models that `torch.export` exports, any batch size left open; see `Case.exported`.

    >>> from hypothesis import find
    >>> case = find(exported_programs(require={"linear"}), lambda case: True)
    >>> any(str(node.target) == "aten.linear.default" for node in case.exported().graph.nodes)
    True

    The arguments are those of `models`; the traits in `NOT_EXPORTED` are always excluded.
    """
    return _cases(max_layers, traits, {*exclude, *NOT_EXPORTED}, require)


def _cases(
    max_layers: int,
    traits: Collection[str] | None,
    exclude: Collection[str],
    require: Collection[str],
) -> st.SearchStrategy[Case]:
    if max_layers < 0:
        raise UsageError(f"max_layers is {max_layers}; give how many blocks there may be, from 0")
    _check_names([*(traits or ()), *exclude, *require])
    found = frozenset(TRAITS) - OPT_IN if traits is None else frozenset(traits)
    allowed = (found | (frozenset(require) & OPT_IN)) - frozenset(exclude)
    if clash := sorted(frozenset(require) - allowed):
        raise UsageError(f"{clash} are required, but not among the traits that models may have")
    return programs(allowed, frozenset(require), max_layers).map(_printed)


def _printed(case: Case) -> Case:
    """Let Hypothesis print the source of a case where a test fails."""
    note(case.source)
    return case


def _check_names(names: Collection[str]) -> None:
    faults = []
    for name in sorted(set(names) - set(TRAITS)):
        close = difflib.get_close_matches(name, TRAITS, n=1)
        faults.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    if faults:
        raise UsageError(
            f"unknown traits {', '.join(faults)}; the traits are {', '.join(sorted(TRAITS))}"
        )
