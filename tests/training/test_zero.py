"""ZeRO 0 to 3 on one process and two: the same steps, whole checkpoints, and a change of either between runs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training.test_trainer import assert_same, lines, recipe, weights
from tests.training.toy import ToyRecipe, ToyTask
from tests.two_processes import on_two_processes
from unimm.training.engine import TrainingEngine, freeze, start_distributed
from unimm.training.trainer import seed_everything, train

STAGES = (
    {"steps": 8, "batch": 8, "lr": {"body": 1e-2, "head": 3e-3}, "warmup": 3},
    {"steps": 4, "batch": 8, "lr": {"norm": 1e-2, "head": 1e-3}, "schedule": "cosine"},
)
OTHER = {
    "ema": 0.8,
    "optimizer": {"clip": 0.5, "weight_decay": 0.1},
    "logging": {"every": 1, "samples_every": 5, "tensorboard": False},
    "checkpoint": {"every": 3, "keep": 9},
}


def sharded(zero: int) -> dict[str, Any]:
    """The engine's section; at stage 3 no weight is too small to be cut into slices."""
    return {"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0}}


def made(folder: Path, zero: int, micro: int = 4) -> ToyRecipe:
    """Two stages, with two rates and something frozen in each."""
    stages = [{**stage, "micro_batch": micro} for stage in STAGES]
    return recipe(folder, *stages, deepspeed=sharded(zero), **OTHER)


def grown(folder: Path, zero: int, steps: int) -> ToyRecipe:
    """One stage that can be resumed at another length."""
    stage = {**STAGES[0], "steps": steps, "micro_batch": 4}
    return recipe(folder, stage, deepspeed=sharded(zero), **OTHER)


def trained_by_two(*recipes: ToyRecipe, dies_at: str = "") -> int:
    """Train recipes one after another on two processes; gives the exit status."""
    paths = [one.source for one in recipes]
    return on_two_processes(Path(__file__).with_name("run_recipes.py"), *paths, TOY_DIES_AT=dies_at)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recipe at every stage of ZeRO, on one process (`one-0` ...) and on two (`two-0` ...)."""
    folder = tmp_path_factory.mktemp("zero")
    for zero in range(4):
        train(made(folder / f"one-{zero}", zero), quiet=True)
    train(made(folder / "accumulated", 2, micro=1), quiet=True)
    train(grown(folder / "undisturbed", 0, 12), quiet=True)
    train(grown(folder / "grown", 0, 4), quiet=True)
    killed = [made(folder / f"killed-{zero}", zero) for zero in (3, 2)]
    assert trained_by_two(killed[0], dies_at="7") != 0
    assert trained_by_two(killed[1], dies_at="10") != 0
    two = [made(folder / f"two-{zero}", zero) for zero in range(4)]
    assert trained_by_two(*two, *killed, grown(folder / "grown", 2, 8)) == 0
    train(grown(folder / "grown", 3, 12), quiet=True)
    return folder


def checkpoint(folder: Path, step: int, part: str = "model") -> dict[str, Tensor]:
    return load_file(folder / "out" / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors")


def assert_same_steps(one: Path, two: Path, tolerance: float) -> None:
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=tolerance)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=10 * tolerance)


NAMES = [f"{processes}-{zero}" for processes in ("one", "two") for zero in range(4)]


@pytest.mark.parametrize("name", [*NAMES[1:], "accumulated"])
def test_every_stage_and_number_of_processes_takes_the_same_steps(runs: Path, name: str) -> None:
    assert_same_steps(runs / name, runs / "one-0", 1e-5)
    assert lines(runs / name)[0]["grad_norm"] > 0.5, "nothing was clipped"
    for part in ("model", "ema", "optimizer"):
        ours, theirs = checkpoint(runs / name, 6, part), checkpoint(runs / "one-0", 6, part)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)
    for key, tensor in weights(runs / "one-0").items():
        torch.testing.assert_close(weights(runs / name)[key], tensor, rtol=0, atol=1e-5)
    for step in (5, 8, 10, 12):  # what the averaged weights say
        ours, theirs = (
            float((runs / run / "out" / "samples" / f"{step}.txt").read_text()) for run in (name, "one-0")
        )
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_keep_their_bits_and_trained_ones_all_move(runs: Path, name: str) -> None:
    seed_everything(0)
    start = ToyTask(made(runs / "unused", 0).model).build().state_dict()
    first, averaged = checkpoint(runs / name, 8), checkpoint(runs / name, 8, "ema")
    for key in start:
        assert torch.equal(first[key], start[key]) == key.startswith("3."), key
    second = checkpoint(runs / name, 12)
    for key in start:  # this stage began at the averages of the one before
        before = averaged.get(key, start[key])
        assert torch.equal(second[key], before) == key.startswith("0."), key


@pytest.mark.parametrize("zero", [2, 3])
def test_one_process_killed_and_started_again_ends_with_the_same_bits(runs: Path, zero: int) -> None:
    assert_same(weights(runs / f"killed-{zero}"), weights(runs / f"two-{zero}"))
    for part in ("model", "optimizer", "ema"):
        assert_same(checkpoint(runs / f"killed-{zero}", 12, part), checkpoint(runs / f"two-{zero}", 12, part))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_finished_stage_that_is_collected_late_takes_nothing_from_the_next(
    tmp_path: Path, zero: int
) -> None:
    plan = made(tmp_path, zero)
    task = ToyTask(plan.model)
    module = task.build()
    start_distributed(torch.device("cpu"))

    def engine(stage: int) -> TrainingEngine:
        freeze(plan, stage, task.groups(module), module)
        return TrainingEngine(plan, stage, task, module, task.groups(module), torch.device("cpu"))

    first = engine(0)
    first.release()
    first.close()
    second = engine(1)
    state = {name: torch.full_like(value, 0.5) for name, value in second.optimizer_tensors(True).items()}
    second.load_optimizer_tensors(state)
    del first
    gc.collect()
    assert_same(second.optimizer_tensors(True), state)
    second.release()
    second.close()


def test_processes_and_stage_may_change_between_runs(runs: Path) -> None:
    """4 steps on one process with ZeRO 0, 4 on two with ZeRO 2, 4 on one with ZeRO 3."""
    assert_same_steps(runs / "grown", runs / "undisturbed", 1e-5)
