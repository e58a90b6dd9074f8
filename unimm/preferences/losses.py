"""Losses of pairs of answers and of groups of drawings (GRPO), as pure functions of log-probabilities.

Every loss of pairs maps `Pairs` of N answers to N values; what is logged as a reward is
`beta * log(policy / reference)`. An objective is a weighted sum of losses by name, so that RPO (sigmoid and
cross-entropy), MPO (sigmoid, BCO and cross-entropy) and Emu3's DPO with cross-entropy are settings of `objective`.

GRPO: Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4.1; the clip is PPO's (Schulman et al. 2017,
arXiv 1707.06347).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from unimm.sections import Rate, Section, near

STD_EPSILON = 1e-4  # added to a deviation, so that a group of near equals is not blown up


class Pairs(NamedTuple):
    """What the losses know of N pairs, each a tensor [N].

    Attributes:
        chosen: log-probability of the better answer under the policy, summed over its positions.
        rejected: the same of the worse answer.
        reference_chosen: that of the better answer under the reference (0 if there is none).
        reference_rejected: the same of the worse answer.
        chosen_length: positions of the better answer.
        rejected_length: positions of the worse answer.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        """log(policy / reference) of the better answers."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log(policy / reference) of the worse answers."""
        return self.rejected - self.reference_rejected

    @property
    def difference(self) -> Tensor:
        """How much more the policy has moved to the better answer than to the worse."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def mean_difference(self) -> Tensor:
        """The same with each answer's log-ratio taken as the mean over its positions."""
        return self.chosen_ratio / self.chosen_length - self.rejected_ratio / self.rejected_length

    def per_position(self) -> Pairs:
        """The pairs with means over positions in place of sums, so that long answers weigh no more."""
        return Pairs(
            self.chosen / self.chosen_length,
            self.rejected / self.rejected_length,
            self.reference_chosen / self.chosen_length,
            self.reference_rejected / self.rejected_length,
            torch.ones_like(self.chosen_length),
            torch.ones_like(self.rejected_length),
        )


class LossOptions(NamedTuple):
    """What losses can be set to.

    Attributes:
        beta: how strongly the policy is held to the reference (IPO calls it tau); above 0.
        label_smoothing: the share of pairs that may be the wrong way round; `robust` and `exo` read it.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0


def sigmoid(pairs: Pairs, options: LossOptions) -> Tensor:
    """DPO: logistic loss of the difference of rewards (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""
    return -F.logsigmoid(options.beta * pairs.difference)


def hinge(pairs: Pairs, options: LossOptions) -> Tensor:
    """SLiC's hinge with the reference's log-ratio (Zhao et al. 2023, arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    return torch.relu(1 - options.beta * pairs.difference)


def ipo(pairs: Pairs, options: LossOptions) -> Tensor:
    """IPO: squared distance of the difference from 1 / (2 beta) (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    Log-ratios are means over positions, as its authors had them (trl says so after asking them).
    """
    return (pairs.mean_difference - 1 / (2 * options.beta)).square()


def robust(pairs: Pairs, options: LossOptions) -> Tensor:
    """DPO that is unbiased if a share of the labels is flipped (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12)."""
    share, margin = options.label_smoothing, options.beta * pairs.difference
    kept, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - share) * kept - share * flipped) / (1 - 2 * share)


def apo_zero(pairs: Pairs, options: LossOptions) -> Tensor:
    """APO-zero: better answers up, worse ones down, each against the reference (arXiv:2408.06266, eq. 7)."""
    better, worse = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return torch.sigmoid(-better) + torch.sigmoid(worse)


def apo_down(pairs: Pairs, options: LossOptions) -> Tensor:
    """APO-down: both answers down, worse ones further; for a policy above its data (arXiv:2408.06266, eq. 8)."""
    return torch.sigmoid(options.beta * pairs.chosen_ratio) + torch.sigmoid(-options.beta * pairs.difference)


def sppo(pairs: Pairs, options: LossOptions) -> Tensor:
    """SPPO with hard wins: log-ratios to +-1 / (2 beta) (Wu et al. 2024, arXiv:2405.00675, eq. 4.7)."""
    goal = 0.5 / options.beta
    return (pairs.chosen_ratio - goal).square() + (pairs.rejected_ratio + goal).square()


def nca(pairs: Pairs, options: LossOptions) -> Tensor:
    """NCA for pairs: noise contrast of each answer's own reward (Chen et al. 2024, arXiv:2402.05369)."""
    better, worse = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(better) - 0.5 * (F.logsigmoid(-better) + F.logsigmoid(-worse))


def exo(pairs: Pairs, options: LossOptions) -> Tensor:
    """EXO for pairs: reverse divergence to the smoothed preference (Ji et al. 2024, arXiv:2402.00856, eq. 16).

    Needs a label smoothing above 0: a preference without doubt has no reverse divergence.
    """
    margin = options.beta * pairs.difference
    kept, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    smoothing = options.label_smoothing
    return kept.exp() * (kept - math.log1p(-smoothing)) + flipped.exp() * (flipped - math.log(smoothing))


def bco_pair(pairs: Pairs, options: LossOptions) -> Tensor:
    """BCO on both answers of a pair, its reward shift at 0 (Jung et al. 2024, arXiv:2404.04656)."""
    better, worse = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(better) - F.logsigmoid(-worse)


def sigmoid_norm(pairs: Pairs, options: LossOptions) -> Tensor:
    """Length-normalised DPO, as Tulu 3 has it (Lambert et al. 2024, arXiv:2411.15124, eq. 6)."""
    return -F.logsigmoid(options.beta * pairs.mean_difference)


def cross_entropy(pairs: Pairs, options: LossOptions) -> Tensor:
    """Mean cross-entropy of the better answer's positions, which holds up its likelihood.

    The second term of RPO (Pang et al. 2024, arXiv:2404.19733) and of MPO (Wang et al. 2024, arXiv:2411.10442).
    """
    return -pairs.chosen / pairs.chosen_length


LOSSES: dict[str, Callable[[Pairs, LossOptions], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sppo": sppo,
    "nca": nca,
    "exo": exo,
    "bco_pair": bco_pair,
    "sigmoid_norm": sigmoid_norm,
    "cross_entropy": cross_entropy,
}
"""Every loss by the name that recipes use."""

REFERENCE_FREE = ("sigmoid", "hinge", "robust", "sigmoid_norm", "cross_entropy")
"""Losses that mean something without a reference: they look at the two answers' difference, or at no ratio."""


def objective(pairs: Pairs, weights: Mapping[str, float], options: LossOptions) -> Tensor:
    """Return the weighted sum [N] of losses by name."""
    terms = [weight * LOSSES[name](pairs, options) for name, weight in weights.items()]
    return torch.stack(terms).sum(0)


def k3(log_probs: Tensor, other: Tensor) -> Tensor:
    """Return at each position an estimate of a divergence, KL(p || q), of the same shape.

    It is never below 0, and unbiased where p drew (Schulman 2020, "Approximating KL Divergence"): the policy is p for
    its own drawings, the reference for pairs that were drawn from it before training. Of answers that neither drew it
    says how far the two are apart on these very answers.

    Args:
        log_probs: of what was drawn, under p.
        other: the same under q.
    """
    behind = other - log_probs
    return (behind.expm1() - behind).clamp(min=0)  # rounding alone could bring it below


class Objective(Section):
    """What is minimised on pairs."""

    losses: dict[str, Rate] = Field(default={"sigmoid": 1.0}, min_length=1)
    """Weights of the losses, by name (`unimm.preferences.losses`)."""
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that may be the wrong way round; `robust` and `exo` read it."""
    per_position: bool = False
    """Whether log-probabilities are means over an answer's positions rather than sums."""

    @field_validator("losses")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in LOSSES:
                raise ValueError(f'unknown loss "{name}"{near(name, LOSSES)} (known: {", ".join(LOSSES)})')
        if not any(value.values()):
            raise ValueError("expected a weight above 0")
        return value

    @field_validator("label_smoothing")
    @classmethod
    def _doubt(cls, value: float, info: Any) -> float:
        if value == 0 and "exo" in info.data.get("losses", {}):
            raise ValueError("the loss exo needs more than 0, such as 0.01")
        return value

    @property
    def options(self) -> LossOptions:
        """What the losses are set to."""
        return LossOptions(self.beta, self.label_smoothing)


class ModalityObjective(Objective):
    """What is minimised on pairs of one modality, of several."""

    weight: Rate = 1.0
    """What a pair of this modality counts."""


class Terms(NamedTuple):
    """What each position gives, tensors of one shape.

    Attributes:
        loss: to be minimised.
        kl: estimate of the divergence from the reference; without gradient.
        ratio: probability of the code under the policy over that when it was drawn; without gradient.
        clipped: whether the clip took the gradient away.
    """

    loss: Tensor
    kl: Tensor
    ratio: Tensor
    clipped: Tensor


def advantages(rewards: Tensor, divide_by_std: bool = True) -> Tensor:
    """Return how much better each drawing is than its group.

    Args:
        rewards: [P, G], those of the G drawings of each of P prompts.
        divide_by_std: in units of the group's (sample) standard deviation, as DeepSeekMath has it. Without, groups in
            which all is nearly equal weigh no more than their differences (Dr. GRPO, Liu et al. 2025,
            arXiv 2503.20783).
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + STD_EPSILON) if divide_by_std else centred


def most_varied(rewards: Tensor, count: int) -> Tensor:
    """Return which `count` drawings of each group to learn from, so that their rewards vary most.

    They are some of the best and some of the worst, as many of each as make the variance largest (max-variance
    down-sampling of PODS, Xu et al. 2025, arXiv 2504.13818, section 3).

    Args:
        rewards: [P, G].
        count: at most G, at least 2.

    Returns:
        Indices into each group [P, count], rising.
    """
    size = rewards.shape[1]
    order = rewards.argsort(dim=1, stable=True)
    best = torch.arange(count + 1)[:, None]  # how many of the best, beside count - best of the worst
    places = torch.arange(count).expand(count + 1, count)
    places = torch.where(places < count - best, places, places + size - count)  # [count + 1, count]
    variances = rewards.gather(1, order)[:, places].var(-1)  # [P, count + 1]
    return order.gather(1, places[variances.argmax(1)]).sort(1).values


def position_terms(
    log_probs: Tensor,
    old: Tensor,
    reference: Tensor | None,
    advantage: Tensor,
    epsilon: tuple[float, float],
    beta: float,
) -> Terms:
    """Return the loss of each position, eq. 3 of DeepSeekMath with its sign turned, and what is logged of it.

    Args:
        log_probs: of the codes under the policy.
        old: the same when they were drawn.
        reference: the same under the reference; None: there is none.
        advantage: of the drawing that a code belongs to.
        epsilon: how far below and above 1 a ratio is rewarded (DAPO has two, arXiv 2503.14476; PPO one).
        beta: weight of the divergence from the reference, estimated by `k3`.
    """
    low, high = epsilon
    ratio = (log_probs - old).exp()
    free, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    loss = -torch.minimum(free, bounded)
    kl = torch.zeros_like(log_probs)
    if reference is not None:
        kl = k3(log_probs, reference)
        loss = loss + beta * kl
    return Terms(loss, kl.detach(), ratio.detach(), (bounded < free).detach())
