"""The DeepSpeed engine around a task: start-up, optimizer, one optimisation step, its state for checkpoints.

DeepSpeed always runs the step, with or without a launcher; here it is told only what the recipe says. Weights
are float32, bfloat16 is autocast. What each rank holds is the recipe's choice (`deepspeed.zero_optimization.
stage`): all (0), a shard of the optimizer (1), of the gradients too (2), of the weights too (3). Everything
that leaves the engine is whole and goes by the parameter's name, so that it fits any stage and any number of
ranks; the shards themselves are the business of `unimm.training.shards`.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unimm.errors import UserError
from unimm.sections import near
from unimm.training import checkpoint, shards
from unimm.training.task import Packs, on_device

if TYPE_CHECKING:
    from unimm.training.recipe import BaseRecipe, Stage
    from unimm.training.task import Batch, Metrics, Task


def pick_device(recipe: BaseRecipe) -> torch.device:
    """The recipe's device on this rank; `auto` takes CUDA where there is one."""
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        if recipe.offloads:
            key = "deepspeed.zero_optimization.offload_optimizer"
            raise recipe.error(
                key, "moves state out of a GPU's memory, so it needs a CUDA device; remove it here"
            )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise recipe.error("device", 'there is no CUDA device here; use "cpu" or "auto"')
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def in_bfloat16(recipe: BaseRecipe, device: torch.device) -> bool:
    """Whether losses are computed under autocast to bfloat16 on a device."""
    return recipe.dtype == "bfloat16" or (recipe.dtype == "auto" and device.type == "cuda")


def start_distributed(device: torch.device) -> Any:
    """Start DeepSpeed's communication, alone or under a launcher, and give the `deepspeed` module.

    Without a launcher this process is a group of one. DeepSpeed's CPU helpers, which it would compile at
    first use, are declared absent; gloo does their work.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    for name in ("deepspeed", "DeepSpeed", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    alone = "RANK" not in os.environ  # no launcher: no port to listen on, none for child processes to inherit
    if alone:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed's engine asks for it, each time one is made
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if alone:
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        atexit.register(_stop_distributed)
    return deepspeed


def _stop_distributed() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The element-wise sum of a CPU tensor over all ranks; alone, the tensor itself."""
    return gather_over_ranks(tensor).sum(0)


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """A CPU tensor of every rank, stacked [ranks, ...]."""
    world = torch.distributed.get_world_size()
    if world == 1:
        return tensor[None]
    on_cuda = torch.distributed.get_backend() == "nccl"
    moved = tensor.cuda() if on_cuda else tensor.clone()
    gathered = [torch.empty_like(moved) for _ in range(world)]
    torch.distributed.all_gather(gathered, moved)
    return torch.stack(gathered).cpu()


@contextmanager
def first_process_first() -> Iterator[bool]:
    """Run a block in the first process, then in all others; gives whether this is the first."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    first = not several or torch.distributed.get_rank() == 0
    if not first:
        torch.distributed.barrier()
    yield first
    if several and first:
        torch.distributed.barrier()


class LossModule(nn.Module):
    """The task's loss as a forward, so that it runs inside the engine."""

    def __init__(self, task: Task, module: nn.Module, device: str, bfloat16: bool) -> None:
        super().__init__()
        self.module = module
        self._task = task
        self._device = device
        self._bfloat16 = bfloat16

    def forward(self, batch: Batch, step: int, totals: Mapping[str, float]) -> tuple[Tensor, Metrics]:
        """`Task.loss` under the recipe's autocast."""
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bfloat16):
            return self._task.loss(self.module, batch, step, totals)


@dataclass(frozen=True)
class StepResult:
    """What one step gave, still on the device so that reading it is the logger's choice."""

    loss: Tensor
    metrics: dict[str, Any]
    norm: Tensor

    @property
    def values(self) -> dict[str, Any]:
        """All of it by the names of the log."""
        return {"loss": self.loss, "grad_norm": self.norm, **self.metrics}


def check_stages(
    recipe: BaseRecipe, task: Task, groups: Mapping[str, Sequence[nn.Parameter]], world: int, first: int = 0
) -> None:
    """Check the stages from `first` on against the task and the number of processes, before one of them trains.

    Raises:
        UserError: a stage names a group that the task does not have, or none with weights; its batch does not divide;
            or it packs what cannot be packed.
    """
    for index, stage in list(enumerate(recipe.stages))[first:]:
        for name in stage.lr:
            if name not in groups:
                hint = near(name, groups) or f"; the groups are {', '.join(groups)}"
                raise recipe.error(f"stages[{index}].lr.{name}", f"no such group of weights{hint}")
        if not any(len(groups[name]) for name in stage.lr):
            message = "these groups hold no weights, so nothing would train"
            raise recipe.error(f"stages[{index}].lr", message)
        if stage.batch % (micro_samples(stage) * world):
            micro = f"micro_batch {stage.micro} x " if stage.pack is None else ""
            message = f"{stage.batch} is not divisible by {micro}{world} processes"
            raise recipe.error(f"stages[{index}].batch", message)
        if stage.pack is not None and not isinstance(task, Packs):
            raise recipe.error(f"stages[{index}].pack", f"the task {recipe.task} cannot pack; remove it")


def micro_samples(stage: Stage) -> int:
    """Samples in one forward as DeepSpeed counts them; of packed rows it is told nothing."""
    return stage.micro if stage.pack is None else 1


def freeze(
    recipe: BaseRecipe, index: int, groups: Mapping[str, Sequence[nn.Parameter]], module: nn.Module
) -> None:
    """Make exactly the stage's groups trainable; modules with nothing but frozen weights go to eval mode."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    seen: set[int] = set()
    for name in recipe.stages[index].lr:
        for parameter in groups[name]:
            assert id(parameter) not in seen, f"group {name} shares a parameter with another group"
            seen.add(id(parameter))
            parameter.requires_grad_(True)
    set_modes(module)


def set_modes(module: nn.Module) -> None:
    """Training mode, but eval for modules whose parameters are all frozen (no dropout, statistics rest)."""
    module.train()
    for child in module.modules():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            child.eval()


def decays(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Whether weight decay falls on a parameter: matrices and kernels, not biases, norms, embeddings."""
    leaf = name.rpartition(".")[2]
    table = isinstance(owner, nn.Embedding) or "embed" in leaf or "token" in leaf
    return parameter.ndim >= 2 and not table


def parameter_groups(
    module: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]], stage: Stage, weight_decay: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """AdamW's parameter groups for a stage, and the parameters' names in the optimizer's order.

    Each group carries `name` and `base_lr` beside what AdamW reads; the schedule multiplies `base_lr`.
    """
    owners = dict(module.named_modules())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    made: list[dict[str, Any]] = []
    order: list[str] = []
    for group, rate in stage.lr.items():
        split: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in groups[group]:
            name = names[id(parameter)]
            split[decays(name, parameter, owners[name.rpartition(".")[0]])].append(parameter)
        for decayed, parameters in split.items():
            if parameters:
                decay = weight_decay if decayed else 0.0
                made.append(
                    {"params": parameters, "name": group, "base_lr": rate, "lr": rate, "weight_decay": decay}
                )
                order += [names[id(parameter)] for parameter in parameters]
    return made, order


def lr_factors(stage: Stage, step: int) -> dict[str, float]:
    """What each group's learning rate is multiplied by at `step`; see `lr_factor`."""
    return {group: lr_factor(stage, step, stage.warmup_of(group)) for group in stage.lr}


def lr_factor(stage: Stage, step: int, warmup: int) -> float:
    """What a learning rate of the stage is multiplied by at `step` (0-based, within the stage).

    Rises linearly over `warmup` steps (or all, where there are fewer) to 1 at the last of them, then stays
    (`constant`) or falls towards `min_lr_ratio`, which the step after the stage's last would have (`linear`,
    `cosine`; as in transformers): so the last step trains too. It follows from the step alone, so that a resumed
    run needs no scheduler state.
    """
    warmup = min(warmup, stage.steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, stage.steps - warmup))
    shape = 1.0 - done if stage.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * shape


def shortened_warmups(stages: Sequence[Stage]) -> list[str]:
    """A line for each warm-up that is longer than its stage."""
    lines = []
    for number, stage in enumerate(stages):
        given = stage.warmup if isinstance(stage.warmup, dict) else {"": stage.warmup}
        for group, steps in given.items():
            where = f"stages[{number}].warmup{group and f'.{group}'}"
            if steps > stage.steps:
                rates = "its rate rises" if group else "the rates rise"
                lines.append(f"{where}: {steps} steps, the stage has {stage.steps}; {rates} over all of it")
    return lines


def merge(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `extra` laid over it, mapping by mapping."""
    result = dict(base)
    for key, value in extra.items():
        inner = result.get(key)
        result[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


class TrainingEngine:
    """One stage's optimizer and DeepSpeed engine."""

    def __init__(
        self,
        recipe: BaseRecipe,
        index: int,
        task: Task,
        module: nn.Module,
        groups: Mapping[str, Sequence[nn.Parameter]],
        device: torch.device,
    ) -> None:
        deepspeed = start_distributed(device)
        self.world = torch.distributed.get_world_size()
        self.device = device
        self.zero = recipe.zero_stage
        stage, settings = recipe.stages[index], recipe.optimizer
        self._micro = micro_samples(stage)
        self._packed = stage.pack is not None
        parameters, self.names = parameter_groups(module, groups, stage, settings.weight_decay)
        self.parameters: list[nn.Parameter] = [one for group in parameters for one in group["params"]]
        self._clip = settings.clip
        self.optimizer = torch.optim.AdamW(
            parameters, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
        )
        self.module = module
        if self.zero == 3:  # weights go to the device shard by shard
            shards.move_buffers(module, device)
        wrapped = LossModule(task, module, device.type, in_bfloat16(recipe, device))
        self._engine, *_ = deepspeed.initialize(
            model=wrapped, optimizer=self.optimizer, config=self._config(recipe, stage)
        )
        if self.zero:
            shards.allocate_optimizer_state(self._engine.optimizer)
        if self.world == 1 and self.zero == 0:
            self._engine.enable_backward_allreduce = False  # nobody to share gradients with

    def _config(self, recipe: BaseRecipe, stage: Stage) -> dict[str, Any]:
        weights = sum(parameter.numel() for parameter in self.parameters)
        return merge(
            {
                "train_batch_size": stage.batch,
                "train_micro_batch_size_per_gpu": self._micro,
                "gradient_accumulation_steps": stage.batch // (self._micro * self.world),
                # Without ZeRO the engine knows no norm in float32; it is done below.
                "gradient_clipping": (self._clip or 0.0) if self.zero else 0.0,
                "zero_optimization": {"stage": 0, "reduce_bucket_size": min(weights, 500_000_000)},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 60,
            },
            recipe.deepspeed,
        )

    def step(
        self,
        batches: Sequence[Batch],
        totals: Mapping[str, float],
        step: int,
        factor: float | Mapping[str, float],
        max_micro_batches: int | None = None,
    ) -> StepResult:
        """Forward and backward every micro-batch, clip by the true global norm, and update.

        Args:
            batches: this rank's micro-batches, on the CPU.
            totals: the whole step's targets over all ranks.
            step: steps done before, over all stages.
            factor: what the base learning rates are multiplied by, all or those of each group.
            max_micro_batches: those of the rank that has the most; the others run their last again, for nothing, since
                ranks that share gradients do so after each.
        """
        for group in self.optimizer.param_groups:
            own = factor[group["name"]] if isinstance(factor, Mapping) else factor
            group["lr"] = group["base_lr"] * own
        loss_sum = norm = torch.zeros((), device=self.device)
        sums: dict[str, Any] = {}
        count = max(len(batches), max_micro_batches or 0)
        for position in range(count):
            batch = batches[min(position, len(batches) - 1)]
            if self._packed:  # their number varies
                self._engine.set_gradient_accumulation_boundary(position == count - 1)
            loss, metrics = self._engine(on_device(batch, self.device), step, totals)
            if position >= len(batches):
                loss, metrics = 0 * loss, {}
            # The loss is divided by the whole step's totals already: undo the engine's mean over ranks, and
            # keep it from dividing by the number of micro-batches. The product matters alone too: handed the
            # forward's own output, DeepSpeed 0.19 divides in spite of `scale_wrt_gas=False`.
            self._engine.backward(loss * self.world, scale_wrt_gas=False)
            loss_sum = loss_sum + loss.detach()
            for key, value in metrics.items():
                value = value.detach() if isinstance(value, Tensor) else value
                sums[key] = sums[key] + value if key in sums else value
            if position == count - 1 and self.zero == 0:
                norm = self._clip_gradients()
            self._engine.step()
        if self.zero:
            norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self.device).float()
        return StepResult(loss_sum, sums, norm)

    def _clip_gradients(self) -> Tensor:
        """Scale the gradients to at most the recipe's norm; gives the norm before.

        For ZeRO 0, after the reduction over ranks and before the engine's update. A weight that no sample of
        this step has reached counts as having a gradient of 0, as it does where gradients are sharded.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self._clip, norm)
        return norm

    def rates(self) -> dict[str, float]:
        """The learning rate of each group as of the last step."""
        return {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}

    def model_tensors(self, keep: bool) -> dict[str, Tensor]:
        """The module's whole state on the CPU, each tied tensor once; all ranks call this together.

        Args:
            keep: whether this rank wants it; the others take part and get nothing.
        """
        if self.zero == 3:
            return shards.full_state(self.module, keep)
        return checkpoint.distinct_state(self.module) if keep else {}

    def optimizer_tensors(self, keep: bool) -> dict[str, Tensor]:
        """The optimizer's whole state as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`, `step.<parameter>`.

        All ranks call this together; those that do not `keep` it get nothing.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            state = (
                shards.full_optimizer_state(self._engine.optimizer, parameter)
                if self.zero
                else self.optimizer.state.get(parameter, {})
            )
            if keep:
                found |= {f"{kind}.{name}": value.detach().cpu().clone() for kind, value in state.items()}
        return found

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor], source: str = "optimizer") -> None:
        """Put back what `optimizer_tensors` gave, whatever the stage and the ranks it was gathered from.

        Args:
            tensors: by kind and parameter.
            source: the checkpoint, for errors.

        Raises:
            UserError: it is of another model.
        """
        position = {name: number for number, name in enumerate(self.names)}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            parameter = self.parameters[position[name]] if name in position else None
            if parameter is None or (
                value.ndim and value.shape != getattr(parameter, "ds_shape", parameter.shape)
            ):
                raise UserError(f"{source}: {key} fits no parameter; the checkpoint is of another model")
            state.setdefault(position[name], {})[kind] = value
        if self.zero:
            for number, values in state.items():
                shards.set_optimizer_state(self._engine.optimizer, self.parameters[number], values)
            return
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the module's weights are whole on every rank and one rank may run it alone."""
        with shards.whole_module(self._engine) if self.zero == 3 else nullcontext():
            yield

    def release(self) -> None:
        """After the last step: leave the module with ordinary, whole weights; all ranks call this together."""
        if self.zero == 3:
            self._engine.optimizer.destroy()  # its hooks would gather what is whole
            shards.make_ordinary(self.module)
            self.parameters = []

    def close(self) -> None:
        """Let go of the engine; the module stays."""
        if self.zero != 3 or self.parameters:
            self._engine.destroy()
        # Collected later, DeepSpeed's engine would destroy its optimizer again, and with it the links from the
        # parameters to their moments that the next stage's engine has made by then.
        self._engine.optimizer = None
