"""A guided training run of one process or many, as a script under torchrun; see its test.

Every process writes what it found beside the others, as ``<rank>.pt``.
"""

import argparse
import datetime
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cgmq_fx
from cgmq_fx.guide import attach
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from cgmq_fx.prepared import PreparedModule
from small_training import small_data, small_model, small_prepared, train_step

STEPS, GLOBAL_BATCH, BUDGET = 60, 48, "3%"


def train(kind: str, rank: int, size: int) -> dict[str, Any]:
    """Train on this rank's part of every global batch and return what was seen on the way."""
    prepared = prepare(small_model(), BUDGET, example_inputs=(small_data()[0],))
    wrapped: nn.Module = prepared
    if kind == "ddp":
        wrapped = DistributedDataParallel(prepared)
    elif kind == "fsdp":
        fully_shard(prepared)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    guide = attach(wrapped, optimizer, total_steps=STEPS)
    widths, ranges = [], []
    for step in range(STEPS):
        x, y = small_data(GLOBAL_BATCH, step)
        x[1::2] *= 2  # what ranks see is not alike
        optimizer.zero_grad()
        own = slice(rank, None, size)
        torch.autograd.backward(F.cross_entropy(wrapped(x[own]), y[own]))
        optimizer.step()
        widths.append(tuple(prepared.bit_widths.values()))
        ranges.append(torch.cat([q.base.flatten() for q in prepared.quantizers.values()]).clone())
        if step == 0:
            first_input_range = prepared.quantizers["input_1"].base.clone()
            samples = [q._kept_sample().clone() for q in prepared.quantizers.values()]
    return {
        "widths": widths,
        "ranges": torch.stack(ranges),
        "samples": samples,
        "statistics": prepared.plan.statistics.clone(),
        "satisfied": guide.is_satisfied,
        "first_input_range": first_input_range,
        **finished(wrapped, prepared, kind),
    }


def finished(wrapped: nn.Module, prepared: PreparedModule, kind: str) -> dict[str, Any]:
    """Return what the lowered module computes, and what one made from the full state does."""
    x, y = small_data(512, 10**6)
    fixed = lower(wrapped)
    output = fixed(x)
    found = {"output": output, "accuracy": accuracy_of(output, y), "bits": fixed.bit_widths}
    if kind == "fsdp":
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(prepared, options=options)
        plain = prepare(small_model(), BUDGET, example_inputs=(small_data()[0],))
        if dist.get_rank() == 0:
            plain.load_state_dict(state)
            found["from_state"] = lower(plain)(x)
        try:
            cgmq_fx.save_checkpoint("unused", prepared)
        except cgmq_fx.UsageError as error:
            found["refused"] = str(error)
        found["refused_parts"] = refused_parts()
    elif kind == "ddp":
        found["disagreement"] = disagreement()
    return found


def refused_parts() -> str:
    """Return what attach says of a model whose layers are sharded one by one."""
    prepared = prepare(small_model(), BUDGET)
    for name in ("0", "3"):
        fully_shard(prepared.get_submodule(name))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    try:
        attach(prepared, optimizer)
    except cgmq_fx.UsageError as error:
        return str(error)
    return ""


def disagreement() -> str:
    """Return what the first step says where the ranks were told different lengths of the run."""
    prepared = small_prepared(BUDGET)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    attach(prepared, optimizer, total_steps=10 + dist.get_rank())
    try:
        train_step(prepared, optimizer)
    except cgmq_fx.UsageError as error:
        return str(error)
    return ""


def accuracy_of(output: Tensor, y: Tensor) -> float:
    """Return the share of right answers."""
    return float((output.argmax(1) == y).float().mean())


def main() -> None:
    """Run under torchrun, or alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds")
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for kind in chosen.kinds.split(","):
        torch.save(train(kind, rank, size), chosen.folder / f"{kind}{rank}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
