"""Batches of a loader as the arguments of a prepared model; labels in them are left out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx

from cgmq_fx.errors import CgmqError, TrainingError, UsageError
from cgmq_fx.passes.values import map_tensors
from cgmq_fx.prepared import PreparedModule, bind_inputs

#: The inputs of one call, one value for each placeholder.
Inputs = tuple[Any, ...]


def model_inputs(
    prepared: PreparedModule, loader: Iterable[Any], batches: int | None, caller: str
) -> Iterator[Inputs]:
    """Yield the inputs of each batch, on the device of the model.

    A batch is a tensor, the only input; a sequence, whose first items are the inputs, as many as
    the model has without a default; or a mapping with the names of inputs. What else a batch has,
    labels above all, is left out.

    Args:
        prepared: what `prepare` returned.
        loader: the batches.
        batches: how many to take; None: all.
        caller: what messages call the function that wants them.

    Raises:
        UsageError: a batch is none of these, there is none, or `batches` makes no sense.
        UnsupportedModelError: a batch does not have what the model takes.
    """
    given = taken(loader, batches, caller)
    first = next(prepared.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    count = 0
    for count, batch in enumerate(given, start=1):
        args, kwargs = _arguments(prepared, batch, f"{caller}, batch {count}")
        bound = bind_inputs(prepared.graph, args, kwargs)
        yield map_tensors(lambda x: x.to(device), bound)
    if not count:
        raise UsageError(f"{caller}: the loader gave no batch; give one that is not empty")


def taken(loader: Iterable[Any], batches: int | None, caller: str) -> Iterator[Any]:
    """Return the first batches of a loader.

    Args:
        loader: the batches.
        batches: how many; None: all.
        caller: what messages call the function that wants them.

    Raises:
        UsageError: `loader` is none, or `batches` makes no sense.
    """
    if batches is not None and (isinstance(batches, bool) or batches < 1):
        raise UsageError(f"{caller}: batches={batches!r} must be at least 1, or None for all")
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor | str):
        raise UsageError(
            f"{caller} got the loader {type(loader).__name__}; give a DataLoader, or a list of "
            f"batches such as [x]"
        )
    return islice(loader, batches)


def run(prepared: PreparedModule, inputs: Inputs) -> Any:
    """Return what the model makes of the inputs of a call."""
    nodes = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for node, value in zip(nodes, inputs, strict=True):
        name = str(node.target)
        if name.startswith("**"):
            kwargs |= value
        elif name.startswith("*"):
            args.extend(value)
        else:
            kwargs[name] = value
    if not args:
        return prepared(**kwargs)
    before = [kwargs.pop(str(node.target)) for node in nodes[: _place_of_starred(nodes)]]
    return prepared(*before, *args, **kwargs)


def at_batch(error: CgmqError, caller: str, number: int) -> TrainingError:
    """Return an error that says at which batch another came up."""
    return TrainingError(f"{caller}, batch {number}: {error}")


def _place_of_starred(nodes: Sequence[fx.Node]) -> int:
    names = [str(node.target) for node in nodes]
    return next(place for place, name in enumerate(names) if name.startswith("*"))


def _arguments(
    prepared: PreparedModule, batch: Any, place: str
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    nodes = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        named = {str(node.target): node for node in nodes}
        found = {name: value for name, value in batch.items() if name in named}
        if found:
            return (), found
        raise UsageError(
            f"{place} has the keys {list(batch)}, and the model takes {list(named)}; give it "
            f"batches with these names"
        )
    if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        required = sum(1 for node in nodes if not node.args)
        return tuple(batch[: max(1, required)]), {}
    raise UsageError(
        f"{place} is {type(batch).__name__}; give a tensor, a sequence that begins with the "
        f"inputs, or a mapping with their names"
    )
