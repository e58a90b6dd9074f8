"""A program for tests, alone or under a launcher: look at each stage's batch without a step, then take two."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from unimm.training.batches import read_step
from unimm.training.engine import StepResult, TrainingEngine, freeze, start_distributed, sum_over_ranks
from unimm.training.recipe import Stage, load_recipe
from unimm.training.trainer import seed_everything


def look_and_step(path: Path) -> None:
    """Write what each stage's first batch gives, and the last stage's two steps, beside a recipe: what the trainer
    does, but with one engine for all stages, whose rate is 0 while it looks."""
    recipe = load_recipe(path)
    start_distributed(torch.device("cpu"))
    rank = torch.distributed.get_rank()
    seed_everything(recipe.seed)
    task = recipe.build_task()
    module = task.build()
    groups, last = task.groups(module), len(recipe.stages) - 1
    freeze(recipe, last, groups, module)
    sources = [task.dataset(stage, 0) for stage in recipe.stages]
    engine = TrainingEngine(recipe, last, task, module, groups, torch.device("cpu"))
    metrics = {
        stage.name: step(engine, task, sources[i], stage, 0, 0.0) for i, stage in enumerate(recipe.stages)
    }
    metrics |= {f"step {n}": step(engine, task, sources[last], recipe.stages[last], n, 1.0) for n in (0, 1)}
    state = engine.model_tensors(rank == 0)
    engine.release()
    engine.close()
    if rank == 0:
        path.with_name("metrics.json").write_text(json.dumps(metrics))
        save_file(state, path.with_name("end.safetensors"))


def step(
    engine: TrainingEngine, task: Any, source: Any, stage: Stage, number: int, factor: float
) -> dict[str, float]:
    """One step of the engine as the trainer takes it; gives its loss, norm and metrics over all processes."""
    batch = read_step(task, source, stage, number, torch.distributed.get_rank(), engine.world)
    totals = dict(
        zip(batch.totals, sum_over_ranks(torch.tensor([*batch.totals.values()])).tolist(), strict=True)
    )
    result: StepResult = engine.step(batch.micro_batches, totals, number, factor)
    names = ["loss", *result.metrics]
    values = torch.stack([result.loss.double(), *(value.double() for value in result.metrics.values())])
    return {**dict(zip(names, sum_over_ranks(values).tolist(), strict=True)), "norm": float(result.norm)}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        look_and_step(Path(name))
        gc.freeze()  # what is imported now stays; DeepSpeed asks for whole collections whenever it shards
