"""Running a module on copies of inputs, and telling where two results differ."""

import copy
import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UsageError
from cgmq_fx.passes.trace import fast_path_off

#: Relative to the largest element: what reordered float operations may change.
REASSOCIATION = 1e-4
_RUNS = 3


#: The inputs of one call: a tensor, positional values, or keyword values.
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword values of one call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}


def bound_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """Return what each parameter of forward gets in a call, defaults where it is left out."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def positional_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Return the values of a call, all by position.

    Raises:
        UsageError: the model has inputs that only keywords can give.
    """
    bound = bound_inputs(model, *args, **kwargs)
    if bound.kwargs:
        raise UsageError(
            f"{type(model).__name__}.forward{bound.signature} has inputs that only keywords can "
            f"give, {sorted(bound.kwargs)}; wrap it in a module that takes them by position"
        )
    return bound.args


def run(
    module: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool,
    gradients: bool = False,
) -> tuple[Any, Any]:
    """Return the outputs of a call with fixed random numbers, and what became of its inputs."""
    own, named = copy.deepcopy((tuple(inputs), dict(kwargs or {})))
    module.train(training)
    with torch.random.fork_rng(devices=()), fast_path_off():
        torch.manual_seed(0)
        with torch.set_grad_enabled(gradients):
            return module(*own, **named), (own, named)


def output_faults(wanted: Any, found: Any, tolerance: float = 0.0) -> Iterator[str]:
    """Yield where two results differ: types, structure, then tensor by tensor.

    Args:
        wanted: what should come out.
        found: what does.
        tolerance: of tensors, relative to the largest element; 0: bit for bit.
    """
    if type(wanted) is not type(found):
        yield f"the output is {type(found).__name__}, not {type(wanted).__name__}"
        return
    (leaves, spec), (others, other_spec) = map(pytree.tree_flatten, map(opened, (wanted, found)))
    if spec != other_spec:
        yield f"the output has the structure {other_spec}, not {spec}"
        return
    for index, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
        text = tensor_fault(leaf, other, tolerance)
        if text:
            yield f"output {index} {text}"


def persistent(compare: Callable[[], Iterator[str]]) -> Iterator[str]:
    """Yield the faults of a comparison of numbers that shows them at every one of some runs.

    Torch's products on a CPU may sum in another order for tensors at other addresses. A fault of
    the code shows each time.

    Args:
        compare: runs both modules, on fresh copies of them.
    """
    found: list[str] = []
    for _ in range(_RUNS):
        found = list(compare())
        if not found:
            return
    yield from found


def opened(value: Any) -> Any:
    """Return nested containers with dataclasses, which pytree does not know, as dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {type(value).__qualname__: opened(fields)}
    has_more = dataclasses.is_dataclass
    return pytree.tree_map(lambda leaf: opened(leaf) if has_more(leaf) else leaf, value)


def tensors_of(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors in nested containers."""
    return tuple(leaf for leaf in pytree.tree_leaves(opened(value)) if isinstance(leaf, Tensor))


def tensor_fault(wanted: Any, found: Any, tolerance: float = 0.0) -> str:
    """Return how `found` differs from `wanted`, or "" where it does not."""
    if not isinstance(wanted, Tensor) or not isinstance(found, Tensor):
        same = type(wanted) is type(found) and wanted == found
        return "" if same else f"is {found!r}, not {wanted!r}"
    if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
        return f"is {_kind(found)}, not {_kind(wanted)}"
    if torch.equal(wanted, found) or wanted.numel() == 0:
        return ""
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return f"differs in {int((wanted != found).sum())} of {wanted.numel()} elements"
    wanted, found = wanted.detach(), found.detach()
    size = float(torch.nan_to_num(wanted, posinf=0, neginf=0).abs().max()) if tolerance else 0.0
    allowed = tolerance * size
    if torch.allclose(found, wanted, rtol=tolerance, atol=allowed, equal_nan=True):
        return ""
    gap = float(torch.nan_to_num((found - wanted).abs(), nan=torch.inf).max())
    limit = f"{allowed:.3g} is allowed" if tolerance else "they must be equal bit for bit"
    return f"differs by up to {gap:.3g}; {limit}"


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def digest(tensor: Tensor) -> str:
    """Return a short text that is the same for tensors of the same elements."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return f"{tensor.device.type} {tensor.layout}"
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()
