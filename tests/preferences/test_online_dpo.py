"""Task `online_dpo`: which drawings make pairs, the loss by hand."""

from __future__ import annotations

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
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train


@pytest.fixture
def recipe_file(tiny: Path, tmp_path: Path) -> Path:
    return write_recipe("online_dpo", tiny, tmp_path)


def test_pairs_that_differ_too_little_do_not_count(recipe_file: Path) -> None:
    _, _, everything, totals = drawn(recipe_file, "pairs.each=2")
    ranked = everything["rewards"].sort(1, descending=True).values
    margins = ranked[:, :2] - ranked[:, 2:].flip(1)
    middle = float(margins.median())
    assert totals["pairs"] == 8 and (everything["weights"] == 1).all()
    task, module, batch, totals = drawn(recipe_file, "pairs.each=2", f"pairs.margin={middle}")
    assert batch["weights"].tolist() == [1] * 5  # the others are not even computed
    assert torch.equal(batch["owners"], (margins >= middle).nonzero()[:, 0])
    assert len(batch["images"].codes) == 10
    loss, metrics = task.loss(module, batch, 0, totals)
    assert loss.item() == pytest.approx(5 / 8 * math.log(2), abs=1e-6)
    assert metrics["counted"] == pytest.approx(5 / 8)
    assert metrics["pairs/margin"].tolist() == [0, 5]
    assert metrics["entropy"][1] == metrics["kl"][1] == 10 * SIZE
    # One pair is kept, and counted nowhere.
    task, module, batch, totals = drawn(recipe_file, "pairs.margin=1000")
    loss, metrics = task.loss(module, batch, 0, totals)
    assert len(batch["images"].codes) == 2 and loss == 0
    assert all(metrics[name].tolist() == [0, 0] for name in ("entropy", "kl", "pairs/margin"))


def test_pairs_may_count_as_much_as_their_scores_differ(recipe_file: Path) -> None:
    task, module, batch, totals = drawn(recipe_file, "pairs={each: 2, weighted: true}")
    ranked = batch["rewards"].sort(1, descending=True).values
    margins = ranked[:, :2] - ranked[:, 2:].flip(1)
    torch.testing.assert_close(batch["weights"], margins.flatten())
    loss, metrics = task.loss(module, batch, 0, totals)
    assert loss.item() == pytest.approx(math.log(2) * margins.mean().item(), abs=1e-6)
    assert metrics["counted"] == 1 and metrics["pairs/accuracy"].tolist() == [0, 8]


@pytest.mark.parametrize("weighted", ["false", "true"])
def test_ties_do_not_count(recipe_file: Path, tiny: Path, weighted: str) -> None:
    overrides = ["scorer=tests.preferences.rewards.same", f"pairs.weighted={weighted}", "stages[0].steps=1"]
    folder = train(load_recipe(recipe_file, overrides), quiet=True)
    (logged,) = lines(folder.parent)
    assert (logged["counted"], logged["loss"], logged["grad_norm"]) == (0, 0, 0)
    assert "pairs/margin" not in logged
    assert_same(load_file(folder / "model.safetensors"), load_file(tiny / "model.safetensors"))


@pytest.mark.parametrize("packed", ["true", "false"])
@pytest.mark.parametrize("per_position", [False, True])
def test_loss_and_gradient_by_hand(recipe_file: Path, packed: str, per_position: bool) -> None:
    beta = 3.0 if per_position else 0.2
    overrides = [f"objective.beta={beta}", "objective.losses={sigmoid: 1, cross_entropy: 0.5}",
                 f"objective.per_position={str(per_position).lower()}",
                 "pairs={each: 2, weighted: true}", "sampling={group: 5, temperature: 0.7}",
                 f"packed={packed}"]  # fmt: skip
    task, module, batch, totals = drawn(recipe_file, *overrides)
    assert totals == {"prompts": 4, "pairs": 8}
    with torch.no_grad():  # else every reward is 0
        module.policy.code_head[2].bias += torch.linspace(-1, 1, 32)
    codes = batch["images"].codes.view(4, 4, 4, 4)
    means = -codes.double().mean((2, 3))  # the scorer's: best, worst, second best, second worst
    assert (means[:, 0] >= means[:, 2]).all() and (means[:, 2] >= means[:, 3]).all()
    assert (means[:, 3] >= means[:, 1]).all()
    assert module.reference is not None
    expected, margins, kl = torch.zeros((), dtype=torch.float64), [], 0.0
    for place, number in enumerate(batch["prompt"].tolist()):
        ratios, sums = [], []
        for k in range(4):
            ours, theirs = (
                log_probs_by_hand(task, model, number, codes[place, k], 0.7)
                for model in (module.policy, module.reference)
            )
            theirs = theirs.detach()
            kl += ((theirs - ours).exp() - (theirs - ours) - 1).sum().item()
            ratios.append((ours - theirs).sum() / (SIZE if per_position else 1))
            sums.append(ours.sum())
        for k in range(2):
            margins.append(beta * (ratios[2 * k] - ratios[2 * k + 1]))
            losses = (1 + (-margins[-1]).exp()).log() - 0.5 * sums[2 * k] / SIZE
            expected = expected + losses * (means[place, 2 * k] - means[place, 2 * k + 1]) / 8
    loss, metrics = task.loss(module, batch, 0, totals)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["kl"].tolist() == pytest.approx([kl, 4 * 4 * SIZE], rel=1e-4)
    assert metrics["pairs/margin"].tolist() == pytest.approx(
        [sum(margin.item() for margin in margins), 8], rel=1e-4
    )
    assert_same_gradient(module, loss, expected)


@pytest.mark.parametrize("reference", ["copy", "adapter", "none"])
def test_at_the_start_the_loss_is_ln_2(recipe_file: Path, reference: str) -> None:
    overrides = [f"reference.mode={reference}", *(LORA if reference == "adapter" else ())]
    folder = train(load_recipe(recipe_file, [*overrides, "stages[0].steps=2"]), quiet=True)
    first, second = lines(folder.parent)
    assert first["counted"] == 1
    if reference == "none":  # then the pairs' own likelihoods are compared
        assert first["loss"] != pytest.approx(math.log(2), abs=1e-3) and "kl" not in first
        return
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["kl"], first["pairs/reward_chosen"], first["pairs/reward_rejected"]) == (0, 0, 0)
    assert second["kl"] > 0 and second["pairs/margin"] != 0
    assert 0 < first["entropy"] <= math.log(32)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["pairs.each=3"], "pairs.each: expected at most 2 of 4 drawings (sampling.group), got 3"),
        (["pairs.margin=-1"], "pairs.margin: expected at least 0"),
        (["objective.beta=0"], "objective.beta: expected more than 0"),
        (["objective.losses={sigmoids: 1}"], 'objective.losses: unknown loss "sigmoids"'),
        (["objective.weight=2"], "objective.weight: unknown key"),
        (["sampling.learnt=2"], "sampling.learnt: unknown key"),
        (
            ["reference.mode=none", "objective.losses={ipo: 1}"],
            "objective.losses.ipo: needs a reference; without",
        ),
        (["reference.mode=precomputed"], "reference.mode: drawings are new in every step"),
    ],
)
def test_mistakes_are_named(recipe_file: Path, overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        train(load_recipe(recipe_file, overrides), quiet=True)
    assert line in str(error.value) and "\n" not in str(error.value)
