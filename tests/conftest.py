"""Seeds, threads and hypothesis profiles for every test."""

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

# One thread: the networks here are small, and sums keep one order, so equal seeds give equal bits.
torch.set_num_threads(1)

COMMON: dict[str, Any] = {
    "deadline": None,  # the first call of a torch operator takes many times as long as the next
    "suppress_health_check": [HealthCheck.too_slow],  # to draw a network is to build it
    "print_blob": True,
}
settings.register_profile("dev", max_examples=25, **COMMON)
settings.register_profile("ci", max_examples=100, derandomize=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


class TorchRandom:
    """The CPU generator of torch, in the form in which hypothesis controls random sources."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _seed_everything() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # libraries under test draw from the legacy generator
    torch.manual_seed(0)
