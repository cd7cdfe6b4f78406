"""`save_checkpoint` and `resume`: a training run that a kill or a full disk cannot lose."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from cgmq_fx.checkpoint_file import Place, read_checkpoint, write_checkpoint
from cgmq_fx.errors import CgmqError, TrainingError, UsageError
from cgmq_fx.guide import Guide, check_prepared, guide_of
from cgmq_fx.identity import COSTS, differences, hashed, identity
from cgmq_fx.input_shapes import rebuild
from cgmq_fx.plain_data import plain
from cgmq_fx.prepared import PreparedModule
from cgmq_fx.training_state import TrainingRun
from cgmq_fx.wrapped import is_model_sharded

Optimizers = Optimizer | Iterable[Optimizer] | None

_SECTIONS = ("identity", "inputs", "state", "steps", "sections")
_EXTRA = "extra"


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says of the run that goes on.

    Attributes:
        steps: optimizer steps that were taken under a guide.
        extra: what was given to `save_checkpoint`; tensors are on the CPU.
    """

    steps: int
    extra: Any


def save_checkpoint(
    path: Place,
    prepared: PreparedModule,
    optimizer: Optimizers = None,
    *,
    scheduler: Any = None,
    guide: Guide | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    extra: Any = None,
) -> None:
    """Write all that a training run needs to go on exactly as if it had not stopped.

    That is weights, ranges, gates and what the quantizers remember, optimizer, scheduler, the
    guide's settings, and the random states of Python, numpy and torch. Call it after a step of the
    optimizer: gradients are not in it. The file replaces an old one only when it is whole and on
    the disk. It holds no code, and none is run when it is read.

    Args:
        path: the file; a former one is replaced.
        prepared: what `prepare` returned.
        optimizer: the optimizer, or several.
        scheduler: its learning-rate scheduler, or several.
        guide: what `attach` returned; by default the one that is attached to an optimizer given.
        generators: generators that the run draws from, such as the one of a `DataLoader`, by name.
        extra: your own, such as the epoch: None, bool, int, float, str, bytes, tensors, and lists,
            tuples and dicts of these.

    Raises:
        TrainingError: the file cannot be written; one that stood there is as it was.
        UsageError: an argument makes no sense or holds what no file can.
    """
    run = training_run("save_checkpoint", prepared, optimizer, scheduler, guide, generators)
    write_run(path, run, {_EXTRA: plain(extra, "extra")})


def resume(
    path: Place,
    prepared: PreparedModule,
    optimizer: Optimizers = None,
    *,
    scheduler: Any = None,
    guide: Guide | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    model_only: bool = False,
) -> Resumed:
    """Put a run back to where `save_checkpoint` took it; all of it, or nothing where that fails.

    The model is prepared and the optimizer, the scheduler and the guide are made as for the first
    run. Without `example_inputs` the model is priced for the shapes that were saved. Gradients are
    cleared. Settings of the optimizer, such as the learning rate, are those that were saved.

    Args:
        path: the file.
        prepared: what `prepare` returned for the same model, cost tables, budget and settings.
        optimizer: as in `save_checkpoint`, over the parameters of the same names.
        scheduler: as in `save_checkpoint`.
        guide: as in `save_checkpoint`.
        generators: as in `save_checkpoint`.
        model_only: take only the model, to evaluate or lower it; random states stay too.

    Raises:
        TrainingError: the file is truncated, damaged, of another kind, or cannot be read.
        UsageError: the file belongs to another run: the message names what differs, and how.
    """
    if model_only and any(item is not None for item in (optimizer, scheduler, guide, generators)):
        raise UsageError("resume: model_only=True takes the model alone; give nothing else with it")
    run = training_run("resume", prepared, optimizer, scheduler, guide, generators)
    sections = read_run(path, run, model_only=model_only)
    return Resumed(int(run.prepared.plan.steps), sections.get(_EXTRA))


def training_run(
    caller: str,
    prepared: PreparedModule,
    optimizer: Optimizers,
    scheduler: Any,
    guide: Guide | None,
    generators: Mapping[str, torch.Generator] | None,
) -> TrainingRun:
    """Return the objects of a run, checked.

    Raises:
        UsageError: one of them is not what it should be.
    """
    prepared = check_prepared(prepared, caller)
    if is_model_sharded(prepared):
        raise UsageError(
            f"{caller}: the parameters of the prepared model are sharded by fully_shard, and one "
            f"file of one process cannot hold them; save get_state_dict(prepared, optimizer) of "
            f"torch.distributed.checkpoint.state_dict with torch.distributed.checkpoint.save"
        )
    optimizers = _listed(optimizer, lambda item: isinstance(item, Optimizer))
    schedulers = _listed(scheduler, lambda item: hasattr(item, "load_state_dict"))
    own = dict(generators or {})
    faults = [
        f"optimizer {type(item).__name__} is no torch.optim.Optimizer"
        for item in optimizers
        if not isinstance(item, Optimizer)
    ]
    faults += [
        f"scheduler {type(item).__name__} has no state_dict() and load_state_dict()"
        for item in schedulers
        if not (hasattr(item, "state_dict") and hasattr(item, "load_state_dict"))
    ]
    faults += [
        f"generators[{name!r}] is {type(item).__name__}, not a torch.Generator"
        for name, item in own.items()
        if not isinstance(item, torch.Generator)
    ]
    if guide is not None and not (isinstance(guide, Guide) and guide.prepared is prepared):
        faults.append("guide is not what attach returned for this prepared model")
    if faults:
        raise UsageError(f"{caller}: {'; '.join(faults)}; give what the training loop uses")
    found = guide or next(filter(None, (guide_of(prepared, item) for item in optimizers)), None)
    return TrainingRun(prepared, optimizers, schedulers, found, own)


def _listed(given: Any, is_one: Callable[[Any], bool]) -> tuple[Any, ...]:
    if given is None:
        return ()
    return tuple(given) if not is_one(given) and isinstance(given, Iterable) else (given,)


def write_run(
    path: Place,
    run: TrainingRun,
    sections: Mapping[str, Any],
    also: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint of `run`.

    Args:
        path: the file.
        run: the objects of the run.
        sections: plain data of the caller, by name.
        also: further parts of the identity.

    Raises:
        TrainingError: the file cannot be written.
    """
    content = {
        "identity": hashed({**identity(run.prepared), **(also or {})}),
        "inputs": run.prepared.plan.inputs,
        "state": run.state(),
        "steps": int(run.prepared.plan.steps),
        "sections": dict(sections),
    }
    write_checkpoint(path, content)


def read_run(
    path: Place,
    run: TrainingRun,
    also: Mapping[str, str] | None = None,
    *,
    model_only: bool = False,
) -> dict[str, Any]:
    """Put `run` into the state of a checkpoint and return the sections of its caller.

    Where anything fails, everything is as it was.

    Raises:
        TrainingError: the file cannot be read or loaded.
        UsageError: it does not match.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or set(content) != set(_SECTIONS):
        raise TrainingError(
            f"the file {str(path)!r} holds no training run; nothing was loaded. Give a file that "
            f"save_checkpoint or fit(checkpoint=...) wrote"
        )
    saved = content["state"]
    if model_only:
        saved = {**run.state(), "model": saved["model"]}
    own = {**identity(run.prepared), **(also or {})}
    # A caller that takes the model alone says nothing of the rest.
    kept = content["identity"] if not model_only else _common(content["identity"], own)
    found = differences(kept, hashed(own))
    refuse(path, found or run.faults(saved))
    moment = run.snapshot()
    try:
        price_as_saved(path, run.prepared, content)
        run.restore(saved)
        if run.prepared.plan.is_priced:
            run.prepared.take_allowed_widths()
    except BaseException as error:
        run.go_back(moment)
        if isinstance(error, CgmqError) or not isinstance(error, Exception):
            raise
        raise TrainingError(
            f"the checkpoint {str(path)!r} could not be loaded ({type(error).__name__}: {error}); "
            f"everything is as it was before. Give the objects that the saved run had"
        ) from error
    _clear_gradients(run)
    sections: dict[str, Any] = content["sections"]
    return sections


def _common(saved: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    return {name: part for name, part in saved.items() if name in own or name == COSTS}


def price_as_saved(path: Place, prepared: PreparedModule, content: Mapping[str, Any]) -> None:
    """Price the model for the saved shapes where it is not.

    Raises:
        UsageError: the costs differ from those that were saved, or no shapes were.
    """
    saved = content["identity"]
    if prepared.plan.is_priced or COSTS not in saved:
        return
    if content["inputs"] is None:
        raise UsageError(
            f"the checkpoint {str(path)!r} was saved with inputs whose shapes it cannot hold, and "
            f"the prepared model knows none; call prepare with example_inputs=(...)"
        )
    first = next(prepared.parameters(), torch.empty(0))
    prepared.price(rebuild(content["inputs"], first.device))
    refuse(path, differences({COSTS: saved[COSTS]}, hashed({COSTS: identity(prepared)[COSTS]})))


def refuse(path: Place, faults: list[str]) -> None:
    """Refuse a checkpoint that has faults.

    Raises:
        UsageError: it has; the message lists them.
    """
    if faults:
        raise UsageError(
            f"the checkpoint {str(path)!r} is of another run, and nothing was changed: "
            f"{'; '.join(faults)}. Give what was saved, or start anew with another path"
        )


def _clear_gradients(run: TrainingRun) -> None:
    """Forget gradients from before: the saved run had none that count."""
    run.prepared.zero_grad()
    for optimizer in run.optimizers:
        optimizer.zero_grad()
