"""The trainer on a real small regression: it learns, it accumulates exactly, and it survives being killed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training.toy import ToyRecipe, ToyTask
from unimm.errors import UserError
from unimm.files import NEIGHBOUR
from unimm.training.engine import StepResult, check_stages, start_distributed
from unimm.training.logging import RunLog
from unimm.training.recipe import load_recipe
from unimm.training.trainer import seed_everything, train

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "import sys, tests.training.toy; from unimm.training.trainer import main; sys.exit(main(sys.argv[1:]))"
)


def recipe(folder: Path, *stages: dict[str, Any], **other: Any) -> ToyRecipe:
    """A toy recipe that writes into `folder`, read from a real file."""
    filled = [{"name": f"s{i}", "steps": 20, "batch": 8, **stage} for i, stage in enumerate(stages)]
    quick = {"logging": {"every": 1, "tensorboard": False}, "checkpoint": {"every": 1000}, "device": "cpu"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps({"task": "toy", "output": str(folder / "out"), "stages": filled, **quick, **other})
    )
    loaded = load_recipe(path)
    assert isinstance(loaded, ToyRecipe)
    return loaded


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "out" / "export" / "w.safetensors")


def last_checkpoint(folder: Path) -> Path:
    return max((folder / "out" / "checkpoints").glob("step-*"))


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


ALL = {"body": 1e-2, "norm": 1e-2, "head": 1e-2}


def test_loss_falls_and_everything_is_written(tmp_path: Path) -> None:
    logging = {"every": 50, "samples_every": 100, "tensorboard": True}
    made = recipe(tmp_path, {"steps": 300, "batch": 32, "lr": ALL, "warmup": 10}, logging=logging)
    export = train(made, quiet=True)
    assert export == tmp_path / "out" / "export"
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [50, 100, 150, 200, 250, 300]
    assert log[-1]["loss"] < 0.25 * log[0]["loss"]
    assert log[-1]["squared"] == pytest.approx(log[-1]["loss"])
    assert log[-1]["lr/head"] == 1e-2
    assert log[-1]["samples_per_second"] > 0 and log[-1]["tokens_per_second"] > 0
    assert all(0 <= line["data_wait"] < 1 for line in log)
    assert sorted(path.name for path in (tmp_path / "out" / "samples").iterdir()) == [
        "100.txt",
        "200.txt",
        "300.txt",
    ]
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    assert last_checkpoint(tmp_path).name == "step-00000300"


def test_the_wait_for_data_is_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, {"steps": 4, "lr": ALL}, logging={"every": 2, "tensorboard": False})
    start_distributed(torch.device("cpu"))
    now = [0.0]
    monkeypatch.setattr("unimm.training.logging.time", SimpleNamespace(perf_counter=lambda: now[0]))
    log = RunLog(made, 0, quiet=True)

    def steps() -> Iterator[int]:
        for step in range(1, 5):
            now[0] += 1.0 if step <= 2 else 0.5  # seconds until the samples are there
            yield step

    zero = StepResult(torch.zeros(()), {}, torch.zeros(()))
    for step in log.waiting(steps()):
        now[0] += 3.0
        with log.aside():
            now[0] += 60.0
        log.step(zero, step=step, stage="s0", rates={"body": 1.0}, samples=8, targets={})
    log.close()
    assert [line["data_wait"] for line in lines(tmp_path)] == [pytest.approx(1 / 4), pytest.approx(1 / 7)]


def test_accumulating_eight_micro_batches_equals_one_batch(tmp_path: Path) -> None:
    stage = {"steps": 12, "batch": 8, "lr": ALL}
    train(recipe(tmp_path / "whole", {**stage, "micro_batch": 8}), quiet=True)
    train(recipe(tmp_path / "parts", {**stage, "micro_batch": 1}), quiet=True)
    for one, two in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], abs=1e-4)


def test_each_group_has_its_rate_and_frozen_groups_do_not_move(tmp_path: Path) -> None:
    made = recipe(tmp_path, {"steps": 1, "lr": {"body": 1e-3, "head": 1e-5}}, seed=5)
    train(made, quiet=True)
    after = weights(tmp_path)
    seed_everything(5)
    before = ToyTask(made.model).build().state_dict()
    for name in ("3.weight", "3.bias"):
        assert torch.equal(before[name], after[name])
    # AdamW's first step moves every weight by its learning rate, whatever the gradient
    assert (after["0.weight"] - before["0.weight"]).abs().median().item() == pytest.approx(1e-3, rel=1e-2)
    assert (after["4.weight"] - before["4.weight"]).abs().median().item() == pytest.approx(1e-5, rel=2e-2)


def test_weight_decay_falls_on_matrices_only(tmp_path: Path) -> None:
    decay = {"optimizer": {"weight_decay": 0.5}}
    train(recipe(tmp_path / "with", {"steps": 1, "lr": ALL}, **decay), quiet=True)
    train(recipe(tmp_path / "without", {"steps": 1, "lr": ALL}), quiet=True)
    decayed, plain = weights(tmp_path / "with"), weights(tmp_path / "without")
    moved = {name for name in plain if not torch.equal(decayed[name], plain[name])}
    assert moved == {"0.weight", "4.weight"}


def test_clipping_bounds_the_step_and_reports_the_norm_before(tmp_path: Path) -> None:
    stage = {"steps": 2, "lr": ALL}
    train(recipe(tmp_path / "tight", stage, optimizer={"clip": 1e-12, "eps": 1e-3}), quiet=True)
    train(recipe(tmp_path / "none", stage, optimizer={"clip": None, "eps": 1e-3}), quiet=True)
    assert lines(tmp_path / "tight")[0]["grad_norm"] == lines(tmp_path / "none")[0]["grad_norm"] > 0.1
    tight, plain = weights(tmp_path / "tight"), weights(tmp_path / "none")
    start = ToyTask(recipe(tmp_path / "x", stage).model)
    torch.manual_seed(0)
    before = start.build().state_dict()
    assert all((tight[name] - before[name]).abs().max() < 1e-6 for name in before)
    assert (plain["0.weight"] - before["0.weight"]).abs().max() > 1e-3


def test_killed_and_started_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    def made(folder: Path) -> ToyRecipe:
        one = {"steps": 100, "micro_batch": 4, "lr": {"body": 1e-2, "head": 3e-3}, "schedule": "cosine"}
        two = {"steps": 100, "lr": {"head": 1e-3, "norm": 1e-3}, "warmup": 5}
        other = {"logging": {"every": 10, "tensorboard": False}, "checkpoint": {"every": 15, "keep": 2}}
        return recipe(folder, one, two, ema=0.95, model={"dropout": 0.2}, **other)

    train(made(tmp_path / "alone"), quiet=True)
    made(tmp_path / "killed")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "killed" / "recipe.yaml")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums come out in another order on others
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | threads, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "out" / "checkpoints"
    while process.poll() is None and not any(checkpoints.glob("step-*[4-9][0-9]")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
    (checkpoints / f".step-99999999.0{NEIGHBOUR}").mkdir()  # as a write cut off in the middle leaves it
    train(made(tmp_path / "killed"), quiet=True)
    assert not list(checkpoints.glob(".*"))

    assert_same(weights(tmp_path / "alone"), weights(tmp_path / "killed"))
    for part in ("model", "optimizer", "ema", "rng"):
        one, two = (last_checkpoint(tmp_path / name) / f"{part}.safetensors" for name in ("alone", "killed"))
        assert_same(load_file(one), load_file(two))
    steps = [line["step"] for line in lines(tmp_path / "killed")]
    assert steps == [line["step"] for line in lines(tmp_path / "alone")]


def test_sigterm_saves_and_exits_cleanly(tmp_path: Path) -> None:
    made = recipe(tmp_path, {"steps": 100_000, "lr": ALL})
    command = [sys.executable, "-c", PROGRAM, made.source]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the first step is done
    process.send_signal(signal.SIGTERM)
    output = process.stdout.read()
    assert process.wait() == 0
    step = int(last_checkpoint(tmp_path).name[5:])
    assert 0 < step < 100_000
    assert f"stopped at step {step}" in output
    assert lines(tmp_path)[-1]["step"] == step


def test_a_second_stage_starts_from_the_averaged_weights(tmp_path: Path) -> None:
    stages = [{"steps": 30, "lr": ALL}, {"steps": 1, "lr": {"head": 1e-30}}]  # too little to move a weight
    train(recipe(tmp_path / "two", *stages, ema=0.9), quiet=True)
    train(recipe(tmp_path / "one", stages[0], ema=0.9), quiet=True)
    assert_same(weights(tmp_path / "two"), weights(tmp_path / "one"))
    raw = load_file(last_checkpoint(tmp_path / "one") / "model.safetensors")
    assert not torch.equal(raw["0.weight"], weights(tmp_path / "one")["0.weight"])


def test_a_constant_last_stage_can_be_made_longer(tmp_path: Path) -> None:
    stage = {"steps": 10, "lr": ALL}
    train(recipe(tmp_path / "grown", stage), quiet=True)
    train(recipe(tmp_path / "grown", {**stage, "steps": 25, "micro_batch": 8}), quiet=True)
    train(recipe(tmp_path / "long", {**stage, "steps": 25}), quiet=True)
    assert_same(weights(tmp_path / "grown"), weights(tmp_path / "long"))


CHANGES = [
    ({"lr": {"body": 2e-2}}, {}, "stages[0].lr.body: the checkpoint was made with 0.01, now 0.02"),
    ({"batch": 16}, {}, "stages[0].batch: the checkpoint was made with 8, now 16"),
    ({"steps": 3}, {}, "stages[0].steps: the checkpoint was made with 5, now 3"),
    ({}, {"model": {"width": 32}}, "model.width: the checkpoint was made with 16, now 32"),
    ({}, {"seed": 1}, "seed: the checkpoint was made with 0, now 1"),
]


def test_a_changed_recipe_does_not_go_on(tmp_path: Path) -> None:
    stage = {"steps": 5, "lr": {"body": 1e-2}}
    train(recipe(tmp_path, stage), quiet=True)
    for change, other, expected in CHANGES:
        with pytest.raises(UserError) as caught:
            train(recipe(tmp_path, {**stage, **change}, **other), quiet=True)
        assert expected in str(caught.value)
    train(recipe(tmp_path, stage, logging={"every": 3}, checkpoint={"every": 7}), quiet=True)


def test_mistakes_found_at_the_start_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r'stages\[0\]\.lr\.haed: no such group of weights; did you mean "head"'
    ):
        train(recipe(tmp_path, {"lr": {"haed": 1e-2}}), quiet=True)
    with pytest.raises(UserError, match=r"deepspeed: zero_optimization: expected a stage of 0, 1, 2 or 3"):
        recipe(tmp_path, {"lr": ALL}, deepspeed={"zero_optimization": {"stage": 4}})
    with pytest.raises(UserError, match=r"deepspeed: bf16: weights stay float32"):
        recipe(tmp_path, {"lr": ALL}, deepspeed={"bf16": {"enabled": True}})


LATER = [  # mistakes of a second stage
    ({"lr": {"haed": 1e-2}}, r"stages\[1\]\.lr\.haed: no such group of weights"),
    ({"lr": {"none": 1e-2}}, r"stages\[1\]\.lr: these groups hold no weights, so nothing would train"),
    ({"lr": ALL, "pack": {"length": 8}}, r"stages\[1\]\.pack: the task toy cannot pack; remove it"),
]


@pytest.mark.parametrize(("stage", "expected"), LATER)
def test_a_mistake_in_a_later_stage_is_found_before_the_first(
    tmp_path: Path, stage: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        train(recipe(tmp_path, {"lr": ALL}, stage), quiet=True)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_batch_must_divide_by_micro_batch_and_processes(tmp_path: Path) -> None:
    made = recipe(tmp_path, {"lr": ALL, "batch": 6}, {"lr": ALL, "batch": 12, "micro_batch": 4})
    task = made.build_task()
    groups = task.groups(task.build())
    check_stages(made, task, groups, 1)
    with pytest.raises(
        UserError, match=r"stages\[0\]\.batch: 6 is not divisible by micro_batch 6 x 2 processes"
    ):
        check_stages(made, task, groups, 2)
    with pytest.raises(
        UserError, match=r"stages\[1\]\.batch: 12 is not divisible by micro_batch 4 x 2 processes"
    ):
        check_stages(made, task, groups, 2, first=1)  # the other stage is done


def test_a_loss_that_is_no_number_stops_before_it_is_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages\[0\]\.lr: (loss|grad_norm) is (nan|inf) at step"):
        made = recipe(
            tmp_path, {"steps": 50, "lr": {"head": 1e30}}, checkpoint={"every": 1}, optimizer={"clip": None}
        )
        train(made, quiet=True)
    model = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in model.values())


def test_a_file_where_the_output_should_go_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"output: \S+/out: a file is in the way; name another folder"):
        train(recipe(tmp_path, {"lr": ALL}), quiet=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    made = recipe(tmp_path, {"lr": ALL})
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing"):
            train(made, quiet=True)


BEST = {"checkpoint": {"every": 4, "keep": 1, "keep_best": 1, "metric": "squared"}}


def rising(folder: Path, steps: int) -> ToyRecipe:
    """A run that learns and is then spoilt by its own rate, so that an earlier checkpoint is the best."""
    stage = {"steps": steps, "lr": {"head": 0.3}, "warmup": 12}
    return recipe(folder, stage, ema=0.5, **BEST)


def scores(folder: Path) -> dict[int, float]:
    states = [json.loads(path.read_text()) for path in (folder / "out").glob("checkpoints/*/state.json")]
    return {state["step"]: state["score"] for state in states}


def test_the_best_checkpoint_stays_and_is_exported(tmp_path: Path) -> None:
    train(rising(tmp_path / "whole", 24), quiet=True)
    logged = [line["squared"] for line in lines(tmp_path / "whole")]
    means = {stop: sum(logged[stop - 4 : stop]) / 4 for stop in range(4, 25, 4)}
    best = min(means, key=lambda step: means[step])
    assert best < 24, "the last would have stayed in any case"
    assert scores(tmp_path / "whole") == {step: pytest.approx(means[step], rel=1e-5) for step in (best, 24)}
    kept = load_file(tmp_path / "whole" / "out" / "checkpoints" / f"step-{best:08d}" / "ema.safetensors")
    exported = load_file(tmp_path / "whole" / "out" / "best" / "w.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in kept.items()) and kept
    # the same run in two goes
    train(rising(tmp_path / "parts", 16), quiet=True)
    train(rising(tmp_path / "parts", 24), quiet=True)
    assert scores(tmp_path / "parts") == scores(tmp_path / "whole")
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    made = recipe(tmp_path, {"steps": 2, "lr": ALL}, checkpoint={"metric": "sqared"})
    with pytest.raises(
        UserError, match=r'checkpoint.metric: nothing named "sqared" .*did you mean "squared"'
    ):
        train(made, quiet=True)
