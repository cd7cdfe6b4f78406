"""Laws 1 to 3 of a prepared model: what stays as it was in the float model.

Each check yields the faults it finds, none where the law holds. The checks change the modules that
they are given: modes, parameters, statistics. Give them copies.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cgmq_fx.prepared import PreparedModule
from cgmq_fx.testing.compare import Inputs, output_faults, run, split_inputs, tensors_of
from cgmq_fx.testing.snapshot import settings_of

_FLOAT_BITS = 32
_STARS: Mapping[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


# -- 1: the signature and the structure stay -------------------------------------------------------


def check_signature(model: nn.Module, prepared: PreparedModule) -> Iterator[str]:
    """The placeholders are the inputs of forward; modules that stay have their hyperparameters."""
    wanted = [
        (
            _STARS.get(parameter.kind, "") + name,
            () if parameter.default is inspect.Parameter.empty else (parameter.default,),
        )
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
        before, after = settings_of(original), settings_of(kept)
        # A subclass may be opened, and keep the layer that it is a subclass of.
        if not isinstance(original, type(kept)):
            yield f"'{node.format_node()}': the layer was {original!r} and is {kept!r}"
        for name in sorted({*before, *after} - {"training"}):
            if before.get(name) != after.get(name):
                yield (
                    f"'{node.format_node()}': {name} was {before.get(name)!r} and is "
                    f"{after.get(name)!r}"
                )


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
    trainable = {name for name, _ in prepared.named_parameters(remove_duplicate=False)}
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
    model: nn.Module,
    prepared: PreparedModule,
    one: Inputs,
    two: Inputs,
    *,
    backward: bool,
    telling: bool = True,
) -> Iterator[str]:
    """Outputs, their structure and the buffers are equal in evaluation and in training.

    Args:
        model: the float model.
        prepared: what was made of it.
        one: the inputs of the call in evaluation.
        two: those of the call in training.
        backward: run a backward pass too.
        telling: an output that is constant or not finite is a fault, since it shows nothing.
    """
    for quantizer in prepared.quantizers.values():
        quantizer.set_bit_width(_FLOAT_BITS)
    for training, given in ((False, one), (True, two)):
        mode = "training" if training else "evaluation"
        wants = backward and training
        with _ProductsWithGradients() if wants else nullcontext():
            (wanted, kept), (found, own) = (
                run(module, *split_inputs(given), training=training, gradients=wants)
                for module in (model, prepared)
            )
        yield from (f"in {mode}: {fault}" for fault in output_faults(wanted, found))
        if telling:
            yield from (f"in {mode}: {fault}" for fault in _silent_faults(wanted))
        yield from (f"in {mode}, in the inputs: {fault}" for fault in output_faults(kept, own))
        if wants:
            yield from _gradient_faults(prepared, found)
        buffers = dict(prepared.named_buffers())
        for name, buffer in model.named_buffers():
            if name not in buffers or not torch.equal(buffers[name], buffer):
                yield f"in {mode}: the buffer '{name}' differs afterwards"


class _ProductsWithGradients(TorchFunctionMode):
    """Lets every operand of a product require a gradient.

    Torch picks kernels that round differently by which operands do. In a prepared model all do, as
    ranges are learned; in the float model an image or a table of positions does not.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args, kwargs = pytree.tree_map_only(Tensor, _requiring_gradient, (args, kwargs))
        return func(*args, **kwargs)


def _requiring_gradient(tensor: Tensor) -> Tensor:
    wanted = tensor.is_floating_point() and not tensor.requires_grad
    return tensor.detach().requires_grad_() if wanted else tensor


_PRODUCTS = frozenset(
    {
        torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
        torch.conv_transpose3d, F.linear, torch.matmul, torch.bmm, torch.mm, torch.einsum,
        Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm, Tensor.mm,
    }
)  # fmt: skip


def _silent_faults(outputs: Any) -> Iterator[str]:
    for index, leaf in enumerate(tensors_of(outputs)):
        if not leaf.is_floating_point():
            continue
        if not bool(leaf.isfinite().all()) or float(leaf.detach().std()) == 0:
            yield f"output {index} of the float model says nothing: it is constant or not finite"


def _gradient_faults(prepared: PreparedModule, outputs: Any) -> Iterator[str]:
    losses = [tensor.sum() for tensor in tensors_of(outputs) if tensor.requires_grad]
    if losses:
        torch.stack([loss.float() for loss in losses]).sum().backward()  # type: ignore[no-untyped-call]
    if all(parameter.grad is None for parameter in prepared.parameters()):
        yield "no parameter got a gradient"
