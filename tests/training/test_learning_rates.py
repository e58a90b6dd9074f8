"""Learning-rate schedules at their corners."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from unimm.training.engine import lr_factor, shortened_warmups
from unimm.training.recipe import Stage

DECAYS = ("linear", "cosine")


def stage(**other: object) -> Stage:
    return Stage.model_validate({"name": "s", "steps": 11, "batch": 1, "lr": {"a": 1.0}, **other})


def test_warmup_rises_to_one_and_constant_stays() -> None:
    assert [lr_factor(stage(warmup=4), step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", DECAYS)
def test_decay_falls_to_the_floor_behind_the_last_step(schedule: str) -> None:
    made = stage(schedule=schedule, min_lr_ratio=0.1, steps=10)
    factors = [lr_factor(made, step) for step in range(11)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.55)
    assert factors[10] == pytest.approx(0.1) and factors[9] > 0.11
    assert factors == sorted(factors, reverse=True)
    assert lr_factor(made, 50) == pytest.approx(0.1)
    assert lr_factor(stage(schedule=schedule, warmup=11), 10) == 1.0


@pytest.mark.parametrize("schedule", DECAYS)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 0), (2, 1), (11, 10), (1000, 20)])
def test_every_step_trains(schedule: str, steps: int, warmup: int) -> None:
    made = stage(schedule=schedule, steps=steps, warmup=warmup)
    assert min(lr_factor(made, step) for step in range(steps)) > 0


@pytest.mark.parametrize("schedule", DECAYS)
def test_decay_is_that_of_transformers(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}[schedule]
    theirs = make(optimizer, num_warmup_steps=3, num_training_steps=20).lr_lambdas[0]
    made = stage(schedule=schedule, steps=20, warmup=3)
    assert [lr_factor(made, step) for step in range(3, 20)] == pytest.approx(
        [theirs(n) for n in range(3, 20)]
    )


def test_a_warmup_longer_than_its_stage_rises_over_all_of_it() -> None:
    short = [stage(steps=4, warmup=4), stage(steps=4, warmup=40)]
    assert [lr_factor(short[1], step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert shortened_warmups(short) == [
        "stages[1].warmup: 40 steps, the stage has 4; the rates rise over all of it"
    ]
