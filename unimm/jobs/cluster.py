"""A batch job spread by Ray Data: each worker holds a copy of the model and writes whole shards into the job's folder.

The folder, the source and the model have to be reachable under the same names from every machine. What a worker that
died had done is in the folder, so whoever takes over its shards goes on with the next item.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unimm.clusters import connected, import_ray
from unimm.errors import UserError
from unimm.jobs.recipe import AnyJob, job_of
from unimm.jobs.work import JobFolder

MOST_TOGETHER = 8  # shards that a worker runs without a gap


def run_on_ray(
    recipe: AnyJob, folder: JobFolder, shards: Sequence[int], on_done: Callable[[int], None]
) -> None:
    """Run shards by workers of Ray Data.

    Args:
        recipe: of the job.
        folder: where it writes.
        shards: those that are not done.
        on_done: called with a number of items that are done.

    Raises:
        UserError: Ray is not installed or has not the resources, or a worker cannot go on.
    """
    ray, how = import_ray("engine", "data"), recipe.ray
    with connected(ray, how.address, "ray.address"):
        _check_resources(ray, recipe)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        together = max(1, min(MOST_TOGETHER, len(shards) // (4 * how.workers)))
        listed = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        done = listed.map_batches(
            ShardWorker,
            fn_constructor_args=(_absolute(recipe), recipe._file, str(folder.path.resolve())),
            batch_size=together,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=how.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=how.cpus,
            num_gpus=how.gpus,
        )
        try:
            for row in done.iter_rows():
                on_done(len(folder.range_of(int(row["shard"]))))
        except Exception as error:
            raise _mistake(error) from None


class ShardWorker:
    """Writes shards in a process of Ray's.

    Args:
        document: the recipe, with paths that hold everywhere.
        file: what errors call the recipe.
        folder: where it writes.
    """

    def __init__(self, document: dict[str, Any], file: str, folder: str) -> None:
        import torch

        from unimm.jobs.items import JobItems
        from unimm.jobs.run import ShardRunner, load_job_model

        recipe = job_of(document, file)
        torch.set_num_threads(max(1, int(recipe.ray.cpus)))
        place = JobFolder(recipe, JobItems(recipe), Path(folder))
        self.runner = ShardRunner(recipe, load_job_model(recipe), place, lambda count: None)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards of a batch that are not written, as those are whose worker died before it could say so."""
        shards = [int(shard) for shard in batch["shard"]]
        self.runner.run([shard for shard in shards if not self.runner.folder.is_done(shard)])
        return {"shard": batch["shard"]}


def _check_resources(ray: Any, recipe: AnyJob) -> None:
    """Refuse workers that would wait for ever."""
    there = ray.cluster_resources()
    for name, each in (("CPU", recipe.ray.cpus), ("GPU", recipe.ray.gpus)):
        if each * recipe.ray.workers > there.get(name, 0):
            key = f"{name.lower()}s"
            raise recipe.error(
                f"ray.{key}",
                f"{recipe.ray.workers} workers of {each:g} {key}, but the cluster has {there.get(name, 0):g}",
            )


def _absolute(recipe: AnyJob) -> dict[str, Any]:
    """A recipe as a document whose paths hold wherever one stands."""
    document = recipe.model_dump()
    source = document["source"]
    if isinstance(source["path"], list):
        source["path"] = [os.path.abspath(path) for path in source["path"]]
    else:
        source["path"] = os.path.abspath(source["path"])
    if source["images"] is not None:
        source["images"] = os.path.abspath(source["images"])
    if recipe.model is not None and Path(recipe.model).is_dir():
        document["model"] = os.path.abspath(recipe.model)
    return document


def _mistake(error: BaseException) -> BaseException:
    """The mistake of a user behind an error that Ray passed on; else the error itself."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, UserError):
            return UserError(str(getattr(found, "cause", None) or found).strip().splitlines()[-1])
        found = getattr(found, "cause", None) or found.__cause__
    return error
