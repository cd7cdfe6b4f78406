"""Where a graph reads the mode of a module: a child of that module, which `train()` reaches."""

from collections.abc import Mapping

from torch import fx, nn

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.passes.guards import TrainingMode, check_mode

#: Name of the submodule that a graph asks for the mode of its owner.
TRAINING_MODE = "training_mode"


def mode_target(path: str) -> str:
    """Return the target of a node that reads the mode of the module at `path`."""
    return f"{path}.{TRAINING_MODE}" if path else TRAINING_MODE


def add_modes(model: nn.Module, graph: fx.Graph) -> None:
    """Give each module whose mode `graph` reads the child that returns it.

    Raises:
        UnsupportedModelError: a module uses the name itself.
    """
    for node in graph.find_nodes(op="call_module"):
        path, _, name = str(node.target).rpartition(".")
        if name == TRAINING_MODE:
            add_mode(model, path)


def add_mode(model: nn.Module, path: str) -> None:
    """Give the module at `path` of `model` the child that returns its mode, if it has none."""
    owner = model.get_submodule(path)
    known = getattr(owner, TRAINING_MODE, None)
    if isinstance(known, TrainingMode):
        return
    if known is not None:
        raise UnsupportedModelError(
            f"the module '{path}' has an attribute '{TRAINING_MODE}', a name that a prepared graph "
            f"uses itself; rename it"
        )
    flag = TrainingMode()
    flag.training = owner.training
    owner.add_module(TRAINING_MODE, flag)


def guard_modes(graph: fx.Graph, branching: Mapping[str, str]) -> None:
    """Guard that modules which branch are in the mode of the model, which picks the branch.

    Args:
        graph: a graph that serves both modes.
        branching: the modules by path, and the place where each branches.
    """
    first = next(node for node in graph.nodes if node.op != "placeholder")
    paths = [path for path in branching if path]
    with graph.inserting_before(first):
        mode = graph.call_module(TRAINING_MODE) if paths else None
        for path in paths:
            own = graph.call_module(mode_target(path))
            graph.call_function(check_mode, (own, mode, path, branching[path]))


class ModeAttribute:
    """Makes ``module.training`` the mode's proxy for as long as the module's forward is traced."""

    def __init__(self, module: nn.Module, mode: fx.Proxy) -> None:
        self._module, self._mode = module, mode
        self._training = module.training

    def __enter__(self) -> None:
        self._module.__dict__["training"] = self._mode

    def __exit__(self, *exc_info: object) -> None:
        self._module.__dict__["training"] = self._training
