"""Proxies that record in-place operations and answer questions whose answer shapes decide.

`torch.fx.Proxy` turns ``x += y`` into ``x = x + y``, which is another program when ``x`` has a
second name, and cannot answer ``len(x)`` or ``range(x.shape[1])``. These do; what they answer comes
from the tracer, which records a guard for each answer.
"""

import operator
from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import fx
from torch.fx.proxy import Attribute, TracerBase


class Answering(Protocol):
    """What these proxies ask of their tracer."""

    def python_value(self, proxy: fx.Proxy, question: str) -> Any:
        """Return the Python value of `proxy`, recording a guard on it."""


class TracedValue(fx.Proxy):
    """A `torch.fx.Proxy` that keeps in-place semantics and has a length, an index and members."""

    tracer: TracerBase

    def __getattr__(self, k: str) -> "TracedAttribute":
        return TracedAttribute(self, k)

    def _answer(self, question: str) -> Any:
        return cast(Answering, self.tracer).python_value(self, question)

    def __index__(self) -> int:
        return operator.index(self._answer("an index"))

    def __int__(self) -> int:
        return int(self._answer("an integer"))

    def __float__(self) -> float:
        return float(self._answer("a float"))

    def __len__(self) -> int:
        length: Any = self.tracer.create_proxy("call_function", len, (self,), {})
        return int(length)

    def __contains__(self, item: object) -> bool:
        return bool(self.tracer.create_proxy("call_function", operator.contains, (self, item), {}))

    def __setitem__(self, key: object, value: object) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class TracedAttribute(Attribute, TracedValue):
    """An attribute of a traced value, such as ``x.shape``."""

    def __getattr__(self, k: str) -> "TracedAttribute":
        return TracedAttribute(self, k)


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[TracedValue, object], fx.Proxy]:
    def method(self: TracedValue, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    setattr(TracedValue, f"__{_name}__", _in_place(getattr(operator, _name)))
