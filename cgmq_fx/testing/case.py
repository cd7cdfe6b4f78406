"""One case of a test: a model as Python source that runs by itself, with inputs."""

import copy
import functools
import hashlib
import inspect
import linecache
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from cgmq_fx.errors import UsageError

#: Names that the source of a case defines; `MAKE_KWARGS` only where there are keyword inputs.
MAKE_MODEL, MAKE_INPUTS, MAKE_KWARGS = "make_model", "make_inputs", "make_kwargs"


@dataclass(frozen=True)
class Given:
    """A model and inputs that a user brings; every case made of them works on copies."""

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A model with inputs; both are made anew, and alike, at every call.

    The model is what `source` makes, so a failing case can be copied into a file and run. It needs
    nothing but torch.

    >>> case = Case('''
    ... import torch
    ... from torch import nn
    ...
    ... def make_model():
    ...     torch.manual_seed(0)
    ...     return nn.Linear(2, 1)
    ...
    ... def make_inputs():
    ...     return (torch.ones(3, 2),)
    ... ''')
    >>> case.model()(*case.inputs()).shape
    torch.Size([3, 1])
    >>> [node.op for node in case.graph_module().graph.nodes][0]
    'placeholder'

    Attributes:
        source: a Python script that defines ``make_model()``, ``make_inputs()`` and, where there
            are keyword inputs, ``make_kwargs()``; as a file it runs, and traces, the model. For a
            model that a user brought: the code of its graph, or its repr.
        traits: what is in it, names of `cgmq_fx.testing.TRAITS`.
        batch_axis: the axis of every input that counts samples.
        given: the model and inputs of a case made by `of`.
    """

    source: str
    traits: frozenset[str] = frozenset()
    batch_axis: int = 0
    given: Given | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Sequence[Any] | torch.Tensor,
        kwargs: Mapping[str, Any] | None = None,
        *,
        batch_axis: int = 0,
    ) -> "Case":
        """Return a case of your own model, or graph module, and the inputs of one call.

        The model is copied now, so that training it later does not change the case.

        >>> Case.of(nn.Linear(2, 3), torch.ones(1, 2)).model()
        Linear(in_features=2, out_features=3, bias=True)

        Raises:
            UsageError: the model is not an `nn.Module`, or the inputs are not a sequence.
        """
        if not isinstance(model, nn.Module):
            raise UsageError(f"model is {type(model).__name__}, not an nn.Module; give the model")
        if isinstance(inputs, torch.Tensor):
            inputs = (inputs,)
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
            raise UsageError(
                f"inputs is {type(inputs).__name__}; give a tuple of the model's inputs, such as "
                f"(x,), and keyword inputs as kwargs={{...}}"
            )
        given = Given(*copy.deepcopy((model, tuple(inputs), dict(kwargs or {}))))
        text = model.code if isinstance(model, fx.GraphModule) else repr(model)
        return cls(text, batch_axis=batch_axis, given=given)

    def model(self) -> nn.Module:
        """Return the model, fresh, in the mode in which the source leaves it: training."""
        if self.given is not None:
            return copy.deepcopy(self.given.model)
        model = self._make(MAKE_MODEL)
        assert isinstance(model, nn.Module)
        return model

    def inputs(self) -> tuple[Any, ...]:
        """Return the positional inputs of one call, fresh."""
        if self.given is not None:
            return copy.deepcopy(self.given.inputs)
        return tuple(self._make(MAKE_INPUTS))

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword inputs of one call, fresh; mostly there are none."""
        if self.given is not None:
            return copy.deepcopy(dict(self.given.kwargs))
        return dict(self._make(MAKE_KWARGS)) if MAKE_KWARGS in _namespace(self.source) else {}

    def graph_module(self) -> fx.GraphModule:
        """Return the model traced by `torch.fx.symbolic_trace`, fresh.

        A `fx.GraphModule` that a user brought is not traced again.
        """
        model = self.model()
        return model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)

    def exported(self, *, dynamic_batch: bool = True) -> torch.export.ExportedProgram:
        """Return the model exported by `torch.export`, in training mode.

        Args:
            dynamic_batch: leave the extent of `batch_axis` of every tensor open.
        """
        model, inputs, kwargs = self.model(), self.inputs(), self.kwargs()
        shapes = None
        if dynamic_batch:
            bound = inspect.signature(model.forward).bind(*inputs, **kwargs)
            shapes = {name: self._open_axes(value) for name, value in bound.arguments.items()}
        return torch.export.export(model, inputs, kwargs, dynamic_shapes=shapes)

    def write(self, path: str | Path) -> Path:
        """Write the source to a file, which runs by itself.

        Raises:
            UsageError: the case was made of a user's model, whose source is not known.
        """
        if self.given is not None:
            raise UsageError(
                f"this case was made of your own {type(self.given.model).__name__}, of which only "
                f"the code of its forward is known; only drawn cases can be written"
            )
        path = Path(path)
        path.write_text(self.source, encoding="utf-8")
        return path

    def __repr__(self) -> str:
        """Return the source under a heading that is a comment."""
        return f"# {self._heading()}\n{self.source}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Give Hypothesis one line; the strategies let it print the source, which is not indented.

        Hypothesis indents the arguments of a failing example, and indented source does not run.
        """
        printer.text(f"<{self._heading()}>")

    def _open_axes(self, value: object) -> dict[int, Any] | None:
        has_axis = isinstance(value, torch.Tensor) and value.dim() > self.batch_axis
        return {self.batch_axis: torch.export.Dim.DYNAMIC} if has_axis else None

    def _heading(self) -> str:
        found = ", ".join(sorted(self.traits))
        return f"Case: {found}" if found else "Case"

    def _make(self, name: str) -> Any:
        with torch.random.fork_rng(devices=()):
            return _namespace(self.source)[name]()


@functools.lru_cache(maxsize=64)
def _namespace(source: str) -> dict[str, Any]:
    """Return what a script defines; its lines are known to tracebacks."""
    file = f"<case {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"__name__": "cgmq_fx_case"}
    exec(compile(source, file, "exec"), namespace)
    return namespace
