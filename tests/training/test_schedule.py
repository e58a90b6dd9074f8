"""Learning-rate schedules at their corners."""

from __future__ import annotations

import pytest

from unimm.training.recipe import Stage
from unimm.training.schedule import lr_factor


def stage(**other: object) -> Stage:
    return Stage.model_validate({"name": "s", "steps": 11, "batch": 1, "lr": {"a": 1.0}, **other})


def test_warmup_rises_to_one_and_constant_stays() -> None:
    assert [lr_factor(stage(warmup=4), step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_ends_at_the_floor_at_the_last_step(schedule: str) -> None:
    made = stage(schedule=schedule, min_lr_ratio=0.1)
    factors = [lr_factor(made, step) for step in range(11)]
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.55)
    assert factors[10] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
    assert lr_factor(made, 50) == pytest.approx(0.1)
    assert lr_factor(stage(schedule=schedule, warmup=11), 10) == 1.0
