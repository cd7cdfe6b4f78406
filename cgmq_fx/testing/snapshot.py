"""What must not change in a user's model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from cgmq_fx.testing.compare import digest

#: Attributes of a module that are its settings: plain values under a public name.
_SCALARS = (int, float, bool, str, tuple, type(None))


@dataclass(frozen=True)
class Snapshot:
    """What must not change in a model: tensors by content and place, modes, attributes, hooks."""

    tensors: Mapping[str, tuple[int, int, str]]
    modules: Mapping[str, tuple[object, ...]]

    @staticmethod
    def of(model: nn.Module) -> "Snapshot":
        """Take the snapshot of `model`."""
        return Snapshot(
            {
                name: (id(tensor), tensor.data_ptr(), digest(tensor))
                for name, tensor in named_tensors(model)
            },
            {name: _description(module) for name, module in model.named_modules()},
        )

    def faults(self, model: nn.Module, by: str = "prepare") -> Iterator[str]:
        """Yield what is different in `model` now; `by` says who changed it."""
        now = Snapshot.of(model)
        for kind, before, after in (
            ("tensor", self.tensors, now.tensors),
            ("module", self.modules, now.modules),
        ):
            for name in sorted({*before, *after}):
                if before.get(name) != after.get(name):
                    yield f"{by} changed the {kind} '{name}' of the user's model"


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return parameters, then buffers, under every name that each has."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    return [*named, *model.named_buffers(remove_duplicate=False)]


def settings_of(module: nn.Module) -> dict[str, object]:
    """Return the public attributes of a module that are plain values, such as ``eps``."""
    found = {key: value for key, value in vars(module).items() if isinstance(value, _SCALARS)}
    return {key: value for key, value in found.items() if not key.startswith("_")}


def _description(module: nn.Module) -> tuple[object, ...]:
    hooks = [key for key, value in vars(module).items() if "hooks" in key and value]
    return type(module), module.training, tuple(vars(module)), module.extra_repr(), tuple(hooks)
