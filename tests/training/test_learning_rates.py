"""Learning-rate schedules at their corners."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from unimm.errors import UserError
from unimm.sections import validate
from unimm.training.engine import lr_factors, shortened_warmups
from unimm.training.recipe import Stage

DECAYS = ("linear", "cosine")


def stage(**other: object) -> Stage:
    return Stage.model_validate({"name": "s", "steps": 11, "batch": 1, "lr": {"a": 1.0}, **other})


def lr_factor(made: Stage, step: int) -> float:
    return lr_factors(made, step)["a"]


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


def test_each_group_rises_over_steps_of_its_own() -> None:
    """As if it were alone; a group that is not named does not rise."""
    rates = {"a": 1.0, "b": 1.0, "c": 1.0}
    made = stage(steps=20, lr=rates, warmup={"a": 4, "b": 10}, schedule="cosine", min_lr_ratio=0.1)
    for step in range(20):
        factors = lr_factors(made, step)
        for group, warmup in (("a", 4), ("b", 10), ("c", 0)):
            alone = stage(steps=20, warmup=warmup, schedule="cosine", min_lr_ratio=0.1)
            assert factors[group] == lr_factor(alone, step)
    assert lr_factors(made, 1) == {"a": 0.5, "b": 0.2, "c": pytest.approx(0.99446, abs=1e-4)}
    assert shortened_warmups([stage(steps=4, lr=rates, warmup={"a": 4, "b": 10})]) == [
        "stages[0].warmup.b: 10 steps, the stage has 4; its rate rises over all of it"
    ]


@pytest.mark.parametrize(
    ("warmup", "line"),
    [
        ({"b": 4}, "b has no rate in lr, so none rises; expected of a"),
        ({"a": -1}, "warmup.a: expected at least 0, got -1"),
        ({"a": "x"}, "warmup.a: expected an integer"),
        ("long", 'warmup: expected an integer, got "long"$'),
    ],
)
def test_a_line_for_a_warmup_of_nothing(warmup: object, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        validate(
            Stage, {"name": "s", "steps": 4, "batch": 1, "lr": {"a": 1.0}, "warmup": warmup}, "recipe.yaml"
        )
    assert "\n" not in str(caught.value)
