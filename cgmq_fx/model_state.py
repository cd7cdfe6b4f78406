"""The state of a prepared model as plain data: what its state dict holds, and what it does not."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from cgmq_fx.plain_data import plain
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.quantizer_memory import memory_of, quantizers_of, restore_memory

StateDict = dict[str, Any]


def plain_state_dict(state: StateDict, *, copy: bool = False) -> dict[str, Any]:
    """Return a state dict as plain data, with the versions of its modules."""
    metadata = {name: dict(entry) for name, entry in getattr(state, "_metadata", {}).items()}
    whole = {"entries": dict(state), "metadata": metadata}
    made: dict[str, Any] = plain(whole, "the model's state dict", copy=copy)
    return made


def as_state_dict(saved: Mapping[str, Any]) -> StateDict:
    """Return the state dict that `plain_state_dict` took."""
    state: OrderedDict[str, Any] = OrderedDict(saved["entries"])
    state._metadata = saved["metadata"]  # type: ignore[attr-defined]
    return state


def model_state(prepared: PreparedModule, *, copy: bool = False) -> dict[str, Any]:
    """Return everything that the course of training depends on, as plain data.

    That is the state dict, buffers that it leaves out, and what the quantizers remember.
    """
    memories = {name: memory_of(item) for name, item in quantizers_of(prepared).items()}
    return {
        "state_dict": plain_state_dict(prepared.state_dict(), copy=copy),
        "buffers": plain(dict(_other_buffers(prepared)), "the model's buffers", copy=copy),
        "quantizers": plain(memories, "the quantizers' samples", copy=copy),
    }


def restore_model(prepared: PreparedModule, saved: Mapping[str, Any]) -> None:
    """Put `prepared` into the state that `model_state` returned; see `model_faults` first."""
    prepared.load_state_dict(as_state_dict(saved["state_dict"]))
    restore_beside(prepared, saved)


def restore_beside(prepared: PreparedModule, saved: Mapping[str, Any]) -> None:
    """Put back what `model_state` holds beside the state dict, after that was loaded."""
    for name, buffer in _other_buffers(prepared):
        buffer.copy_(saved["buffers"][name])
    for name, quantizer in quantizers_of(prepared).items():
        restore_memory(quantizer, saved["quantizers"][name])


def model_faults(prepared: PreparedModule, saved: Mapping[str, Any]) -> list[str]:
    """Return what of `saved` does not fit `prepared`, one line for each kind of thing."""
    own, other = prepared.state_dict(), dict(_other_buffers(prepared))
    pairs = (
        ("state dict", saved["state_dict"]["entries"], own),
        ("buffers", saved["buffers"], other),
        ("quantizers", saved["quantizers"], quantizers_of(prepared)),
    )
    return [fault for what, old, new in pairs if (fault := _misfit(what, old, new))]


def _misfit(what: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    wrong = [
        name
        for name in dict.fromkeys((*saved, *given))
        if name not in saved or name not in given or _form(saved[name]) != _form(given[name])
    ]
    listed = ", ".join(map(repr, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    return f"the model's {what} differs at {listed}" if wrong else ""


def _form(value: Any) -> Any:
    return (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else None


def _other_buffers(prepared: PreparedModule) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers that are not in the state dict, but for those that follow from the gates."""
    own, gates = prepared.state_dict(), quantizers_of(prepared)
    for name, buffer in prepared.named_buffers(remove_duplicate=False):
        if name not in own and name.rpartition(".")[0] not in gates:
            yield name, buffer
