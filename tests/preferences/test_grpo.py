"""Task `grpo`: advantages and losses by hand, several updates on one batch of drawings."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.preferences.online import (
    LORA,
    SIZE,
    assert_same,
    assert_same_gradient,
    drawn,
    lines,
    log_probs_by_hand,
    write_recipe,
)
from unimm.errors import UserError
from unimm.preferences.losses import advantages, most_varied, position_terms
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train


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
    return write_recipe("grpo", tiny, tmp_path)


@pytest.mark.parametrize("packed", ["true", "false"])
def test_the_rest_of_a_group_is_compared_but_not_learnt_from(recipe_file: Path, packed: str) -> None:
    everything = drawn(recipe_file)[2]
    task, module, batch, totals = drawn(recipe_file, "sampling.learnt=2", f"packed={packed}")
    assert torch.equal(batch["rewards"], everything["rewards"])
    taken = most_varied(batch["rewards"], 2)
    assert not torch.equal(taken, torch.arange(2).expand(4, 2))
    codes = everything["images"].codes.view(4, 4, 4, 4)[torch.arange(4)[:, None], taken]
    assert torch.equal(batch["images"].codes, codes.flatten(0, 1))
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
    codes = batch["images"].codes.view(4, 4, 4, 4)
    rewards = -codes.double().mean((2, 3))
    better = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    expected = torch.zeros((), dtype=torch.float64)
    for place, number in enumerate(batch["prompt"].tolist()):
        for k in range(4):
            ours, theirs = (
                log_probs_by_hand(task, model, number, codes[place, k], 0.7)
                for model in (module.policy, module.reference)
            )
            theirs = theirs.detach()
            ratio = (ours - ours.detach()).exp()
            k3 = (theirs - ours).exp() - (theirs - ours) - 1
            expected = expected + (-ratio * better[place, k] + 0.5 * k3).sum() / totals["code_tokens"]
    loss, metrics = task.loss(module, batch, 0, totals)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["kl"] > 0.01 and metrics["ratio"] == 1 and metrics["clipped"] == 0
    assert_same_gradient(module, loss, expected)


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
    logged = lines(folder.parent)
    for fresh, again in ((0, 1), (2, 3)):
        assert logged[fresh]["reward"] == logged[again]["reward"]
        assert logged[fresh]["ratio"] == 1 and logged[fresh]["clipped"] == 0
        assert logged[again]["ratio"] != 1 and logged[again]["clipped"] > 0
    assert logged[1]["reward"] != logged[2]["reward"]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sampling.learnt=5", "sampling: learnt: expected at most group (4), got 5"),
        ("objective.updates=3", "stages[0].steps: expected a multiple of objective.updates (3), got 4"),
        ("reference.mode=none", "objective.beta: needs a reference; without one it is 0"),
    ],
)
def test_mistakes_are_named(recipe_file: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as error:
        train(load_recipe(recipe_file, [override]), quiet=True)
    assert line in str(error.value) and "\n" not in str(error.value)
