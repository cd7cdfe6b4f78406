"""Laws 1 to 6 of a prepared model, checked by code that shares nothing with the library's own sums.

Each check returns the faults it found, none where the law holds.
"""

import hashlib
import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from sweep_counting import FloatCount, count_nodes
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from cgmq_fx.accounting import Accounting
from cgmq_fx.passes.guards import select_mode
from cgmq_fx.passes.meta import WORK
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizers import Quantizer

_FLOAT_BITS = 32
_MAX_SITES = 64
_SCALARS = (int, float, bool, str, tuple, type(None))


# -- 1: the user's model is untouched, the signature and the structure stay ------------------------


@dataclass(frozen=True)
class Snapshot:
    """What must not change in a model: tensors by content and place, modes, attributes, hooks."""

    tensors: Mapping[str, tuple[int, int, str]]
    modules: Mapping[str, tuple[object, ...]]

    @staticmethod
    def of(model: nn.Module) -> "Snapshot":
        """Take the snapshot of `model`."""
        named: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
        named += model.named_buffers(remove_duplicate=False)
        return Snapshot(
            {name: (id(tensor), tensor.data_ptr(), _digest(tensor)) for name, tensor in named},
            {name: _description(module) for name, module in model.named_modules()},
        )

    def faults(self, model: nn.Module) -> Iterator[str]:
        """Yield what is different in `model` now."""
        now = Snapshot.of(model)
        for kind, before, after in (
            ("tensor", self.tensors, now.tensors),
            ("module", self.modules, now.modules),
        ):
            for name in sorted({*before, *after}):
                if before.get(name) != after.get(name):
                    yield f"prepare changed the {kind} '{name}' of the user's model"


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).hexdigest()


def _description(module: nn.Module) -> tuple[object, ...]:
    hooks = [key for key, value in vars(module).items() if "hooks" in key and value]
    return type(module), module.training, tuple(vars(module)), module.extra_repr(), tuple(hooks)


def check_signature(model: nn.Module, prepared: PreparedModule) -> Iterator[str]:
    """The placeholders are the inputs of forward; modules that stay have their hyperparameters."""
    wanted = [
        (name, () if parameter.default is inspect.Parameter.empty else (parameter.default,))
        for name, parameter in inspect.signature(model.forward).parameters.items()
    ]
    found = [(str(n.target), n.args) for n in prepared.graph.nodes if n.op == "placeholder"]
    if found != wanted:
        yield f"the placeholders are {found}, forward takes {wanted}"
    ours = dict(model.named_modules())
    for node in prepared.graph.nodes:
        path = str(node.target)
        if node.op != "call_module" or path not in ours:
            continue
        kept, original = prepared.get_submodule(path), ours[path]
        if type(kept) is not type(original) or _settings(kept) != _settings(original):
            yield f"the layer '{path}' changed from {original!r} to {kept!r}"


def _settings(module: nn.Module) -> dict[str, object]:
    found = {key: value for key, value in vars(module).items() if isinstance(value, _SCALARS)}
    return {key: value for key, value in found.items() if not key.startswith("_")}


# -- 2: every key of the state dict, and float checkpoints load ------------------------------------


@torch.no_grad()
def check_state(model: nn.Module, prepared: PreparedModule) -> Iterator[str]:
    """Every tensor is there under its key, and comes back from a float checkpoint."""
    yield from _state_faults(model, prepared, "after prepare")
    for tensor in prepared.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(1)
    try:
        prepared.load_state_dict(model.state_dict(), strict=True)
    except RuntimeError as error:
        yield f"the float checkpoint does not load: {error}"
    yield from _state_faults(model, prepared, "after loading the float checkpoint")
    trainable = {name for name, _ in prepared.named_parameters()}
    lost = [name for name, _ in model.named_parameters() if name not in trainable]
    if lost:
        yield f"not parameters any more: {lost[:5]}"


def _state_faults(model: nn.Module, prepared: PreparedModule, when: str) -> Iterator[str]:
    state = prepared.state_dict()
    for key, tensor in model.state_dict().items():
        if key not in state:
            yield f"{when}: the key '{key}' is missing"
        elif state[key].dtype != tensor.dtype or not torch.equal(state[key], tensor):
            yield f"{when}: '{key}' differs"
        elif state[key].data_ptr() == tensor.data_ptr() and tensor.numel():
            yield f"{when}: '{key}' shares its memory with the user's model"


# -- 3: bit for bit the float model while every bit-width is 32 ------------------------------------


def check_numbers(
    model: nn.Module, prepared: PreparedModule, one: Tensor, two: Tensor, *, backward: bool
) -> Iterator[str]:
    """Outputs, their structure and the buffers are equal in evaluation and in training."""
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(_FLOAT_BITS)
    for training, given in ((False, one), (True, two)):
        mode = "training" if training else "evaluation"
        results = []
        for module in (model, prepared):
            module.train(training)
            torch.manual_seed(0)
            with torch.set_grad_enabled(backward and training), _fused_layers_off():
                results.append(module(given.clone()))
        yield from (f"in {mode}: {fault}" for fault in _output_faults(*results))
        if backward and training:
            loss = sum(t.sum() for t in pytree.tree_leaves(results[1]) if isinstance(t, Tensor))
            assert isinstance(loss, Tensor)
            loss.backward()  # type: ignore[no-untyped-call]
            yield from _gradient_faults(prepared)
        buffers = dict(prepared.named_buffers())
        for name, buffer in model.named_buffers():
            if name not in buffers or not torch.equal(buffers[name], buffer):
                yield f"in {mode}: the buffer '{name}' differs afterwards"


@contextmanager
def _fused_layers_off() -> Iterator[None]:
    """Turn off the fused kernel that replaces an attention layer when no gradient is wanted."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _output_faults(wanted: Any, found: Any) -> Iterator[str]:
    if type(wanted) is not type(found):
        yield f"the output is {type(found).__name__}, not {type(wanted).__name__}"
        return
    (leaves, spec), (others, other_spec) = pytree.tree_flatten(wanted), pytree.tree_flatten(found)
    if spec != other_spec:
        yield f"the output has the structure {other_spec}, not {spec}"
        return
    for index, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
        if not isinstance(leaf, Tensor):
            if leaf != other:
                yield f"output {index} is {other!r}, not {leaf!r}"
            continue
        if leaf.dtype != other.dtype or not torch.equal(leaf, other):
            gap = float((leaf - other).abs().max()) if leaf.shape == other.shape else "the shape"
            yield f"output {index} differs by {gap}"
        if not bool(leaf.isfinite().all()) or float(leaf.detach().std()) == 0:
            yield f"output {index} of the float model says nothing: it is constant or not finite"


def _gradient_faults(prepared: PreparedModule) -> Iterator[str]:
    if all(parameter.grad is None for parameter in prepared.parameters()):
        yield "no parameter got a gradient"


# -- 4: every operation that computes is in the ledger, priced or with a reason --------------------


def check_coverage(prepared: PreparedModule, one: Tensor) -> Iterator[str]:
    """What ATen computes, call by call, stands in the ledger with as many MACs."""
    accounting = prepared.plan.accounting
    prepared.eval()
    counts = count_nodes(prepared, (one,))
    ledger = {entry.name: entry for entry in accounting.ledger}
    if len(ledger) != len(accounting.ledger):
        yield "two operations of the ledger have one name"
    used = _needed(prepared.graph)
    for node, count in counts.items():
        if node not in used or (_is_quantizer(prepared, node) and not count.macs):
            continue
        entries = [ledger[work.name] for work in WORK.find(node) or () if work.name in ledger]
        if count.computing and not entries:
            yield f"'{node.format_node()}' computes {sorted(set(count.computing))}, without entry"
        if sum(entry.macs for entry in entries) != count.macs:
            yield f"'{node.name}' does {count.macs} MACs, {[entry.macs for entry in entries]} stand"
    for entry, bound in zip(accounting.ledger, accounting.operations, strict=True):
        sites = [source.site for source in bound.sources]
        if entry.status == "quantized" and None in sites[: 1 if entry.op == "embedding" else 2]:
            yield f"'{entry.name}' is called quantized and reads an operand in float"
        if entry.status != "quantized" and not entry.reason:
            yield f"'{entry.name}' is {entry.status} without a reason"
        if entry.macs and not entry.prices:
            yield f"'{entry.name}' has {entry.macs} MACs and no price"


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values reach the output in evaluation mode."""
    found: set[fx.Node] = set()
    waiting = [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        branches = node.args[2:] if node.target is select_mode else (node.args, node.kwargs)
        fx.node.map_arg(branches, waiting.append)  # type: ignore[arg-type]
    return found


def _is_quantizer(prepared: PreparedModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        prepared.get_submodule(str(node.target)), Quantizer
    )


# -- 5: totals are the sums of their rows, and rise with every bit-width ---------------------------


def check_totals(prepared: PreparedModule, counted: FloatCount) -> Iterator[str]:
    """Recompute totals from MACs and bits; raise one site after the other."""
    accounting = prepared.plan.accounting
    draw = random.Random(0)
    choices = [site.allowed for site in accounting.sites]
    assignments = [[pick(allowed) for allowed in choices] for pick in (min, max, draw.choice)]
    for bits in assignments:
        totals = accounting.totals(bits)
        for name, resource in accounting.resources.items():
            rows = sum(resource.costs(accounting.index(bits)), Fraction(0))
            if totals[name] != rows:
                yield f"the total of {name} is {totals[name]}, its rows sum up to {rows}"
        for name, expected in _expected(prepared, counted, bits).items():
            if name in totals and totals[name] != expected:
                yield f"the total of {name} is {totals[name]}, recomputed it is {expected}"
    for bits in (assignments[0], assignments[2]):
        yield from _fall_faults(accounting, bits, draw)


def _expected(
    prepared: PreparedModule, counted: FloatCount, bits: list[int]
) -> dict[str, Fraction]:
    bops = 0
    for bound in prepared.plan.accounting.operations:
        widths = [bits[s.site] if s.site is not None else s.bits or 0 for s in bound.sources]
        lhs, rhs = widths or (_FLOAT_BITS, _FLOAT_BITS)
        bops += bound.operation.macs * lhs * rhs
    width_of = dict(zip(prepared.quantizers, bits, strict=True))
    memory = 0
    narrow = {id(tensor): site for site, tensor in weight_quantizers(prepared)}
    for name, numel in counted.parameters.items():
        owner, _, leaf = name.rpartition(".")
        site = narrow.get(id(getattr(prepared.get_submodule(owner), leaf)))
        memory += numel * (_FLOAT_BITS if site is None else width_of[site])
    return {"bops": Fraction(bops), "weight_memory": Fraction(memory, 8)}


def _fall_faults(accounting: Accounting, bits: list[int], draw: random.Random) -> Iterator[str]:
    sites = range(len(bits))
    for site in sites if len(bits) <= _MAX_SITES else draw.sample(sites, _MAX_SITES):
        before: Mapping[str, Fraction] = {}
        for width in accounting.sites[site].allowed:
            now = accounting.totals([*bits[:site], width, *bits[site + 1 :]])
            fallen = [name for name, total in before.items() if now[name] < total]
            if fallen:
                yield f"{fallen} fall when '{accounting.sites[site].name}' rises to {width} bits"
            before = now


# -- 6: one quantizer for one parameter ------------------------------------------------------------


def weight_quantizers(prepared: PreparedModule) -> list[tuple[str, Tensor]]:
    """Return the sites of weights, each with the parameter or table that it reads."""
    found = []
    for node in prepared.graph.nodes:
        if not _is_quantizer(prepared, node) or not node.args:
            continue
        source = node.args[0]
        if source.op == "get_attr":
            owner, _, name = str(source.target).rpartition(".")
            tensor = getattr(prepared.get_submodule(owner), name)
            found.append((str(node.target).rpartition(".")[2], tensor))
    return found


def check_ties(prepared: PreparedModule) -> Iterator[str]:
    """No parameter is read by two quantizers, and no quantizer serves two sites."""
    readers: dict[int, set[str]] = {}
    for site, tensor in weight_quantizers(prepared):
        readers.setdefault(tensor.untyped_storage().data_ptr(), set()).add(site)
    for sites in readers.values():
        if len(sites) > 1:
            yield f"the quantizers {sorted(sites)} read one parameter"
    quantizers = prepared.quantizers.values()
    if len({id(quantizer) for quantizer in quantizers}) != len(quantizers):
        yield "one quantizer stands at two sites"
    called = {str(node.target).rpartition(".")[2] for node in prepared.graph.nodes}
    idle = [site for site in prepared.quantizers if site not in called]
    if idle:
        yield f"no operation reads the quantizers {idle[:5]}"
