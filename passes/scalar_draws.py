"""Decides comparisons of a random number with a bound that it can never cross.

A layer that is skipped at random asks ``torch.rand([]) < p`` for a probability p that is 0 in most
configurations. Export cannot ask tensors for their values, but the answer does not depend on it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_LESS = (torch.lt, torch.Tensor.lt, torch.Tensor.__lt__, torch.less)
_LESS_OR_EQUAL = (torch.le, torch.Tensor.le, torch.Tensor.__le__)
_GREATER = (torch.gt, torch.Tensor.gt, torch.Tensor.__gt__, torch.greater)
_GREATER_OR_EQUAL = (torch.ge, torch.Tensor.ge, torch.Tensor.__ge__)


class ScalarDraws(TorchFunctionMode):
    """Answers ``u < p`` for a scalar u of `torch.rand`, in [0, 1), where p decides it."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn = WeakIdKeyDictionary()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `function`, or answer a comparison."""
        answer = self._answer(function, args)
        if answer is not None:
            return answer
        result = function(*args, **(kwargs or {}))
        if function is torch.rand and result.dim() == 0:
            self._drawn[result] = True
        return result

    def _answer(self, function: Callable[..., Any], args: tuple[Any, ...]) -> bool | None:
        if len(args) != 2 or not isinstance(args[1], int | float) or not self._is_draw(args[0]):
            return None
        bound = args[1]
        if function in _LESS or function in _GREATER_OR_EQUAL:
            decided = False if bound <= 0 else True if bound >= 1 else None
            return decided if function in _LESS or decided is None else not decided
        if function in _LESS_OR_EQUAL or function in _GREATER:
            decided = False if bound < 0 else True if bound >= 1 else None
            return decided if function in _LESS_OR_EQUAL or decided is None else not decided
        return None

    def _is_draw(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value in self._drawn
