"""What DeepSpeed shards over the ranks, made whole again, and whole things cut into its shards.

ZeRO 1 and 2 keep the optimizer in one flat partition for each parameter group, ZeRO 3 the weights too, a slice
of each parameter on every rank. Functions that gather must be called by all ranks together, for the same
parameters in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

if TYPE_CHECKING:
    from unimm.training.engine import TrainingEngine

MOMENT_KEYS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside its step count


def is_sharded(parameter: Tensor) -> bool:
    """Whether this rank holds a slice of the parameter only (ZeRO 3)."""
    return hasattr(parameter, "ds_tensor")


def local(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its slice [n], filled up with zeros at the end, or the parameter."""
    if not is_sharded(parameter):
        return parameter
    slice_: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
    return slice_


def cut(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of a tensor of the parameter's (whole) shape, as `local` has it."""
    if not is_sharded(parameter):
        return whole
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    length = math.ceil(whole.numel() / world)
    flat = torch.zeros(length * world, dtype=whole.dtype, device=whole.device)
    flat[: whole.numel()] = whole.flatten()
    return flat[rank * length : (rank + 1) * length].clone()


def join(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole of what `cut` gave each rank."""
    if not is_sharded(parameter):
        return part
    shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
    world = torch.distributed.get_world_size()
    gathered = part.new_empty(world * part.numel())
    torch.distributed.all_gather_into_tensor(gathered, part.contiguous())
    return gathered[: shape.numel()].view(shape)


def _distinct(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and kept buffers by name, each once."""
    yield from module.named_parameters()
    kept = module.state_dict(keep_vars=True).keys()
    for name, buffer in module.named_buffers():
        if name in kept:
            yield name, buffer


def full_state(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Whole CPU copies of a module's parameters and buffers, tied ones under their first name only."""
    state: dict[str, Tensor] = {}
    for name, tensor in _distinct(module):
        whole = join(local(tensor), tensor).detach()
        if keep:
            state[name] = whole.cpu().clone()
    return state


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Bring a module's buffers, which are never sharded, to the device."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            child._buffers[name] = buffer.to(device)


def make_ordinary(module: nn.Module) -> None:
    """Give a module that ZeRO 3 has sharded ordinary, whole parameters on the CPU; ties stay."""
    made: dict[int, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        whole = join(local(parameter), parameter).detach().cpu().clone()
        assert whole.numel(), name
        made[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    for child in module.modules():
        own = {name: value if value is None else made[id(value)] for name, value in child._parameters.items()}
        child._parameters = own
        child.__dict__.pop("_original_parameters", None)  # DeepSpeed's memory of the slices
    move_buffers(module, torch.device("cpu"))


def whole_module(engine: Any) -> AbstractContextManager[Any]:
    """Within, every parameter of a ZeRO 3 engine's module is whole and no hook takes it away."""
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    context: AbstractContextManager[Any] = unwrap_model_for_generation(engine)
    return context


def blend(target: nn.Module, source: nn.Module, share: float) -> None:
    """Move parameters towards those of the same names of another module; all ranks call this together.

    Args:
        target: whose parameters change; its buffers do not.
        source: has all of target's parameters.
        share: of the source in the result; 1 copies it, bit for bit.
    """
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        with torch.no_grad(), _gathered(parameter, write=True), _gathered(theirs[name]):
            parameter.lerp_(theirs[name], share)


def _gathered(parameter: Tensor, write: bool = False) -> AbstractContextManager[Any]:
    """Within, the parameter is whole; what is written to it stays if `write`."""
    if not is_sharded(parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    context: AbstractContextManager[Any] = GatheredParameters([parameter], modifier_rank=0 if write else None)
    return context


class Average:
    """The average of one stage's trained weights, float32; where those are sharded, each rank averages its slice.

    Args:
        engine: whose weights to follow.
        decay: of the average at each step.
        start: whole averages by name to start from; empty to start at the weights.
        updates: how often those had been updated.
    """

    def __init__(
        self, engine: TrainingEngine, decay: float, start: Mapping[str, Tensor], updates: int
    ) -> None:
        self._weights = dict(zip(engine.names, engine.parameters, strict=True))
        self._decay = decay
        self.updates = updates
        self._parts = {
            name: cut(start[name].to(engine.device), weight)
            if start
            else local(weight).detach().clone().float()
            for name, weight in self._weights.items()
        }

    def update(self) -> None:
        """Move towards the weights; early on the decay is lower, so that the start is forgotten."""
        self.updates += 1
        move = get_ema_multi_avg_fn(min(self._decay, (1 + self.updates) / (10 + self.updates)))
        weights = [local(weight).detach() for weight in self._weights.values()]
        move(list(self._parts.values()), weights, self.updates)

    def whole(self) -> dict[str, Tensor]:
        """The averages in the weights' shapes; all ranks call this together."""
        return {name: join(part, self._weights[name]) for name, part in self._parts.items()}


# --- the optimizer's state ----------------------------------------------------------------------------------


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    """The flat tensors that DeepSpeed hands to the real optimizer, on this rank."""
    flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    return list(optimizer.single_partition_of_fp32_groups if flat is None else flat)


def _count(optimizer: Any) -> Tensor:
    """The optimizer's step count, one for all parameters."""
    count: Tensor = optimizer.optimizer.state[_flat_partitions(optimizer)[0]]["step"]
    return count


def full_optimizer_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """AdamW's whole state of one parameter, gathered from a ZeRO optimizer."""
    from deepspeed.utils import safe_get_full_optimizer_state

    count = _count(optimizer)
    state = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in MOMENT_KEYS}
    return {**state, "step": count}


def allocate_optimizer_state(optimizer: Any) -> None:
    """Make the state that AdamW itself would only make at its first step.

    A checkpoint can fill it then. And DeepSpeed 0.19 links the parameters of every group to their states once
    the first group has made its first step, when those of the others are not there yet.
    """
    for flat in _flat_partitions(optimizer):
        optimizer.optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            **{kind: torch.zeros_like(flat) for kind in MOMENT_KEYS},
        }
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        optimizer._lazy_init_hp_params_optimizer_state()


def set_optimizer_state(optimizer: Any, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
    """Put one parameter's whole state into a ZeRO optimizer's shards; the step count is everyone's."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for kind in MOMENT_KEYS:
        value = state[kind].to(local(parameter).device)
        if is_sharded(parameter):
            safe_set_local_optimizer_state(parameter, cut(value, parameter), kind)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
    for flat in _flat_partitions(optimizer):
        optimizer.optimizer.state[flat]["step"].copy_(state["step"])
