"""What a run tells: JSON lines, TensorBoard, trackers, and a progress bar (or plain lines where nobody watches).

Numbers stay on the device between two log lines; a line holds their means since the last one. Its `data_wait` is the
share of that time that the rank which waited longest spent waiting for samples; `tflops` are those of one device, on
what is learnt from (`unimm.training.flops`), and `mfu` (model FLOPs utilisation) is their share of what it could do.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from unimm.console import one_line, terminal
from unimm.files import atomic_write, check_target, make_folder, open_append
from unimm.images import read_image
from unimm.training.engine import gather_over_ranks, sum_over_ranks
from unimm.training.recipe import VALIDATION
from unimm.training.trackers import Tracker

if TYPE_CHECKING:
    from unimm.training.engine import StepResult
    from unimm.training.recipe import BaseRecipe

Item = TypeVar("Item")
OPERATIONS = "operations"  # among a batch's targets: floating-point operations that it takes


class RunLog:
    """The log of one run; only the first rank has one that writes.

    Args:
        recipe: for `output`, `logging` and the number of steps.
        start: steps already done; later lines of an earlier try are cut off.
        active: whether this rank writes.
        quiet: nothing on the console.
    """

    def __init__(self, recipe: BaseRecipe, start: int, *, active: bool = True, quiet: bool = False) -> None:
        self._every = recipe.logging.every
        self._total = sum(stage.steps for stage in recipe.stages)
        self._active = active
        self._console = terminal(quiet=quiet or not active, soft_wrap=True)
        self._sums: dict[str, Any] = {}
        self._count = 0
        self._samples = 0.0
        self._targets: dict[str, float] = {}
        self._since = time.perf_counter()
        self._waited = 0.0  # seconds, of those since then
        self._tensorboard: Any = None
        self._trackers: list[Tracker] = []
        self._peak = recipe.logging.peak_tflops
        if active:
            self._open(Path(recipe.output), recipe.logging.tensorboard, start)
            self._trackers = [Tracker(name, recipe) for name in recipe.logging.trackers]
        self._bar = self._progress(start)

    def _open(self, output: Path, tensorboard: bool, start: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        path = output / "metrics.jsonl"
        for lines in (path, *(output / "samples").glob("*.jsonl")):
            truncate_lines(lines, start)
        self._file = open_append(path)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(make_folder(output, "tensorboard")), purge_step=start + 1)

    def _progress(self, start: int) -> tuple[Progress, Any] | None:
        if not self._console.is_terminal or self._console.quiet:
            return None
        name = TextColumn("{task.description}", markup=False)
        columns = (name, BarColumn(), "{task.completed}/{task.total}", TimeRemainingColumn())
        progress = Progress(*columns, TextColumn("{task.fields[line]}"), console=self._console)
        progress.start()
        return progress, progress.add_task("", total=self._total, completed=start, line="")

    def waiting(self, steps: Iterable[Item]) -> Iterator[Item]:
        """Pass on what is read for each step, and count the time until it is there (`data_wait` of a line)."""
        iterator = iter(steps)
        while True:
            start = time.perf_counter()
            try:
                step = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield step

    def say(self, line: str) -> None:
        """One line for people."""
        self._console.print(one_line(line))

    def step(
        self,
        result: StepResult,
        *,
        step: int,
        stage: str,
        rates: Mapping[str, float],
        samples: int,
        targets: Mapping[str, float],
        last: bool = False,
        epochs: Mapping[str, float] | None = None,
    ) -> dict[str, float] | None:
        """Take in one step; at every `logging.every`-th (and the `last` of a stage) write a line.

        Args:
            result: what the step gave.
            step: steps done.
            stage: the stage's name.
            rates: the learning rate of each group.
            samples: in the step.
            targets: the step's totals over all ranks.
            last: whether the stage ends here.
            epochs: how often each source of a limited size has been gone through.

        Returns:
            The means of the line (with `loss` and `grad_norm`) where one was due, else None.
        """
        for key, value in result.values.items():
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._count += 1
        self._samples += samples
        for kind, count in targets.items():
            self._targets[kind] = self._targets.get(kind, 0.0) + count
        if self._bar and not (step % self._every == 0 or last):
            self._bar[0].update(self._bar[1], completed=step, description=one_line(stage))
        if step % self._every and not last:
            return None
        return self._write(step, stage, rates, epochs or {})

    def validation(self, means: Mapping[str, float], step: int, stage: str) -> None:
        """Write a line with the losses on held-out items."""
        if not self._active:
            return
        self._record({"step": step, "stage": stage, **means})
        losses = "  ".join(f"{name.removeprefix(VALIDATION)} {value:.4f}" for name, value in means.items())
        self.say(f"{stage} {step}/{self._total}  validation: {losses}")

    def samples(self, folder: Path, step: int) -> None:
        """Pass what a preview wrote into `folder` at a step on to TensorBoard: sheets, numbers and texts."""
        if self._tensorboard is None:
            return
        for path in sorted(folder.glob("*.png")):
            kind, written = kind_and_step(path)
            if written == step:
                pixels = np.asarray(read_image(path))
                self._tensorboard.add_image(f"samples/{kind or 'drawings'}", pixels, step, dataformats="HWC")
        for path in sorted(folder.glob("*.jsonl")):
            line = _last_line(path)
            if line.get("step") != step:
                continue
            for key, value in line.items():
                tag = f"samples/{path.stem}/{key}"
                if isinstance(value, float):
                    self._tensorboard.add_scalar(tag, value, step)
                elif isinstance(value, list):
                    shown = json.dumps(value, ensure_ascii=False, indent=1)
                    self._tensorboard.add_text(tag, f"```\n{shown}\n```", step)

    def _write(
        self, step: int, stage: str, rates: Mapping[str, float], epochs: Mapping[str, float]
    ) -> dict[str, float]:
        means = self._means()
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        samples = self._samples / elapsed
        tokens = sum(count for kind, count in self._targets.items() if "token" in kind) / elapsed
        speed = self._operations(elapsed)
        left = (self._total - step) * elapsed / self._count
        waited = float(gather_over_ranks(torch.tensor([self._waited])).max())  # all wait for the slowest
        if self._active:
            line = {
                "step": step,
                "stage": stage,
                **means,
                "samples_per_second": samples,
                "tokens_per_second": tokens,
                "data_wait": min(waited / elapsed, 1.0),
                **speed,
            }
            line |= {f"lr/{name}": rate for name, rate in rates.items()}
            line |= {f"epoch/{name}": times for name, times in epochs.items()}
            self._record(line)
            speeds = f"{_epochs(epochs)}{samples:.1f} samples/s"
            if tokens:
                speeds += f"  {tokens:,.0f} tokens/s"
            if "mfu" in speed:
                speeds += f"  {speed['mfu']:.1%} MFU"
            self._show(step, stage, means, max(rates.values()), speeds, left)
        self._sums, self._targets, self._samples, self._count, self._waited = {}, {}, 0.0, 0, 0.0
        self._since = time.perf_counter()
        return means

    def _means(self) -> dict[str, float]:
        """Means since the last line, over all ranks."""
        return means_over_ranks(self._sums, self._count)

    def _operations(self, elapsed: float) -> dict[str, float]:
        """TFLOP/s of a device since the last line and their share of its peak, as far as they are known."""
        if OPERATIONS not in self._targets:
            return {}
        reached = self._targets[OPERATIONS] / elapsed / torch.distributed.get_world_size() / 1e12
        return {"tflops": reached, **({"mfu": reached / self._peak} if self._peak else {})}

    def _record(self, line: Mapping[str, Any]) -> None:
        """Write a line into the log, and pass its numbers on to TensorBoard and trackers."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        step = line["step"]
        numbers = {key: value for key, value in line.items() if isinstance(value, float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        for tracker in self._trackers:
            tracker.log(numbers, step)

    def _show(
        self,
        step: int,
        stage: str,
        means: Mapping[str, float],
        rate: float,
        speed: str,
        left: float,
    ) -> None:
        text = f"loss {means['loss']:.4f}  lr {rate:.2e}  {speed}"
        if self._bar:
            self._bar[0].update(self._bar[1], completed=step, description=one_line(stage), line=text)
            return
        extra = "".join(f"  {key} {value:.4g}" for key, value in means.items() if key != "loss")
        self.say(f"{stage} {step}/{self._total}  {text}{extra}  left {_clock(left)}")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Do not count what happens inside (a preview, a checkpoint) into the speeds."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self) -> None:
        """Flush and close everything."""
        if self._bar:
            self._bar[0].stop()
        if self._active:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        for tracker in self._trackers:
            tracker.close()


def means_over_ranks(sums: Mapping[str, Any], count: int) -> dict[str, float]:
    """Means of sums over `count` steps, over all ranks: losses add up, the gradient's norm is the same on each.

    They are means per step, or over the counts that came with the sums; what was never counted is left out.
    """
    values = [torch.as_tensor(value, dtype=torch.float32).cpu() for value in sums.values()]
    totals = sum_over_ranks(torch.cat([value.view(-1) for value in values]))
    parts = totals.split([value.numel() for value in values])
    means = {
        key: float(part[0]) / (float(part[1]) if len(part) == 2 else count)
        for key, part in zip(sums, parts, strict=True)
        if len(part) == 1 or part[1]
    }
    if "grad_norm" in means:
        means["grad_norm"] /= torch.distributed.get_world_size()
    return means


def truncate_lines(path: Path, step: int) -> None:
    """Drop the JSON lines of steps after `step`, and a last line that was cut off in writing."""
    if not path.exists():
        return
    check_target(path)
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    with atomic_write(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def kind_and_step(path: Path) -> tuple[str, int | None]:
    """What a sheet of samples shows and the step it is of: `seen-0000250.png` is of the kind `seen`."""
    match = re.fullmatch(r"(?:(.*)-)?(\d+)", path.stem)
    return (match[1] or "", int(match[2])) if match else (path.stem, None)


def _last_line(path: Path) -> dict[str, Any]:
    """The last of a file's JSON lines; empty where it is none."""
    with suppress(OSError, ValueError, IndexError):
        line = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        return line if isinstance(line, dict) else {}
    return {}


def _epochs(times: Mapping[str, float]) -> str:
    """`epoch 2.3  `; of sources that are gone through unlike often the least and the most."""
    if not times:
        return ""
    least, most = (f"{pick(times.values()):.1f}" for pick in (min, max))
    return f"epoch {least}  " if least == most else f"epoch {least} to {most}  "


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
