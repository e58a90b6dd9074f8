"""Validation in training: a task's losses on held-out items, the same on any number of processes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from unimm.training.engine import gather_over_ranks
from unimm.training.recipe import VALIDATION
from unimm.training.task import on_device

if TYPE_CHECKING:
    from unimm.training.task import Validates


def measure(task: Validates, module: nn.Module, device: torch.device, bfloat16: bool) -> dict[str, float]:
    """The task's losses on its held-out items, under names with `validation/`; all ranks call this together.

    Each rank takes a part of the same micro-batches, and their sums are added up in the order of the batches: the
    result does not depend on how many ranks there are.

    Args:
        task: whose items and losses.
        module: in eval mode, its weights whole, no gradients.
        device: where the module is.
        bfloat16: whether to compute under autocast, as training does.
    """
    batches = task.held_out()
    if not len(batches):
        return {}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names: list[str] = []
    rows = []
    for place in range(rank, rank + -(-len(batches) // world) * world, world):
        batch = batches[
            min(place, len(batches) - 1)
        ]  # beyond the end: for the count only, and left out below
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            sums = task.held_out_sums(module, on_device(batch, device))
        names = list(sums)
        rows.append(torch.stack([torch.as_tensor(value).double().cpu() for value in sums.values()]))
    gathered = gather_over_ranks(torch.stack(rows)).transpose(0, 1).flatten(0, 1)[: len(batches)]
    totals = {
        name: (math.fsum(part[:, 0].tolist()), math.fsum(part[:, 1].tolist()))
        for name, part in zip(names, gathered.unbind(1), strict=True)
    }
    means = {name: total / count for name, (total, count) in totals.items() if count}
    return {
        f"{VALIDATION}loss": task.held_out_loss(means),
        **{VALIDATION + name: mean for name, mean in means.items()},
    }
