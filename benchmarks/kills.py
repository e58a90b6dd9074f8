"""A run of two processes, killed at random moments and started again: does it end as if nothing had happened?

    python benchmarks/kills.py                       # 20 kills
    python benchmarks/kills.py --zero 2 --seed 1

Trains the small regression of the tests (two stages, dropout, moving averages) under torchrun, with checkpoints of 60
MB every three steps. One process chosen at random (rank 0, rank 1 or the launcher) gets SIGKILL, at moments chosen
beforehand: some during start-up, some at any time after a step, some while the next checkpoint is being written. What
is left is ended, every checkpoint under its final name is read, and the same command is run again. At the end all
tensors are compared, bit by bit, with those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from unimm.files import NEIGHBOUR
from unimm.training.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "training" / "run_recipes.py"
WIDTH = 300_000  # of the hidden layer: 60 MB a checkpoint
EVERY = 3  # steps between checkpoints
AT_START, SAVING = 0.2, 0.4  # shares of kills during start-up and while saving
WRITING = 0.05  # seconds within which such a kill follows the start of the writing
PATIENCE = 60.0  # seconds that the other processes have to notice


@dataclass
class Kill:
    """When a kill is due: seconds after the launch (no step), after a step, or after the next checkpoint is begun."""

    victim: str
    step: int | None
    saving: bool
    seconds: float

    def __str__(self) -> str:
        moment = "starting" if self.step is None else f"step {self.step}"
        return f"{moment}{', saving' if self.saving else ''} + {self.seconds:.2f} s"


def write_recipe(folder: Path, steps: int, zero: int) -> Path:
    """Write the recipe of a run in `folder`."""
    half = steps // 2
    common = {"batch": 8, "micro_batch": 4}
    stages = [
        {"name": "one", "steps": half, "lr": {"body": 1e-3, "head": 3e-4}, "schedule": "cosine", **common},
        {"name": "two", "steps": steps - half, "lr": {"head": 1e-4, "norm": 1e-3}, "warmup": 5, **common},
    ]
    recipe = {
        "task": "toy",
        "output": str(folder / "out"),
        "model": {"width": WIDTH, "dropout": 0.2},
        "stages": stages,
        "ema": 0.95,
        "device": "cpu",
        "logging": {"every": 1, "tensorboard": False},
        "checkpoint": {"every": EVERY, "keep": 2},
        "deepspeed": {"zero_optimization": {"stage": zero}},
    }
    folder.mkdir()
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def launch(recipe: Path) -> subprocess.Popen[bytes]:
    """Start two processes on a recipe, in a session of their own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*launcher, str(WORKER), str(recipe)], cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def workers(launcher: int) -> dict[str, int]:
    """The launcher's processes by name ("rank 0"), those that are there already."""
    found: dict[str, int] = {}
    with suppress(OSError):  # the launcher, or another child of it, has just ended
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [one[5:].decode() for one in variables if one.startswith(b"RANK=")]
            found |= {f"rank {rank}": int(child) for rank in ranks}
    return found


def logged_step(folder: Path) -> int:
    """The last step in the log; 0 if there is none."""
    try:
        lines = (folder / "out" / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def saved(folder: Path) -> list[Path]:
    """All checkpoints under their final names, oldest first."""
    return sorted((folder / "out" / "checkpoints").glob("step-*"))


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process that wrote it died."""
    return any((folder / "out" / "checkpoints").glob(f".step-*{NEIGHBOUR}"))


def wait_for(kill: Kill, run: subprocess.Popen[bytes], folder: Path) -> None:
    """Sleep until a kill is due: once the processes run, or the step and a checkpoint of this try are there."""
    before = {path.name for path in saved(folder)}

    def due() -> bool:
        if kill.step is None:
            return len(workers(run.pid)) == 2
        if kill.saving and not is_saving(folder):  # first, since it is soon over
            return False
        return logged_step(folder) >= kill.step and bool({path.name for path in saved(folder)} - before)

    while not due():
        if run.poll() is not None:
            sys.exit(f"the run ended by itself with status {run.returncode}")
        time.sleep(0.001)
    time.sleep(kill.seconds)


def strike(kill: Kill, run: subprocess.Popen[bytes], folder: Path) -> bool:
    """Kill one process; the others may notice, and are killed where they do not (as a cluster would).

    Returns:
        Whether a checkpoint was being written at that moment.
    """
    pids = workers(run.pid) | {"launcher": run.pid}
    saving = is_saving(folder)
    os.kill(pids[kill.victim], signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in pids.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids.values()):
        time.sleep(0.01)
    return saving


def undisturbed(recipe: Path) -> tuple[float, float]:
    """Let a run end; return its seconds to start (up to the first checkpoint), and for each of the next checkpoints."""
    run, folder = launch(recipe), recipe.parent
    while len(workers(run.pid)) < 2:
        time.sleep(0.01)
    begun = time.perf_counter()
    while not saved(folder) and run.poll() is None:
        time.sleep(0.01)
    first = time.perf_counter()
    if run.wait():
        sys.exit("the undisturbed run failed")
    return first - begun, (time.perf_counter() - first) / (logged_step(folder) / EVERY)


def draw_kills(count: int, steps: int, starting: float, period: float, seed: int) -> list[Kill]:
    """Choose victims and moments at random; the steps are in order."""
    chance = random.Random(seed)
    kinds = ["starting"] * round(count * AT_START) + ["saving"] * round(count * SAVING)
    kinds += ["running"] * (count - len(kinds))
    chance.shuffle(kinds)
    lengths = {"starting": starting, "saving": WRITING, "running": period}
    later = iter(sorted(chance.sample(range(1, steps * 3 // 4), count)))
    return [
        Kill(
            chance.choice(("rank 0", "rank 0", "rank 1", "rank 1", "launcher")),  # rank 0 writes
            next(later) if kind != "starting" else None,
            kind == "saving",
            chance.uniform(0, lengths[kind]),
        )
        for kind in kinds
    ]


def unreadable(folder: Path) -> list[str]:
    """Read every checkpoint under its final name; return those that cannot be read, and why."""
    faults = []
    for path in saved(folder):
        try:
            read_checkpoint(path)
        except Exception as error:
            faults.append(f"{path.name}: {error}")
    return faults


def differences(one: Path, two: Path) -> list[str]:
    """Tensors of the exports and of the last checkpoints that differ in any bit."""
    pairs = [(one / "out" / "export" / "w.safetensors", two / "out" / "export" / "w.safetensors")]
    pairs += [
        (saved(one)[-1] / f"{part}.safetensors", saved(two)[-1] / f"{part}.safetensors")
        for part in ("model", "optimizer", "ema", "rng")
    ]
    found = []
    for first, second in pairs:
        mine, theirs = load_file(first), load_file(second)
        found += [
            f"{first.name}: {name}"
            for name in mine.keys() | theirs.keys()
            if name not in mine or name not in theirs or not torch.equal(mine[name], theirs[name])
        ]
    return found


def main() -> None:
    """Run undisturbed, then with kills, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero", type=int, default=0, help="stage of ZeRO")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        alone = write_recipe(Path(place) / "alone", options.steps, options.zero)
        killed = write_recipe(Path(place) / "killed", options.steps, options.zero)
        starting, period = undisturbed(alone)
        print(f"undisturbed: {starting:.1f} s to start, {EVERY} steps and a checkpoint in {period:.2f} s")
        print(f"{'kill':>4}  {'process':<9}{'moment':<28}{'log at step':>11}  {'saving':<8}resumes at step")
        folder, faults, hits, cut = killed.parent, [], 0, 0
        kills = draw_kills(options.kills, options.steps, starting, period, options.seed)
        for number, kill in enumerate(kills, 1):
            run = launch(killed)
            wait_for(kill, run, folder)
            saving = strike(kill, run, folder)
            hits += saving
            cut += is_saving(folder)
            faults += unreadable(folder)
            newest = saved(folder)[-1].name[5:] if saved(folder) else "0"
            print(
                f"{number:>4}  {kill.victim:<9}{kill!s:<28}"
                f"{logged_step(folder):>11}  {'yes' if saving else 'no':<8}{int(newest)}", flush=True,
            )  # fmt: skip
        if launch(killed).wait():
            sys.exit("the last run failed")
        found = differences(alone.parent, folder)
    print(
        f"{options.kills} kills, {hits} while a checkpoint was written, {cut} of which left half of one behind"
    )
    print(f"checkpoints that cannot be read: {len(faults)}")
    print("\n".join(faults + found) or "all tensors of export and last checkpoint are equal, bit by bit")
    sys.exit(bool(faults or found))


if __name__ == "__main__":
    main()
