"""Task `grpo`: advantages and losses by hand, drawings of the policy's own, rewards that rise, exact resume."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import unimm
from tests.training.test_trainer import ROOT
from unimm.errors import UserError
from unimm.modeling import UniMMModel
from unimm.preferences.grpo.objective import advantages, most_varied, position_terms
from unimm.preferences.grpo.task import DrawingPolicy, GrpoTask
from unimm.sampling.choose import pick, probabilities, streams
from unimm.training.batches import read_step
from unimm.training.recipe import load_recipe
from unimm.training.task import Batch
from unimm.training.trainer import train

PROMPTS = ("a red apple", "blue", "what is this? an apple on a blue background", "on a")
SIZE = 16  # codes of a drawing


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    expected = torch.tensor([[-1 / 1.0001, 0, 1 / 1.0001], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(advantages(rewards), expected)
    torch.testing.assert_close(advantages(rewards, False), torch.tensor([[-1.0, 0, 1], [0, 0, 0]]).double())


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_what_is_learnt_from_varies_most(count: int) -> None:
    """No other choice of so many varies more, whether rewards are any numbers, few values or all the same."""
    generator = torch.Generator().manual_seed(count)
    rewards = torch.rand(9, 6, generator=generator, dtype=torch.float64)
    rewards = torch.cat([rewards, rewards.round(), torch.ones(1, 6).double()])
    taken = most_varied(rewards, count)
    assert (taken.diff(dim=1) > 0).all()
    choices = torch.tensor(list(itertools.combinations(range(6), count)))
    torch.testing.assert_close(rewards.gather(1, taken).var(1), rewards[:, choices].var(-1).amax(1))


# ratio, advantage -> loss and its slope in the log-probability, at epsilons 0.2 and 0.3
CLIPPED = [
    (1.0, 2.0, -2.0, -2.0),  # the policy's own drawing: the slope is minus the advantage
    (1.0, -2.0, 2.0, 2.0),
    (1.5, 2.0, -2.6, 0.0),  # good, and already much likelier: 1.3 is all that counts
    (1.5, -2.0, 3.0, 3.0),  # bad, and likelier: all of it counts
    (0.5, 2.0, -1.0, -1.0),
    (0.5, -2.0, 1.6, 0.0),  # bad, and already much less likely: 0.8 is all that counts
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), CLIPPED)
def test_the_clipped_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    log_prob = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0], dtype=torch.float64)
    terms = position_terms(log_prob, old, None, torch.tensor([advantage]).double(), (0.2, 0.3), 0.0)
    (found,) = torch.autograd.grad(terms.loss.sum(), log_prob)
    assert (terms.loss.item(), found.item()) == (pytest.approx(loss), pytest.approx(slope))
    assert terms.ratio.item() == pytest.approx(ratio)
    assert bool(terms.clipped) == (slope == 0)


def test_the_divergence_by_hand() -> None:
    log_prob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    reference, nothing = torch.tensor([-1.5], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    terms = position_terms(log_prob, log_prob.detach(), reference, nothing, (0.2, 0.2), 0.1)
    k3 = math.exp(-0.5) + 0.5 - 1
    assert terms.kl.item() == pytest.approx(k3)
    assert terms.loss.item() == pytest.approx(0.1 * k3)
    (slope,) = torch.autograd.grad(terms.loss.sum(), log_prob)
    assert slope.item() == pytest.approx(0.1 * (1 - math.exp(-0.5)))


def test_k3_is_the_mean_divergence() -> None:
    """Over all codes, weighted by the policy, the estimate is the divergence itself."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    nothing = torch.zeros_like(ours)
    kl = position_terms(ours, ours, theirs, nothing, (0.2, 0.2), 1.0).kl
    assert (kl >= 0).all()
    assert (ours.exp() * kl).sum().item() == pytest.approx((ours.exp() * (ours - theirs)).sum().item())


# --- on the tiny model --------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tiny: Path, tmp_path: Path) -> Path:
    """A recipe on the tiny model, four prompts in every step."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = {
        "task": "grpo",
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "model": str(tiny),
        "prompts": {"file": str(tmp_path / "prompts.txt")},
        "scorer": "tests.preferences.rewards.low",
        "sampling": {"group": 4},
        "stages": [
            {"name": "grpo", "steps": 4, "batch": 4, "lr": {"decoder": 1e-3, "code_head": 1e-2}},
        ],
        "checkpoint": {"every": 1, "keep": 9},
        "logging": {"every": 1, "tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest(folder: Path, step: int = 4) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def drawn(file: Path, *overrides: str) -> tuple[GrpoTask, DrawingPolicy, Batch, dict[str, float]]:
    """A task, its module, and the first step's drawings."""
    task = load_recipe(file, overrides).build_task()
    assert isinstance(task, GrpoTask)
    torch.manual_seed(0)
    module = task.build()
    assert isinstance(module, DrawingPolicy)
    for name, weight in module.named_parameters():
        if "lora_B" in name:  # they start at 0, where nothing could be told apart
            torch.nn.init.normal_(weight, std=0.3)
    stage = task.recipe.stages[0]
    step = read_step(task, task.dataset(stage, 0), stage, 0)
    task.before_step(module, 0)
    return task, module, task.draw(module, step.micro_batches, 0)[0], step.totals


def logits_by_hand(task: GrpoTask, model: UniMMModel, number: int, codes: Tensor) -> Tensor:
    """Logits [16, K] of one drawing [h, w], alone in its row."""
    prompt = task.rows[number]
    steps = task.layout.drawing_steps(*codes.shape)
    stream = model.embed(torch.tensor([prompt + steps]), None, codes[None])
    hidden = model.decode(stream).last_hidden_state[0, len(prompt) - 1 : -1]
    return model.code_logits(hidden)


CLOCK = re.compile("per_second|data_wait")  # what is another in every run
LORA = ("lora={r: 2, modules: [q_proj, v_proj, gate_proj, code_head.0]}", "stages[0].lr={lora: 0.01}")


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
def test_what_is_drawn_comes_from_the_distribution_that_learns(
    recipe_file: Path, lora: tuple[str, ...]
) -> None:
    task, module, batch, _ = drawn(recipe_file, "sampling.temperature=0.7", *lora)
    codes = batch["image_codes"].view(4, 4, 4, 4)
    for place, number in enumerate(batch["prompt"].tolist()):
        seed = batch["draw"][place].item()
        for k in range(4):
            with torch.no_grad():
                logits = logits_by_hand(task, module.policy, number, codes[place, k])
            uniform = streams([seed + k], 1, SIZE)[0]
            expected = pick(probabilities(logits, 0.7, None, None), uniform)
            assert torch.equal(codes[place, k].flatten(), expected)
    assert len({tuple(one.flatten().tolist()) for one in codes.flatten(0, 1)}) == 16


@pytest.mark.parametrize("packed", ["true", "false"])
def test_the_rest_of_a_group_is_compared_but_not_learnt_from(recipe_file: Path, packed: str) -> None:
    everything = drawn(recipe_file)[2]
    task, module, batch, totals = drawn(recipe_file, "sampling.learnt=2", f"packed={packed}")
    assert torch.equal(batch["rewards"], everything["rewards"])
    taken = most_varied(batch["rewards"], 2)
    assert not torch.equal(taken, torch.arange(2).expand(4, 2))
    codes = everything["image_codes"].view(4, 4, 4, 4)[torch.arange(4)[:, None], taken]
    assert torch.equal(batch["image_codes"], codes.flatten(0, 1))
    torch.testing.assert_close(batch["advantages"], advantages(batch["rewards"].gather(1, taken)))
    assert totals == {"prompts": 4, "code_tokens": 4 * 2 * SIZE}
    loss, metrics = task.loss(module, batch, 0, totals)
    assert loss.item() == pytest.approx(0, abs=1e-6) and metrics["ratio"] == 1
    assert metrics["reward"] == pytest.approx(everything["rewards"].mean().item())


@pytest.mark.parametrize("packed", ["true", "false"])
def test_loss_and_gradient_by_hand(recipe_file: Path, packed: str) -> None:
    overrides = ["objective.beta=0.5", "sampling.temperature=0.7", f"packed={packed}"]
    task, module, batch, totals = drawn(recipe_file, *overrides)
    assert totals == {"prompts": 4, "code_tokens": 4 * 4 * SIZE}
    with torch.no_grad():  # else the divergence and its gradient are 0
        module.policy.code_head[2].bias += torch.linspace(-1, 1, 32)
    codes = batch["image_codes"].view(4, 4, 4, 4)
    rewards = -codes.double().mean((2, 3))
    better = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    expected = torch.zeros((), dtype=torch.float64)
    for place, number in enumerate(batch["prompt"].tolist()):
        for k in range(4):
            pair = []
            for model in (module.policy, module.reference):
                logits = logits_by_hand(task, model, number, codes[place, k]) / 0.7
                pair.append(logits.log_softmax(-1)[torch.arange(SIZE), codes[place, k].flatten()].double())
            ours, theirs = pair[0], pair[1].detach()
            ratio = (ours - ours.detach()).exp()
            k3 = (theirs - ours).exp() - (theirs - ours) - 1
            expected = expected + (-ratio * better[place, k] + 0.5 * k3).sum() / totals["code_tokens"]
    loss, metrics = task.loss(module, batch, 0, totals)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["kl"] > 0.01 and metrics["ratio"] == 1 and metrics["clipped"] == 0
    weights = [weight for name, weight in module.policy.named_parameters() if "image_tokenizer" not in name]
    pairs = [torch.autograd.grad(one, weights, allow_unused=True) for one in (loss, expected)]
    reached = [(ours, theirs) for ours, theirs in zip(*pairs, strict=True) if theirs is not None]
    assert len(reached) > 20
    for ours, theirs in reached:
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("reference", ["copy", "adapter"])
def test_at_the_start_there_is_no_divergence_and_every_ratio_is_1(recipe_file: Path, reference: str) -> None:
    overrides = [f"reference.mode={reference}", *(LORA if reference == "adapter" else ())]
    folder = train(load_recipe(recipe_file, [*overrides, "stages[0].steps=2"]), quiet=True)
    first, second = lines(folder.parent)
    assert (first["kl"], first["ratio"], first["clipped"], first["no_spread"]) == (0, 1, 0, 0)
    assert first["loss"] == pytest.approx(0, abs=1e-6)  # advantages of a group add up to 0
    assert second["kl"] > 0
    assert first["reward_std"] > 0 and first["reward/plain"] == pytest.approx(first["reward"])
    assert 0 < first["entropy"] <= math.log(32)


def test_the_reward_rises(recipe_file: Path) -> None:
    overrides = ["scorer=tests.preferences.rewards.zeros", "sampling.group=8", "objective.beta=0.001",
                 "stages[0].steps=12", "stages[0].lr={code_head: 0.02}", "checkpoint.every=99",
                 "logging.samples_every=12"]  # fmt: skip
    folder = train(load_recipe(recipe_file, overrides), quiet=True)
    rewards = [line["reward"] for line in lines(folder.parent)]
    assert sum(rewards[:3]) / 3 < 0.1  # 1 of 32 codes
    assert sum(rewards[-3:]) / 3 > 0.8
    codes = unimm.load(folder).draw(list(PROMPTS), n=4, seed=5, guidance_scale=1, return_codes=True)[1]
    assert (codes == 0).double().mean() > 0.8
    assert (folder.parent / "samples" / "000012.png").exists()


def test_groups_without_spread_teach_nothing(recipe_file: Path, tiny: Path) -> None:
    overrides = ["scorer=tests.preferences.rewards.same", "objective.beta=0", "stages[0].steps=1"]
    folder = train(load_recipe(recipe_file, overrides), quiet=True)
    assert lines(folder.parent)[0]["no_spread"] == 1 and lines(folder.parent)[0]["grad_norm"] == 0
    assert_same(load_file(folder / "model.safetensors"), load_file(tiny / "model.safetensors"))


def test_several_updates_use_one_batch_of_drawings(recipe_file: Path) -> None:
    overrides = [
        "objective.updates=2",
        "stages[0].batch=2",
        "objective.epsilon_low=0.01",
        "objective.epsilon_high=0.01",
    ]
    folder = train(load_recipe(recipe_file, overrides), quiet=True)
    told = lines(folder.parent)
    for fresh, again in ((0, 1), (2, 3)):
        assert told[fresh]["reward"] == told[again]["reward"]
        assert told[fresh]["ratio"] == 1 and told[fresh]["clipped"] == 0
        assert told[again]["ratio"] != 1 and told[again]["clipped"] > 0
    assert told[1]["reward"] != told[2]["reward"]


@pytest.mark.parametrize("stopped", [2, 3])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("objective.updates=2",),
        ("objective.updates=2", "reference.mode=adapter", *LORA),
        ("reference.sync_every=1",),
    ],
    ids=["on-policy", "two-updates", "lora", "following"],
)
def test_a_run_that_was_killed_ends_with_the_same_bits(
    recipe_file: Path, tmp_path: Path, overrides: tuple[str, ...], stopped: int
) -> None:
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


def test_micro_batches_rows_shards_and_processes_change_nothing(recipe_file: Path, tmp_path: Path) -> None:
    common = ["stages[0].steps=2", "checkpoint.every=9", "objective.updates=2"]
    ways = {
        "whole": (), "micro": ("stages[0].micro_batch=1",), "rows": ("packed=false",),
        "zero-3": ("deepspeed.zero_optimization={stage: 3, stage3_param_persistence_threshold: 0}",),
    }  # fmt: skip
    for name, overrides in ways.items():
        train(load_recipe(recipe_file, [*common, *overrides, f"output={tmp_path}/{name}"]), quiet=True)
    files = []
    for zero in (0, 3):
        recipe = yaml.safe_load(recipe_file.read_text()) | {"output": f"{tmp_path}/two-{zero}"}
        recipe |= {"objective": {"updates": 2}, "checkpoint": {"every": 9}}
        recipe["deepspeed"] = {"zero_optimization": {"stage": zero}}
        recipe["stages"][0] |= {"steps": 2, "micro_batch": 1}
        files.append(tmp_path / f"two-{zero}.yaml")
        files[-1].write_text(yaml.safe_dump(recipe))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [*launcher, str(ROOT / "tests" / "training" / "run_recipes.py"), *map(str, files)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    for name in (*list(ways)[1:], "two-0", "two-3"):
        for mine, first in zip(lines(tmp_path / name), lines(tmp_path / "whole"), strict=True):
            for key in ("loss", "reward", "reward/plain", "kl", "ratio"):
                assert mine[key] == pytest.approx(first[key], abs=2e-6), (name, key)
            assert mine["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3), name


def test_in_16_bits_every_weight_is_reached(recipe_file: Path, tiny: Path) -> None:
    """Drawing casts the same weights as the loss, without a gradient; the loss must cast its own."""
    folder = train(load_recipe(recipe_file, ["dtype=bfloat16", "stages[0].steps=1"]), quiet=True)
    start, end = load_file(tiny / "model.safetensors"), load_file(folder / "model.safetensors")
    rest = [key for key in start if key.endswith("_proj.weight") and torch.equal(start[key], end[key])]
    assert rest == []


@pytest.mark.parametrize("scorer", ["rules", "self-vqa*artwork"])
@pytest.mark.parametrize("reference", ["copy", "none"])
def test_rewards_are_told_by_kind_of_scene(
    recipe_file: Path, scorer: str, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unimm.preferences.artwork.SCENES", 64)
    overrides = ["prompts={scenes: 16}", f"scorer={scorer}", "stages[0].steps=2", "stages[0].batch=2",
                 "stages[0].mixture={pair: 1, single: 1}", f"reference.mode={reference}",
                 "objective.beta=0"]  # fmt: skip
    folder = train(load_recipe(recipe_file, overrides), quiet=True)
    for line in lines(folder.parent):
        assert line["reward"] == pytest.approx((line["reward/pair"] + line["reward/single"]) / 2, abs=1e-6)
        assert "reward/count" not in line


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["scorer=rule"], "scorer: 'rule'; give a dotted path, or one of self-vqa, rules, artwork, probe; did"),
        (["scorer=tests.preferences.rewards.nothing"], "cannot be imported"),
        (["scorer=rules"], "names no scene of EmojiScenes"),
        (["scorer=tests.preferences.rewards.raises"], "raised RuntimeError: no idea"),
        (["scorer=tests.preferences.rewards.too_few"], "gave 1 scores for 4 candidates"),
        (["prompts={file: a, scenes: 3}"], "prompts: expected either file or scenes"),
        (["prompts.file=nowhere.txt"], "nowhere.txt: not readable as text"),
        (["sampling.group=1"], "sampling.group: expected at least 2, got 1"),
        (["sampling.learnt=5"], "sampling: learnt: expected at most group (4), got 5"),
        (["sampling.temperature=0.0"], "sampling.temperature: expected more than 0, got 0.0"),
        (["objective.updates=3"], "stages[0].steps: expected a multiple of objective.updates (3), got 4"),
        (["reference.mode=none"], "objective.beta: needs a reference; without one it is 0"),
        (["reference.mode=precomputed"], "reference.mode: drawings are new in every step"),
        (["reference.mode=adapter"], "reference.mode: adapter switches adapters off"),
        (["stages[0].mixture={pair: 1}"], "stages.grpo.mixture.pair: expected one of plain"),
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
