"""From a task's samples to the micro-batches of a step, read ahead in one thread; and mixtures of sources.

The place in the data is the step itself (step s reads the samples s * batch onwards), so a run that resumes
at step s needs no iterator state. Ranks take the micro-batches in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from unimm.errors import UserError
from unimm.training.packing import best_fit
from unimm.training.task import Packs

if TYPE_CHECKING:
    from unimm.training.recipe import Stage
    from unimm.training.task import Batch, SampleSource, Task

AHEAD = 2  # steps read before they are asked for


@dataclass(frozen=True)
class StepBatch:
    """All that this rank forwards in one step, and its share of the step's totals."""

    micro_batches: list[Batch]
    totals: dict[str, float]


def derive_seed(*parts: int) -> int:
    """A 32-bit seed from several numbers; any change in any of them gives an unrelated one."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def read_step(
    task: Task, source: SampleSource, stage: Stage, step: int, rank: int = 0, world: int = 1
) -> StepBatch:
    """The micro-batches of `step` (0-based, within the stage) for one rank, and the sums of their targets.

    Samples of like length share a micro-batch, so that little of it is padding; or, where the stage packs,
    they share rows.
    """
    make = _padded if stage.pack is None else _packed
    micro_batches = make(task, source, stage, step * stage.batch, rank, world)
    totals: dict[str, float] = {}
    for batch in micro_batches:
        for kind, count in task.targets(batch).items():
            totals[kind] = totals.get(kind, 0.0) + float(count)
    return StepBatch(micro_batches, totals)


def _padded(task: Task, source: SampleSource, stage: Stage, first: int, rank: int, world: int) -> list[Batch]:
    micro = stage.micro
    starts = range(first + rank * micro, first + stage.batch, micro * world)
    samples = [source[index] for start in starts for index in range(start, start + micro)]
    samples.sort(key=task.length)
    return [task.collate(samples[start : start + micro]) for start in range(0, len(samples), micro)]


def _packed(task: Task, source: SampleSource, stage: Stage, first: int, rank: int, world: int) -> list[Batch]:
    assert stage.pack is not None and isinstance(task, Packs)
    settings = stage.pack
    samples = [source[index] for index in range(first + rank, first + stage.batch, world)]
    lengths, images = [task.length(one) for one in samples], [task.images(one) for one in samples]
    key = f"stages.{stage.name}.pack"
    if max(lengths) > settings.length:
        raise UserError(f"{key}.length: a sample has {max(lengths)} tokens, a row holds {settings.length}")
    if settings.images is not None and max(images) > settings.images:
        raise UserError(f"{key}.images: a sample has {max(images)} images, a row holds {settings.images}")
    rows = [
        [samples[index] for index in row]
        for row in best_fit(lengths, images, settings.length, settings.images)
    ]
    return [
        task.collate_rows(rows[start : start + settings.rows]) for start in range(0, len(rows), settings.rows)
    ]


@contextmanager
def read_ahead(
    task: Task, source: SampleSource, stage: Stage, start: int, rank: int = 0, world: int = 1
) -> Iterator[Iterator[StepBatch]]:
    """The steps `start`, `start + 1`, ... of a stage, read ahead in one thread; errors come through."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="samples")

    def submit(step: int) -> Future[StepBatch]:
        return pool.submit(read_step, task, source, stage, step, rank, world)

    def steps() -> Iterator[StepBatch]:
        waiting = [submit(step) for step in range(start, min(start + AHEAD, stage.steps))]
        for step in range(start, stage.steps):
            if step + AHEAD < stage.steps:
                waiting.append(submit(step + AHEAD))
            yield waiting.pop(0).result()

    try:
        yield steps()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def mix(
    datasets: Mapping[str, Sequence[Any]], weights: Mapping[str, float], seed: int, shuffle: bool = True
) -> Any:
    """An endless `grain.MapDataset` that takes from several sources by weight.

    The interleaving is fixed, not drawn: any run of samples holds each source's share to about one sample.

    Args:
        datasets: name -> anything with `len` and indexing (a `grain.MapDataset` too).
        weights: name -> share; those at 0 and those not named are left out.
        seed: of the order within each source, anew in each pass over it.
        shuffle: False reads each source in its own order (for sources that are random already).

    Raises:
        UserError: a weight for an unknown source, an empty source, or no weight above 0.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # grain warns at import that there is no jax
    import grain

    names = [name for name in weights if weights[name] > 0]
    for name in weights:
        if name not in datasets:
            raise UserError(f"mixture.{name}: no such kind of data; known: {', '.join(datasets)}")
    if not names:
        raise UserError(f"mixture: expected a share above 0 for one of {', '.join(datasets)}")
    parts = []
    for position, name in enumerate(names):
        source = datasets[name]
        if len(source) == 0:
            raise UserError(f"mixture.{name}: has no samples")
        part = source if isinstance(source, grain.MapDataset) else grain.MapDataset.source(source)
        if shuffle:
            part = part.seed(derive_seed(seed, position)).shuffle()
        parts.append(part.repeat())
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, weights=[weights[name] for name in names])
