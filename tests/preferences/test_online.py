"""What the tasks `grpo` and `online_dpo` share: drawings of their own, rewards that rise, exact resume, bad input."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import unimm
from tests.preferences.online import (
    LORA,
    PROMPTS,
    SIZE,
    assert_same,
    drawn,
    lines,
    logits_by_hand,
    newest,
    write_recipe,
)
from tests.training.test_trainer import ROOT
from tests.two_processes import on_two_processes
from unimm.errors import UserError
from unimm.sampling.sampler import Filters, NoiseKey, gumbel, sample
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

TASKS = ("grpo", "online_dpo")


@pytest.fixture(params=TASKS)
def recipe_file(request: pytest.FixtureRequest, tiny: Path, tmp_path: Path) -> Path:
    return write_recipe(request.param, tiny, tmp_path)


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_what_is_drawn_comes_from_the_distribution_that_learns(
    tiny: Path, tmp_path: Path, lora: tuple[str, ...]
) -> None:
    task, module, batch, _ = drawn(write_recipe("grpo", tiny, tmp_path), "sampling.temperature=0.7", *lora)
    codes = batch["images"].codes.view(4, 4, 4, 4)
    for place, number in enumerate(batch["prompt"].tolist()):
        seed = batch["draw"][place].item()
        for k in range(4):
            with torch.no_grad():
                logits = logits_by_hand(task, module.policy, number, codes[place, k])
            noise = np.stack([gumbel(NoiseKey(seed + k), code, logits.shape[-1]) for code in range(SIZE)])
            expected = sample(logits, torch.from_numpy(noise), Filters(0.7)).chosen
            assert torch.equal(codes[place, k].flatten(), expected)
    assert len({tuple(one.flatten().tolist()) for one in codes.flatten(0, 1)}) == 16


@pytest.mark.parametrize(
    ("task", "overrides"), [("grpo", ["objective.beta=0.001"]), ("online_dpo", ["pairs.each=4"])]
)
def test_the_reward_rises(tiny: Path, tmp_path: Path, task: str, overrides: list[str]) -> None:
    overrides = ["scorer=tests.preferences.rewards.zeros", "sampling.group=8", "stages[0].steps=12",
            "stages[0].lr={code_head: 0.02}", "checkpoint.every=99", "logging.samples_every=12",
            *overrides]  # fmt: skip
    folder = train(load_recipe(write_recipe(task, tiny, tmp_path), overrides), quiet=True)
    rewards = [line["reward"] for line in lines(folder.parent)]
    assert sum(rewards[:3]) / 3 < 0.1  # 1 of 32 codes
    assert sum(rewards[-3:]) / 3 > 0.8
    codes = unimm.load(folder).draw(list(PROMPTS), n=4, seed=5, guidance_scale=1, return_codes=True)[1]
    assert (codes == 0).double().mean() > 0.8
    assert (folder.parent / "samples" / "000012.png").exists()


@pytest.mark.parametrize("stopped", [2, 3])
@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("grpo", ()),
        ("grpo", ("objective.updates=2",)),
        ("grpo", ("objective.updates=2", "reference.mode=adapter", *LORA)),
        ("grpo", ("reference.sync_every=1",)),
        ("online_dpo", ()),
        ("online_dpo", ("reference.mode=adapter", *LORA)),
    ],
    ids=["grpo", "two-updates", "two-updates-lora", "following", "online_dpo", "online_dpo-lora"],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    tiny: Path, tmp_path: Path, task: str, overrides: tuple[str, ...], stopped: int
) -> None:
    recipe_file = write_recipe(task, tiny, tmp_path)
    common = [*overrides, "stages[0].batch=2", "stages[0].micro_batch=1"]
    train(load_recipe(recipe_file, [*common, f"output={tmp_path}/whole"]), quiet=True)
    for step in range(1, stopped + 1):  # what a run that died after this step had left
        name = f"checkpoints/step-{step:08d}"
        shutil.copytree(tmp_path / "whole" / name, tmp_path / "cut" / name)
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut")
    train(load_recipe(recipe_file, [*common, f"output={tmp_path}/cut"]), quiet=True)
    assert_same(newest(tmp_path / "whole"), newest(tmp_path / "cut"))
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        timeless = [
            {k: v for k, v in line.items() if "per_second" not in k and k != "data_wait"}
            for line in (one, other)
        ]
        assert timeless[0] == timeless[1]


TOLD = {
    "grpo": ("loss", "reward", "reward/plain", "kl", "ratio"),
    "online_dpo": ("loss", "reward", "reward/plain", "kl", "counted", "pairs/margin"),
}
OWN = {"grpo": {"objective": {"updates": 2}}, "online_dpo": {"pairs": {"each": 2, "margin": 0.5}}}
WAYS = {
    "micro": {"micro_batch": 1}, "rows": {"packed": False},
    "zero-3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
}  # fmt: skip


def test_micro_batches_rows_shards_and_processes_change_nothing(tiny: Path, tmp_path: Path) -> None:
    two = []
    for task in TASKS:
        first = yaml.safe_load(write_recipe(task, tiny, tmp_path).read_text())
        first |= {"checkpoint": {"every": 9}, **OWN[task]}
        first["stages"][0]["steps"] = 2

        def write(name: str, changes: dict[str, Any], task: str = task, first: Any = first) -> Path:
            stage = first["stages"][0] | {k: v for k, v in changes.items() if k == "micro_batch"}
            rest = {k: v for k, v in changes.items() if k != "micro_batch"}
            recipe = {**first, **rest, "stages": [stage], "output": f"{tmp_path}/{task}/{name}"}
            path = tmp_path / f"{task}-{name}.yaml"
            path.write_text(yaml.safe_dump(recipe))
            return path

        for name, changes in {"whole": {}, **WAYS}.items():
            train(load_recipe(write(name, changes)), quiet=True)
        for zero in (0, 3):
            changes = {"micro_batch": 1, "deepspeed": {"zero_optimization": {"stage": zero}}}
            two.append(write(f"two-{zero}", changes))
    status, said = on_two_processes(ROOT / "tests" / "training" / "run_recipes.py", *two)
    assert status == 0, said[-3000:]
    for task in TASKS:
        whole = lines(tmp_path / task / "whole")
        for name in (*WAYS, "two-0", "two-3"):
            for mine, expected in zip(lines(tmp_path / task / name), whole, strict=True):
                for key in TOLD[task]:
                    assert mine[key] == pytest.approx(expected[key], abs=2e-6), (task, name, key)
                assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), (task, name)


def test_in_16_bits_every_weight_is_reached(recipe_file: Path, tiny: Path) -> None:
    """Drawing casts the same weights as the loss, without a gradient; the loss must cast its own."""
    folder = train(load_recipe(recipe_file, ["dtype=bfloat16", "stages[0].steps=1"]), quiet=True)
    start, end = load_file(tiny / "model.safetensors"), load_file(folder / "model.safetensors")
    rest = [key for key in start if key.endswith("_proj.weight") and torch.equal(start[key], end[key])]
    assert rest == []


@pytest.mark.parametrize(
    ("task", "scorer", "overrides"),
    [
        ("grpo", "rules", ()),
        ("grpo", "self-vqa*artwork", ()),
        ("grpo", "rules", ("reference.mode=none", "objective.beta=0")),
        ("grpo", "self-vqa*artwork", ("reference.mode=none", "objective.beta=0")),
        ("online_dpo", "rules", ("reference.mode=none",)),
    ],
)
def test_rewards_are_logged_by_kind_of_scene(
    tiny: Path, tmp_path: Path, task: str, scorer: str, overrides: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("unimm.preferences.artwork.SCENES", 64)
    recipe_file = write_recipe(task, tiny, tmp_path)
    overrides = ["prompts={scenes: 16}", f"scorer={scorer}", "stages[0].steps=2", "stages[0].batch=2",
            "stages[0].mixture={pair: 1, single: 1}", *overrides]  # fmt: skip
    folder = train(load_recipe(recipe_file, overrides), quiet=True)
    for line in lines(folder.parent):
        assert line["reward"] == pytest.approx((line["reward/pair"] + line["reward/single"]) / 2, abs=1e-6)
        assert "reward/count" not in line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["scorer=rule"], "scorer: 'rule'; give a dotted path, or one of self-vqa, rules, artwork, variety, probe"),
        (["scorer=tests.preferences.rewards.nothing"], "cannot be imported"),
        (["scorer=rules"], "names no scene of EmojiScenes"),
        (["scorer=tests.preferences.rewards.raises"], "raised RuntimeError: no idea"),
        (["scorer=tests.preferences.rewards.too_few"], "gave 1 scores for 4 candidates"),
        (["prompts={file: a, scenes: 3}"], "prompts: expected either file or scenes"),
        (["prompts.file=nowhere.txt"], "nowhere.txt: not readable as text"),
        (["sampling.group=1"], "sampling.group: expected at least 2, got 1"),
        (["sampling.temperature=0.0"], "sampling.temperature: expected more than 0, got 0.0"),
        (["reference.mode=precomputed"], "reference.mode: drawings are new in every step"),
        (["reference.mode=adapter"], "reference.mode: adapter switches adapters off"),
        (["stages[0].mixture={pair: 1}"], "stages.online.mixture.pair: expected one of plain"),
        (["stages[0].options={a: 1}"], "stages[0].options: this task has none"),
    ],
)  # fmt: skip
def test_mistakes_are_named(recipe_file: Path, overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        train(load_recipe(recipe_file, overrides), quiet=True)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_prompts_that_are_too_long_are_named(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\n" + "apple " * 200)
    with pytest.raises(UserError, match=r"prompts: 'apple apple .*tokens, a drawing leaves room for"):
        train(load_recipe(recipe_file), quiet=True)
