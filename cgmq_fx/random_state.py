"""The states of every source of random numbers that a training run draws from, as plain data."""

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def random_state(generators: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Return the states of Python, torch, `generators`, and where in use, of numpy and the GPUs.

    Args:
        generators: others, by any names.
    """
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "generators": {name: item.get_state() for name, item in generators.items()},
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    # Where no GPU is in use, asking for its state would start one.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(
    state: Mapping[str, Any], generators: Mapping[str, torch.Generator]
) -> None:
    """Put the sources into the states that `random_state` returned.

    A source that this process lacks is left out: numpy that is not imported, a GPU.
    """
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in state:
        numpy.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(own, device)
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])
