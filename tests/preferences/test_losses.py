"""Preference losses: values worked out by hand, equality with trl, gradients by finite differences."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from unimm.preferences.losses import LOSSES, LossOptions, Pairs, objective

# trl's names for the same losses.
TRL = {name: name for name in LOSSES} | {
    "sppo": "sppo_hard",
    "nca": "nca_pair",
    "exo": "exo_pair",
    "cross_entropy": "sft",
}

# log-ratios +2 and -2, so rewards +1 and -1 at beta 0.5; lengths 4 and 2, so mean log-ratios +0.5 and -1.
BY_HAND = Pairs(*(torch.tensor([value], dtype=torch.float64) for value in (-4.0, -5.0, -6.0, -3.0, 4.0, 2.0)))
OPTIONS = LossOptions(beta=0.5, label_smoothing=0.1)
VALUES = {
    "sigmoid": 0.126928011,  # ln(1 + e^-2)
    "hinge": 0.0,  # 1 - 2 is below 0
    "ipo": 0.25,  # (1.5 - 1)^2
    "robust": -0.123071989,  # (0.9 * 0.126928011 - 0.1 * 2.126928011) / 0.8
    "apo_zero": 0.537882843,  # 2 / (1 + e)
    "apo_down": 0.850261501,  # 1 / (1 + e^-1) + 1 / (1 + e^2)
    "sppo": 2.0,  # (2 - 1)^2 + (-2 + 1)^2
    "nca": 1.126523375,  # 1.5 ln(1 + e^-1) + 0.5 ln(1 + e)
    "exo": 0.001942262,  # 0.880797078 (ln 0.880797078 - ln 0.9) + 0.119202922 (ln 0.119202922 - ln 0.1)
    "bco_pair": 0.626523375,  # 2 ln(1 + e^-1)
    "sigmoid_norm": 0.386871,  # ln(1 + e^-0.75)
    "cross_entropy": 1.0,  # 4 / 4
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_by_hand(name: str) -> None:
    assert LOSSES[name](BY_HAND, OPTIONS).item() == pytest.approx(VALUES[name], abs=1e-6)


def test_hinge_of_a_pair_the_wrong_way_round() -> None:
    chosen, rejected, *rest = BY_HAND
    turned = Pairs(rejected - 3, chosen + 3, *rest)  # log-ratios -2 and +2
    assert LOSSES["hinge"](turned, OPTIONS).item() == pytest.approx(3.0)


def test_objective_is_the_weighted_sum() -> None:
    mpo = objective(BY_HAND, {"sigmoid": 0.8, "bco_pair": 0.2, "cross_entropy": 1.0}, OPTIONS)
    assert mpo.item() == pytest.approx(0.8 * 0.126928011 + 0.2 * 0.626523375 + 1.0, abs=1e-6)


def test_per_position_turns_sigmoid_into_its_normalised_form() -> None:
    expected = LOSSES["sigmoid_norm"](BY_HAND, OPTIONS)
    means = BY_HAND.per_position()
    for name in ("sigmoid", "sigmoid_norm"):  # which is not normalised twice
        assert LOSSES[name](means, OPTIONS).item() == pytest.approx(expected.item(), abs=1e-12)
    assert LOSSES["cross_entropy"](means, OPTIONS).item() == pytest.approx(1.0)


def random_pairs(count: int = 5, same_length: bool = False) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    sums = -10 * torch.rand(4, count, generator=generator, dtype=torch.float64) - 1
    lengths = torch.randint(1, 9, (2, count), generator=generator).double()
    if same_length:
        lengths[:] = 6
    return Pairs(*sums, *lengths)


def trl_loss(pairs: Pairs, name: str) -> Tensor:
    """The batch loss that trl's own code makes of these log-probabilities and lengths."""
    from trl import DPOTrainer

    lengths = torch.cat([pairs.chosen_length, pairs.rejected_length]).long()
    mask = (torch.arange(1 + int(lengths.max()))[None] <= lengths[:, None]).long()
    mask[:, 0] = 0  # a prompt of one token, then the answer
    sums = torch.cat([pairs.chosen, pairs.rejected])
    scored = mask[:, 1:] * (sums / lengths)[:, None]  # spread evenly over the answer
    zeros = torch.zeros_like(scored)
    outputs = SimpleNamespace(log_probs=scored, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    whole = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=whole, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[TRL[name]], loss_weights=[1.0],
        beta=OPTIONS.beta, label_smoothing=OPTIONS.label_smoothing, use_weighting=False,
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
        "ref_chosen_logps": pairs.reference_chosen, "ref_rejected_logps": pairs.reference_rejected,
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_trl(name: str) -> None:
    pairs = random_pairs(same_length=name == "cross_entropy")  # trl means over all tokens, ours over pairs
    ours = LOSSES[name](pairs, OPTIONS).mean()
    torch.testing.assert_close(ours, trl_loss(pairs, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name: str) -> None:
    pairs = random_pairs()
    lengths = pairs[2:]

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return LOSSES[name](Pairs(chosen, rejected, *lengths), OPTIONS)

    inputs = tuple(tensor.clone().requires_grad_() for tensor in pairs[:2])
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_down_the_gradient_prefers_the_chosen(name: str) -> None:
    start = torch.tensor([-5.0], dtype=torch.float64)
    length = torch.tensor([4.0], dtype=torch.float64)
    sums = [start.clone().requires_grad_() for _ in range(2)]
    LOSSES[name](Pairs(*sums, start, start, length, length), OPTIONS).backward()
    chosen, rejected = (0.0 if one.grad is None else one.grad.item() for one in sums)
    assert chosen < rejected


def test_far_values_stay_finite() -> None:
    far = torch.tensor([1e4, -1e4], dtype=torch.float64)
    zero, one = torch.zeros_like(far), torch.ones_like(far)
    for name, loss in LOSSES.items():
        assert loss(Pairs(far, -far, zero, zero, one, one), OPTIONS).isfinite().all(), name
