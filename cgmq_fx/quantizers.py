"""The container of a prepared model's quantizers, and the names that its users need."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cgmq_fx.errors import UsageError
from cgmq_fx.quantizer import QParams as QParams
from cgmq_fx.quantizer import Quantizer as Quantizer
from cgmq_fx.quantizer_spec import QuantizerSpec as QuantizerSpec


class QuantizerSet(nn.Module):
    """The quantizers of a prepared model by site; reads like a dict.

    A state dict with no key of a quantizer, that of the float model, loads strictly: every
    quantizer keeps its state, and those of weights find their range anew in the next forward. One
    with some of the keys must have them all.
    """

    def add(self, site: str, quantizer: Quantizer) -> None:
        """Hold `quantizer` under `site`, and name it so if it has no name.

        Raises:
            UsageError: the site is empty, has a dot, or is the name of an attribute already.
        """
        if not site or "." in site or hasattr(self, site):
            rule = "is taken" if site and hasattr(self, site) else "is empty or has a dot"
            raise UsageError(
                f"quantizer site {site!r} {rule}; choose another name, such as "
                f"{'_'.join((site.replace('.', '_') or 'site', 'input'))!r}"
            )
        quantizer.name = quantizer.name or site
        self.add_module(site, quantizer)

    def __getitem__(self, site: str) -> Quantizer:
        quantizer = self._modules.get(site)
        if not isinstance(quantizer, Quantizer):
            raise UsageError(
                f"no quantizer has the site {site!r}; the sites are {', '.join(self) or 'none'}"
            )
        return quantizer

    def __contains__(self, site: object) -> bool:
        return site in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def names(self) -> list[str]:
        """Return the sites, in the order in which they were added."""
        return list(self)

    def values(self) -> list[Quantizer]:
        """Return the quantizers, in the order of `names`."""
        return [self[site] for site in self]

    def items(self) -> list[tuple[str, Quantizer]]:
        """Return (site, quantizer) pairs, in the order of `names`."""
        return [(site, self[site]) for site in self]

    def probes(self) -> list[nn.Parameter]:
        """Return the probes of the quantizers, in the order of `names`.

        A guide asks for them at every step: the look-ups of `values` would show in that.
        """
        return [part._parameters["probe"] for part in self._modules.values()]  # type: ignore[union-attr, misc]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Runs before the children's, which read the dict that is filled here.
        if not any(key.startswith(prefix) for key in state_dict):
            for site, quantizer in self.items():
                state = quantizer.state_dict(prefix=f"{prefix}{site}.")
                if quantizer.spec.role == "weight":
                    flag = f"{prefix}{site}.calibrated"
                    state[flag] = torch.zeros_like(state[flag])
                state_dict.update(state)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
