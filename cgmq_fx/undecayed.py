"""Keeps weight decay away from learned ranges, where a pull to 0 would clip what lies outside."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Undecayed:
    """Takes parameters out of the decayed groups of an optimizer while it steps.

    Between two steps the groups are the user's own, in number and order, so that schedulers and
    checkpoints see nothing of it.
    """

    def __init__(self) -> None:
        self._taken: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._groups: list[dict[str, Any]] | None = None

    def take_out(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        """Put the parameters into groups without decay, until `put_back`."""
        self.put_back()
        if not any(group.get("weight_decay") for group in optimizer.param_groups):
            return
        wanted = {id(parameter) for parameter in parameters}
        for group in list(optimizer.param_groups):
            if not group.get("weight_decay"):
                continue
            params = group["params"]
            ranges = [p for p in params if id(p) in wanted]
            if not ranges:
                continue
            others = [p for p in params if id(p) not in wanted]
            self._groups = optimizer.param_groups
            if others:
                optimizer.param_groups.append({**group, "params": ranges, "weight_decay": 0.0})
                self._taken.append((group, {"params": params}))
                group["params"] = others
            else:
                self._taken.append((group, {"weight_decay": group["weight_decay"]}))
                group["weight_decay"] = 0.0

    def put_back(self) -> None:
        """Make the groups as they were."""
        for group, changed in self._taken:
            if "params" in changed and self._groups is not None:
                self._groups.pop()
            group.update(changed)
        self._taken, self._groups = [], None
