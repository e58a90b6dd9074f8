"""The order of the data: a function of the step alone, shared out over ranks, mixed by exact shares."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import pytest
import torch

from tests.training.toy import ToyModel, ToyTask
from unimm.errors import UserError
from unimm.training.batches import derive_seed, mix, read_ahead, read_step
from unimm.training.recipe import Stage

STAGE = Stage(name="s", steps=6, batch=12, micro_batch=3, lr={"body": 1.0})


class Numbers:
    """Sample i is `{"x": i}`."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": index, "items": 1}


class NumbersTask(ToyTask):
    def collate(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([sample[key] for sample in samples]) for key in samples[0]}


TASK = NumbersTask(ToyModel())


def test_steps_follow_one_another_and_ranks_share_them() -> None:
    alone = read_step(TASK, Numbers(), STAGE, 2)
    assert torch.cat([batch["x"] for batch in alone.micro_batches]).tolist() == [*range(24, 36)]
    assert alone.totals == {"tokens": 12.0}
    shares = [read_step(TASK, Numbers(), STAGE, 2, rank, 2) for rank in (0, 1)]
    assert [batch["x"].tolist() for batch in shares[0].micro_batches] == [[24, 25, 26], [30, 31, 32]]
    assert [batch["x"].tolist() for batch in shares[1].micro_batches] == [[27, 28, 29], [33, 34, 35]]


def test_samples_of_like_length_share_a_micro_batch() -> None:
    class Lengths(NumbersTask):
        def length(self, sample: dict[str, Any]) -> int:
            return -sample["x"] % 5

    step = read_step(Lengths(ToyModel()), Numbers(), STAGE, 0)
    assert [batch["x"].tolist() for batch in step.micro_batches] == [
        [0, 5, 10],
        [4, 9, 3],
        [8, 2, 7],
        [1, 6, 11],
    ]
    assert step.totals == read_step(TASK, Numbers(), STAGE, 0).totals


def test_reading_ahead_changes_nothing_and_passes_errors_on() -> None:
    with read_ahead(TASK, Numbers(), STAGE, 3) as steps:
        ahead = [step.micro_batches[0]["x"][0].item() for step in steps]
    assert ahead == [36, 48, 60]

    class Broken(Numbers):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index >= 12:
                raise UserError("sample 12 is broken")
            return super().__getitem__(index)

    with read_ahead(TASK, Broken(), STAGE, 0) as steps:
        next(steps)
        with pytest.raises(UserError, match="sample 12 is broken"):
            next(steps)


def test_a_mixture_holds_its_shares_in_every_step_and_repeats_itself() -> None:
    sources = {"a": [("a", i) for i in range(7)], "b": [("b", i) for i in range(50)], "c": [("c", 0)]}
    mixed = mix(sources, {"a": 1, "b": 3, "c": 0}, seed=4)
    drawn = [mixed[index] for index in range(400)]
    for start in range(0, 400, 8):
        assert Counter(kind for kind, _ in drawn[start : start + 8]) == {"a": 2, "b": 6}
    assert {i for kind, i in drawn if kind == "a"} == set(range(7))
    assert drawn == [mix(sources, {"a": 1, "b": 3}, seed=4)[index] for index in range(400)]
    assert drawn != [mix(sources, {"a": 1, "b": 3}, seed=5)[index] for index in range(400)]


def test_a_mixture_of_unequal_sources_keeps_its_shares_in_every_window() -> None:
    sources = {"a": ["a"] * 17, "b": ["b"] * 5000, "c": ["c"] * 333}
    mixed = mix(sources, {"a": 5, "b": 1, "c": 4}, seed=1)
    drawn = [mixed[index] for index in range(10_000)]
    for name, share in {"a": 0.5, "b": 0.1, "c": 0.4}.items():
        before = [0, *accumulate(drawn_name == name for drawn_name in drawn)]
        windows = [before[start + 1000] - before[start] for start in range(9001)]
        assert min(windows) >= 1000 * (share - 0.01) and max(windows) <= 1000 * (share + 0.01)


def test_mixture_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"mixture\.z: no such kind of data; known: a"):
        mix({"a": [1]}, {"z": 1}, seed=0)
    with pytest.raises(UserError, match="above 0"):
        mix({"a": [1]}, {"a": 0}, seed=0)
    with pytest.raises(UserError, match=r"mixture\.a: has no samples"):
        mix({"a": []}, {"a": 1}, seed=0)


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)}
    assert len(seeds) == 900
