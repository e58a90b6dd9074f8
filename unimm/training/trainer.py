"""The trainer: runs the stages of a recipe one after another, on DeepSpeed, and can be stopped anywhere.

`train(recipe)` builds the task, resumes from the newest checkpoint if there is one, and ends with the task's
export. A run that was killed and started again ends with the same weights, bit for bit, as one left alone:
the data, the random states and the schedule of a step follow from (seed, stage, step) alone. (On as many
threads and devices, that is: with others, torch sums in another order.)

Also a program: `python -m unimm.training.trainer RECIPE key=value ...`
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn

from unimm.console import replace_unencodable, say
from unimm.errors import UserError, UserNote
from unimm.files import check_folder, check_target, make_folder, open_here, remove_leftovers
from unimm.folders import write_folder
from unimm.garbage import collect_seldom
from unimm.training import checkpoint, shards
from unimm.training.batches import StepBatch, derive_seed, read_ahead
from unimm.training.engine import (
    TrainingEngine,
    check_stages,
    freeze,
    gather_over_ranks,
    in_bfloat16,
    lr_factors,
    pick_device,
    set_modes,
    shortened_warmups,
    start_distributed,
)
from unimm.training.logging import RunLog
from unimm.training.recipe import BaseRecipe, load_recipe
from unimm.training.score import CheckpointMetric
from unimm.training.task import Draws, KnowsData, Moves, Prepares, Repeats, SampleSource, Validates
from unimm.training.validation import measure

_FOLDERS = ("checkpoints", "samples", "tensorboard", "codes", "export", "best")  # of a run
_APPENDED = ("metrics.jsonl", "bad-items.jsonl", "tracker-id")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def train(recipe: BaseRecipe, *, quiet: bool = False) -> Path:
    """Run a recipe to its end, from its newest checkpoint if it has one.

    Args:
        recipe: what to train, and where (`recipe.output`).
        quiet: print nothing (the log files are written all the same).

    Returns:
        The folder of the finished artefact, `output/export`.

    Raises:
        UserError: the recipe does not fit the task or the checkpoint, the loss is no number, or no space is
            left.
        SystemExit: with status 0, after SIGTERM and a checkpoint.
        KeyboardInterrupt: after SIGINT and a checkpoint.
    """
    try:
        with _locked(recipe), _StopSignal() as stop:
            return Run(recipe, stop, quiet).run()
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = error.filename or recipe.output
        raise UserError(f"{where}: cannot write: {error.strerror}; earlier checkpoints are whole") from error


class Run:
    """The state of one `train` call: the task and its module, where it stands, averages, log."""

    def __init__(self, recipe: BaseRecipe, stop: _StopSignal, quiet: bool) -> None:
        self.recipe, self.stop = recipe, stop
        self.output = Path(recipe.output)
        self.device = pick_device(recipe)
        start_distributed(self.device)
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        seed_everything(recipe.seed)
        self.task = recipe.build_task()
        self.module = self.task.build()
        if recipe.zero_stage < 3:  # else the engine moves them slice by slice
            self.module.to(self.device)
        self.groups: Mapping[str, Sequence[nn.Parameter]] = self.task.groups(self.module)
        self.stage, self.stage_step, self.step = 0, 0, 0
        self.average: shards.Average | None = None  # while a stage runs
        self.ema: dict[str, Tensor] = {}  # between stages
        self.ema_updates = 0
        self.stopping = False
        self.score = CheckpointMetric(recipe)
        self.snapshot = checkpoint.read_newest(self.output / "checkpoints")
        if self.snapshot is not None:
            self._restore(self.snapshot)
        check_stages(recipe, self.task, self.groups, self.world, self.stage)
        self.log = RunLog(recipe, self.step, active=self.rank == 0, quiet=quiet)
        for line in shortened_warmups(recipe.stages):
            self.log.say(line)
        if self.snapshot is not None:
            self.log.say(f"resuming from step {self.step} ({self.output / 'checkpoints'})")

    def _restore(self, snapshot: checkpoint.Snapshot) -> None:
        checkpoint.check_resumable(snapshot, self.recipe)
        checkpoint.set_random_states(snapshot.python_rng, snapshot.rng)
        checkpoint.load_state(self.module, snapshot.model, snapshot.source)
        self.stage, self.stage_step, self.step = snapshot.stage, snapshot.stage_step, snapshot.step
        self.ema, self.ema_updates = snapshot.ema, snapshot.ema_updates

    def run(self) -> Path:
        """All stages that are left, then the export."""
        stages = self.recipe.stages
        try:
            while True:
                self._run_stage()
                if self.stage == len(stages) - 1:
                    return self._export()
                self._hand_over()
        finally:
            self.log.close()

    def _hand_over(self) -> None:
        """Start the next stage from this one's weights (averaged, where the recipe averages)."""
        parameters = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, average in self.ema.items():
                parameters[name].copy_(average)
        self.ema, self.ema_updates, self.snapshot = {}, 0, None
        self.stage, self.stage_step = self.stage + 1, 0

    def _run_stage(self) -> None:
        with self.log.aside():
            engine, source = self._start_stage()
        if engine is None:
            return
        stage = self.recipe.stages[self.stage]
        try:
            if self.step == 0:
                self.score.set(self._validate(engine))
            with read_ahead(self.task, source, stage, self.stage_step, self.rank, self.world) as steps:
                for batch in self.log.waiting(steps):
                    self._step(engine, batch.micro_batches, *self._agree(batch))
            with self.log.aside():
                self._end_stage(engine)
        finally:
            engine.close()

    def _start_stage(self) -> tuple[TrainingEngine | None, SampleSource]:
        """The stage's engine (its state put back in mid-stage; None where no step is left) and data."""
        recipe, stage = self.recipe, self.recipe.stages[self.stage]
        freeze(recipe, self.stage, self.groups, self.module)
        source = self.task.dataset(stage, derive_seed(recipe.seed, self.stage))
        if self.snapshot is not None and self.rank == 0 and isinstance(self.task, KnowsData):
            checkpoint.say_changed_data(self.snapshot, self.task.data_state())
        if self.stage_step >= stage.steps:
            return None, source
        if isinstance(self.task, Prepares):
            self.task.prepare(self.module, stage)
        engine = TrainingEngine(recipe, self.stage, self.task, self.module, self.groups, self.device)
        if self.snapshot is not None:
            engine.load_optimizer_tensors(self.snapshot.optimizer, self.snapshot.source)
            self.snapshot = None
        if recipe.ema is not None:
            self.average = shards.Average(engine, recipe.ema, self.ema, self.ema_updates)
            self.ema = {}
        return engine, source

    def _end_stage(self, engine: TrainingEngine) -> None:
        """Take the averages out of the engine, and the weights too."""
        if self.average is not None:
            self.ema, self.ema_updates = self.average.whole(), self.average.updates
            self.average = None
        engine.release()
        self.groups = self.task.groups(self.module)

    def _agree(self, batch: StepBatch) -> tuple[dict[str, float], int]:
        """The step's totals over all ranks, and the most micro-batches of any.

        A stop signal travels along, so that all ranks stop together.
        """
        kinds = sorted(batch.totals)
        numbers = [self.stop.number, len(batch.micro_batches), *(batch.totals[kind] for kind in kinds)]
        stops, counts, *totals = gather_over_ranks(torch.tensor(numbers, dtype=torch.float64)).T
        self.stopping = bool(stops.any())
        sums = {kind: float(total.sum()) for kind, total in zip(kinds, totals, strict=True)}
        return sums, int(counts.max())

    def _step(
        self,
        engine: TrainingEngine,
        batches: Sequence[dict[str, Tensor]],
        totals: Mapping[str, float],
        max_micro_batches: int,
    ) -> None:
        recipe, stage = self.recipe, self.recipe.stages[self.stage]
        seed_everything(derive_seed(recipe.seed, self.stage, self.stage_step, self.rank))
        if isinstance(self.task, Moves):
            self.task.before_step(self.module, self.step)
        if isinstance(self.task, Draws):
            with engine.whole():
                batches = self.task.draw(self.module, batches, self.step)
        result = engine.step(
            batches, totals, self.step, lr_factors(stage, self.stage_step), max_micro_batches
        )
        self.step += 1
        self.stage_step += 1
        if self.average is not None:
            self.average.update()
        last = self.stage_step == stage.steps
        means = self.log.step(
            result,
            step=self.step,
            stage=stage.name,
            rates=engine.rates(),
            samples=stage.batch,
            targets=totals,
            last=last,
            epochs=self._epochs(),
        )
        saving = self.step % recipe.checkpoint.every == 0 or last or self.stopping
        if means is not None:
            self._check(means)
        elif saving:
            self._check({"grad_norm": float(result.norm)})
        self.score.add(result)
        if self._validates(last, saving):
            self.score.set(self._validate(engine))
        every = recipe.logging.samples_every
        if every and (self.step % every == 0 or last):
            self._preview(engine)
        if saving:
            self._save(engine)
        if self.stopping and not last:
            self.log.say(f"stopped at step {self.step}; run the same recipe again to resume")
            if self.stop.number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(0)

    def _validates(self, last: bool, saving: bool) -> bool:
        """Whether held-out items are measured after this step: checkpoints that are compared by them need it."""
        settings = self.recipe.validation
        if settings is None:
            return False
        compared = self.score.by_validation and self.recipe.checkpoint.keep_best > 0
        return self.step % settings.every == 0 or last or (saving and compared)

    def _validate(self, engine: TrainingEngine) -> dict[str, float]:
        """The losses on held-out items, of the weights that an export would have; all ranks call this together."""
        if not isinstance(self.task, Validates) or self.recipe.validation is None:
            return {}
        average = self.average.whole() if self.average is not None else {}
        states = checkpoint.random_states()
        with self.log.aside(), engine.whole(), self._finished_module(average):
            measured = measure(self.task, self.module, self.device, in_bfloat16(self.recipe, self.device))
        checkpoint.set_random_states(*states)
        if measured:
            self.log.validation(measured, self.step, self.recipe.stages[self.stage].name)
        return measured

    def _epochs(self) -> dict[str, float]:
        """How often each source of a limited size has been gone through, over all stages."""
        if not isinstance(self.task, Repeats):
            return {}
        found: dict[str, float] = {}
        for number, stage in enumerate(self.recipe.stages[: self.stage + 1]):
            steps = self.stage_step if number == self.stage else stage.steps
            for name, times in self.task.epochs(stage, steps * stage.batch).items():
                found[name] = found.get(name, 0.0) + times
        return found

    def _check(self, means: Mapping[str, float]) -> None:
        """Stop, before anything is saved, once the loss or its gradient is no number."""
        for name, value in means.items():
            if name in ("loss", "grad_norm") and not math.isfinite(value):
                message = f"{name} is {value} at step {self.step}; lower the rate or lengthen the warmup"
                raise self.recipe.error(f"stages[{self.stage}].lr", message)

    def _save(self, engine: TrainingEngine) -> None:
        with self.log.aside():
            snapshot = self._snapshot(engine)
            if self.rank == 0:
                folder = make_folder(self.output, "checkpoints")
                checkpoint.write_checkpoint(folder, snapshot, self.recipe.checkpoint)
            self._wait()

    def _snapshot(self, engine: TrainingEngine) -> checkpoint.Snapshot:
        """All that a run needs to resume, whole on the first rank; all ranks call this together."""
        keep = self.rank == 0
        python_rng, rng = checkpoint.random_states()
        return checkpoint.Snapshot(
            stage=self.stage,
            stage_step=self.stage_step,
            step=self.step,
            recipe=self.recipe.model_dump(mode="json"),
            model=engine.model_tensors(keep),
            optimizer=engine.optimizer_tensors(keep),
            ema=self.average.whole() if self.average is not None else {},
            ema_updates=self.average.updates if self.average is not None else 0,
            python_rng=python_rng,
            rng=rng,
            score=self.score.take(),
            data=dict(self.task.data_state()) if isinstance(self.task, KnowsData) else {},
        )

    def _preview(self, engine: TrainingEngine) -> None:
        with self.log.aside():
            average = self.average.whole() if self.average is not None else {}
            with engine.whole():
                if self.rank == 0:
                    folder = make_folder(self.output, "samples")
                    with self._finished_module(average):
                        self.task.preview(self.module, folder, self.step)
                    self.log.samples(folder, self.step)
                self._wait()

    def _export(self) -> Path:
        """The artefact of the last weights; and that of the best, where the recipe keeps them."""
        target = self.output / "export"
        if self.rank == 0:
            self._write_artefact(target, self.ema)
            self.log.say(f"done: {target}")
            self._export_best()
        self._wait()
        return target

    def _export_best(self) -> None:
        """The artefact of the best checkpoint that reads whole, where the recipe keeps the best ones."""
        folder, settings = self.output / "checkpoints", self.recipe.checkpoint
        for path in checkpoint.best_checkpoints(folder, self.stage, settings):
            try:
                best = checkpoint.read_checkpoint(path)
            except UserError as error:
                warnings.warn(f"{error}; the next best is taken", UserNote, stacklevel=2)
                continue
            checkpoint.load_state(self.module, best.model, str(path))
            self._write_artefact(self.output / "best", best.ema)
            self.log.say(
                f"best: {self.output / 'best'} (step {best.step}, {settings.metric} {best.score:.4g})"
            )
            return

    def _write_artefact(self, target: Path, averages: Mapping[str, Tensor]) -> None:
        """Export the module, into the place of an earlier artefact in one step."""
        with self._finished_module(averages):
            write_folder(target, partial(self.task.export, self.module))

    @contextmanager
    def _finished_module(self, averages: Mapping[str, Tensor]) -> Iterator[None]:
        """Eval mode, averaged weights, no gradients; everything as before afterwards."""
        parameters = dict(self.module.named_parameters())
        raw = {name: parameters[name].data for name in averages}
        self.module.eval()
        seed_everything(self.recipe.seed)
        try:
            for name, average in averages.items():
                parameters[name].data = average.to(raw[name].device)
            with torch.no_grad():
                yield
        finally:
            for name, value in raw.items():
                parameters[name].data = value
            set_modes(self.module)

    def _wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()


@contextmanager
def _locked(recipe: BaseRecipe) -> Iterator[None]:
    """Hold the output folder, so that two runs never write into one; a dead process holds nothing."""
    output = Path(recipe.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise recipe.error("output", f"{output}: a file is in the way; name another folder") from None
    if int(os.environ.get("RANK", "0")):
        yield
        return
    with os.fdopen(open_here(output / ".lock", os.O_WRONLY | os.O_CREAT), "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise recipe.error("output", f"another run is writing into {output}") from None
        for name in _FOLDERS:  # at once, not at the end of a run
            check_folder(output / name)
        for name in _APPENDED:
            check_target(output / name)
        remove_leftovers(output)
        yield


def seed_everything(seed: int) -> None:
    """Set Python's, numpy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one does its usual work."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> _StopSignal:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}


def main(arguments: Sequence[str]) -> int:
    """`RECIPE key=value ...`: train it; gives the exit status."""
    replace_unencodable()
    collect_seldom()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m unimm.training.trainer RECIPE.yaml [key=value ...]")
        return 0 if arguments else 2
    try:
        train(load_recipe(arguments[0], arguments[1:]))
    except UserError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
