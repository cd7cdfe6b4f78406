"""What the checkpoint of somebody else's trainer has to carry beside the model's state dict."""

from collections.abc import Mapping
from typing import Any

from cgmq_fx.checkpoint import price_as_saved, refuse
from cgmq_fx.errors import UsageError
from cgmq_fx.guide import Guide
from cgmq_fx.identity import differences, hashed, identity
from cgmq_fx.model_state import model_state, restore_beside
from cgmq_fx.prepared import PreparedModule

Carried = dict[str, Any]


def carried_state(prepared: PreparedModule, guide: Guide | None) -> Carried:
    """Return as plain data what a run needs to go on besides state dicts and optimizers."""
    beside = model_state(prepared)
    del beside["state_dict"]
    return {
        "identity": hashed(identity(prepared)),
        "inputs": prepared.plan.inputs,
        "guide": None if guide is None else guide.settings,
        "model": beside,
    }


def restore_carried(place: str, prepared: PreparedModule, saved: Mapping[str, Any]) -> None:
    """Put back what `carried_state` returned, after the model's state dict was loaded.

    Args:
        place: what messages call the checkpoint.
        prepared: the model.
        saved: the state.

    Raises:
        UsageError: it belongs to another graph, cost table, budget or setting.
    """
    refuse(place, differences(saved["identity"], hashed(identity(prepared))))
    price_as_saved(place, prepared, saved)
    restore_beside(prepared, saved["model"])
    prepared.take_allowed_widths()


def check_guide(place: str, guide: Guide, saved: Mapping[str, Any] | None) -> None:
    """Refuse to go on under a guide with other settings.

    Raises:
        UsageError: the settings differ.
    """
    if saved is not None and dict(saved) != guide.settings:
        raise UsageError(
            f"{place}: the guide differs: saved {dict(saved)}, given {guide.settings}; give the "
            f"same direction and the same length of the run"
        )
