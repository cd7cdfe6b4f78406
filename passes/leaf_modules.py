"""Which submodules the user means: by path, glob, type or predicate."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from cgmq_fx.errors import UsageError

#: A path or glob, a class of modules, or a question about a module.
ModuleSelector = str | type[nn.Module] | Callable[[nn.Module], bool]


def match(
    root: nn.Module, selectors: ModuleSelector | Iterable[ModuleSelector], argument: str
) -> frozenset[str]:
    """Return the paths of the submodules of `root` that one of `selectors` names.

    A string is compared with the path of a module and with the paths of those around it, so that
    ``"encoder"`` and ``"encoder.*"`` name all of the encoder.

    Args:
        root: the model.
        selectors: one selector or several.
        argument: what the caller's argument is called, for errors.

    Raises:
        UsageError: a selector is of another kind, or names nothing.
    """
    given = _as_sequence(selectors)
    wrong = [repr(item) for item in given if not _is_selector(item)]
    if wrong:
        raise UsageError(
            f"{argument} has {', '.join(wrong)}; name submodules by a path or glob such as "
            f"'encoder.*', by a class of modules, or by a function of a module that returns a bool"
        )
    modules = {name: module for name, module in root.named_modules(remove_duplicate=False) if name}
    chosen = [
        {path for path, module in modules.items() if _names(item, path, module)} for item in given
    ]
    faults = [
        f"{_spelled(item)} ({_alternatives(item, modules)})"
        for item, paths in zip(given, chosen, strict=True)
        if not paths
    ]
    if faults:
        raise UsageError(
            f"{argument} names no submodule of {type(root).__name__}: {'; '.join(faults)}"
        )
    return frozenset().union(*chosen)


def _as_sequence(
    selectors: ModuleSelector | Iterable[ModuleSelector],
) -> Sequence[ModuleSelector]:
    if isinstance(selectors, str | type) or not isinstance(selectors, Iterable):
        return (selectors,)
    return tuple(selectors)


def _is_selector(item: object) -> bool:
    if isinstance(item, type):
        return issubclass(item, nn.Module)
    return isinstance(item, str) or (callable(item) and not isinstance(item, nn.Module))


def _names(selector: ModuleSelector, path: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        parts = path.split(".")
        around = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
        return any(name == selector or fnmatchcase(name, selector) for name in around)
    if inspect.isclass(selector):
        return isinstance(module, selector)
    return bool(selector(module))


def _spelled(selector: ModuleSelector) -> str:
    return repr(selector) if isinstance(selector, str) else getattr(selector, "__name__", "?")


def _alternatives(selector: ModuleSelector, modules: dict[str, nn.Module]) -> str:
    if isinstance(selector, str):
        close = difflib.get_close_matches(selector, modules, cutoff=0.4)
        return f"close: {', '.join(map(repr, close))}" if close else f"it has {_some(modules)}"
    kinds = dict.fromkeys(type(module).__name__ for module in modules.values())
    return f"it has modules of {_some(kinds)}"


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "none"
