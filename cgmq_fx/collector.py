"""Making many objects at once without the collector of cyclic garbage walking over them."""

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def without_collector(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return `function` with the collector paused while it runs, as far as that was on.

    Python looks for cycles whenever so many objects were made; where nearly all of them stay, as
    those of a graph do, that finds nothing, and takes longer the more there are.
    """

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if not gc.isenabled():
            return function(*args, **kwargs)
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()

    return run
