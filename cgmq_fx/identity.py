"""What a checkpoint belongs to: graph, quantizers, cost tables, budget, settings.

Each part is a text that is the same in every process, so that two of them can be compared by their
hashes and a difference can be shown.
"""

import dataclasses
import enum
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx

from cgmq_fx.budget import Limit
from cgmq_fx.cost.operation import BoundOperation
from cgmq_fx.passes.candidates import is_quantizer
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizer_memory import quantizers_of

#: What the shapes of the inputs decide; there once shapes are known.
COSTS = "costs for the shapes of the inputs"

#: How the names of parts begin that only runs of `fit` have.
FIT = "fit's "

_WAYS_OUT = {
    "cgmq_fx": "install that version",
    "graph": "prepare the same model, with the same skip, overrides and share",
    COSTS: "give prepare example_inputs of the same shapes, or none",
}
_OF_FIT = (
    "take up a run of fit with fit(checkpoint=...) and the same arguments, any other with resume; "
    "resume(..., model_only=True) takes the model of either"
)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_TABLE = "cost table "
_LONGEST = 200  # characters of a line that messages show


def identity(prepared: PreparedModule) -> dict[str, str]:
    """Return the text of each part that two runs must have in common, by its name."""
    settings = prepared.plan.settings
    parts = {
        "cgmq_fx": version("cgmq-fx"),
        "graph": "\n".join(_graph_lines(prepared)),
        "budget": ", ".join(f"{name}: {_limit(x)}" for name, x in sorted(settings.limits.items())),
        **{f"{_TABLE}{name!r}": table.digest for name, table in settings.tables.items()},
        "widths": str(settings.widths),
        "input_bits": str(settings.input_bits),
        "per_channel": str(settings.per_channel),
        "granularity": settings.granularity,
        "batch_axis": str(settings.batch_axis),
        "front_end": settings.front_end,
    }
    if prepared.plan.is_priced:
        parts[COSTS] = "\n".join(_cost_lines(prepared))
    return parts


def hashed(parts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return each text with its ``sha256``, under ``text``, as plain data for a file."""
    return {
        name: {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for name, text in parts.items()
    }


def differences(
    saved: Mapping[str, Mapping[str, str]], given: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """Return one line for each part that is not the same.

    Costs count where both have them.
    """
    found: list[str] = []
    for name in dict.fromkeys((*saved, *given)):
        old, new = saved.get(name), given.get(name)
        if name == COSTS and (old is None or new is None or found):
            continue  # the other parts decide them too, and say more
        if old is None or new is None or old["sha256"] != new["sha256"]:
            found.append(f"{name} differs: {_difference(name, old, new)}{_way_out(name)}")
    return found


def _way_out(name: str) -> str:
    way = _OF_FIT if name.startswith(FIT) else _WAYS_OUT.get(name)
    return f" ({way})" if way else ""


def _difference(name: str, old: Mapping[str, str] | None, new: Mapping[str, str] | None) -> str:
    if old is None:
        return "none was saved, one is given"
    if new is None:
        return "one was saved, none is given"
    lines = old["text"].split("\n"), new["text"].split("\n")
    hashes = f"saved sha256 {old['sha256'][:12]}, given {new['sha256'][:12]}"
    if name.startswith(_TABLE):
        return hashes
    if len(lines[0]) == len(lines[1]) == 1:
        return f"saved {_cut(old['text'])}, given {_cut(new['text'])}"
    pairs = enumerate(zip_longest(*lines), 1)
    number, (first, second) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return f"{hashes}; at line {number} saved {_cut(first)}, given {_cut(second)}"


def _cut(line: str | None) -> str:
    if line is None:
        return "nothing more"
    return repr(line if len(line) <= _LONGEST else f"{line[:_LONGEST]}...")


def _limit(limit: Limit) -> str:
    """Return a bound exactly, which its readable form may round."""
    exact = f"share {limit.share}" if limit.share is not None else f"{limit.value} {limit.unit}"
    return f"{limit} (exactly {exact})"


def _cost_lines(prepared: PreparedModule) -> Iterator[str]:
    accounting = prepared.plan.accounting
    yield from map(_operation, accounting.operations)
    for site in accounting.sites:
        yield f"{site.name}: {site.elements} elements at {site.allowed}, learned {site.learned}"
    for name, amount in sorted(accounting.limits.items()):
        yield f"{name}: at most {amount} {accounting.resources[name].unit}"


def _operation(bound: BoundOperation) -> str:
    operation = bound.operation
    return (
        f"{operation.name}: {operation.op}, {operation.macs} MACs, {operation.weights} weights, "
        f"{operation.input_elements} elements in, {operation.output_elements} out"
    )


def _graph_lines(prepared: PreparedModule) -> Iterator[str]:
    """Yield nodes, then layers, quantizers, and tensors with their forms."""
    layers = []
    for node in prepared.graph.nodes:
        args = ", ".join(map(text_of, node.args))
        named = "".join(f", {key}={text_of(item)}" for key, item in node.kwargs.items())
        yield f"%{node.name} = {node.op} {_target(node)}({args}{named})"
        if node.op == "call_module" and not is_quantizer(prepared, node):
            layers.append(str(node.target))
    for path in dict.fromkeys(layers):
        layer = prepared.get_submodule(path)
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        yield from _ADDRESS.sub("", f"layer {path}: {kind} {layer!r}").split("\n")
    for path, quantizer in quantizers_of(prepared).items():
        yield f"{path}: {replace(quantizer.spec, chosen_by='')}"
    tensors = {
        **dict(prepared.named_parameters(remove_duplicate=False)),
        **dict(prepared.named_buffers(remove_duplicate=False)),
    }
    for path, tensor in tensors.items():
        yield f"{path}: {_form(tensor)}"


def _target(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def text_of(value: Any) -> str:
    """Return an argument of a node as text that no address and no order of a set gets into."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return f"{_form(value)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()[:12]}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, slice):
        return f"slice({text_of(value.start)}, {text_of(value.stop)}, {text_of(value.step)})"
    if isinstance(value, dict):
        pairs = ", ".join(f"{text_of(key)}: {text_of(item)}" for key, item in value.items())
        return f"{{{pairs}}}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(text_of, value))})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({', '.join(sorted(map(text_of, value)))})"
    if isinstance(value, functools.partial):
        return f"partial({text_of(value.func)}, {text_of(value.args)}, {text_of(value.keywords)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        listed = ", ".join(
            f"{field.name}={text_of(getattr(value, field.name))}" for field in fields
        )
        return f"{type(value).__qualname__}({listed})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", repr(value))
