"""Preference losses: pure functions of log-probabilities that were summed over each answer.

Every loss maps `Pairs` of N answers to N values; what is logged as a reward is `beta * log(policy / reference)`.
An objective is a weighted sum of losses by name, so that RPO (sigmoid and cross-entropy), MPO (sigmoid, BCO and
cross-entropy) and Emu3's DPO with cross-entropy are settings of `objective`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


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


class Options(NamedTuple):
    """What losses can be set to.

    Attributes:
        beta: how strongly the policy is held to the reference (IPO calls it tau); above 0.
        label_smoothing: the share of pairs that may be the wrong way round; `robust` and `exo` read it.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0


def sigmoid(pairs: Pairs, options: Options) -> Tensor:
    """DPO: logistic loss of the difference of rewards (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""
    return -F.logsigmoid(options.beta * pairs.difference)


def hinge(pairs: Pairs, options: Options) -> Tensor:
    """SLiC's hinge with the reference's log-ratio (Zhao et al. 2023, arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    return torch.relu(1 - options.beta * pairs.difference)


def ipo(pairs: Pairs, options: Options) -> Tensor:
    """IPO: squared distance of the difference from 1 / (2 beta) (Azar et al. 2023, arXiv:2310.12036, eq. 17).

    Log-ratios are means over positions, as its authors had them (trl says so after asking them).
    """
    return (pairs.mean_difference - 1 / (2 * options.beta)).square()


def robust(pairs: Pairs, options: Options) -> Tensor:
    """DPO that is unbiased if a share of the labels is flipped (Chowdhury et al. 2024, arXiv:2403.00409, eq. 12)."""
    share, margin = options.label_smoothing, options.beta * pairs.difference
    kept, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - share) * kept - share * flipped) / (1 - 2 * share)


def apo_zero(pairs: Pairs, options: Options) -> Tensor:
    """APO-zero: better answers up, worse ones down, each against the reference (arXiv:2408.06266, eq. 7)."""
    better, worse = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return torch.sigmoid(-better) + torch.sigmoid(worse)


def apo_down(pairs: Pairs, options: Options) -> Tensor:
    """APO-down: both answers down, worse ones further; for a policy above its data (arXiv:2408.06266, eq. 8)."""
    return torch.sigmoid(options.beta * pairs.chosen_ratio) + torch.sigmoid(-options.beta * pairs.difference)


def sppo(pairs: Pairs, options: Options) -> Tensor:
    """SPPO with hard wins: log-ratios to +-1 / (2 beta) (Wu et al. 2024, arXiv:2405.00675, eq. 4.7)."""
    goal = 0.5 / options.beta
    return (pairs.chosen_ratio - goal).square() + (pairs.rejected_ratio + goal).square()


def nca(pairs: Pairs, options: Options) -> Tensor:
    """NCA for pairs: noise contrast of each answer's own reward (Chen et al. 2024, arXiv:2402.05369)."""
    better, worse = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(better) - 0.5 * (F.logsigmoid(-better) + F.logsigmoid(-worse))


def exo(pairs: Pairs, options: Options) -> Tensor:
    """EXO for pairs: reverse divergence to the smoothed preference (Ji et al. 2024, arXiv:2402.00856, eq. 16).

    Needs a label smoothing above 0: a preference without doubt has no reverse divergence.
    """
    margin = options.beta * pairs.difference
    kept, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    smoothing = options.label_smoothing
    return kept.exp() * (kept - math.log1p(-smoothing)) + flipped.exp() * (flipped - math.log(smoothing))


def bco_pair(pairs: Pairs, options: Options) -> Tensor:
    """BCO on both answers of a pair, its reward shift at 0 (Jung et al. 2024, arXiv:2404.04656)."""
    better, worse = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -F.logsigmoid(better) - F.logsigmoid(-worse)


def sigmoid_norm(pairs: Pairs, options: Options) -> Tensor:
    """Length-normalised DPO, as Tulu 3 has it (Lambert et al. 2024, arXiv:2411.15124, eq. 6)."""
    return -F.logsigmoid(options.beta * pairs.mean_difference)


def cross_entropy(pairs: Pairs, options: Options) -> Tensor:
    """Mean cross-entropy of the better answer's positions, which holds up its likelihood.

    The second term of RPO (Pang et al. 2024, arXiv:2404.19733) and of MPO (Wang et al. 2024, arXiv:2411.10442).
    """
    return -pairs.chosen / pairs.chosen_length


LOSSES: dict[str, Callable[[Pairs, Options], Tensor]] = {
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


def objective(pairs: Pairs, weights: Mapping[str, float], options: Options) -> Tensor:
    """Return the weighted sum [N] of losses by name."""
    terms = [weight * LOSSES[name](pairs, options) for name, weight in weights.items()]
    return torch.stack(terms).sum(0)


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return at each position an estimate of the divergence of the policy from the reference, of the same shape.

    It is unbiased where the policy drew, and never below 0 (Schulman 2020, "Approximating KL Divergence").

    Args:
        log_probs: of what was drawn, under the policy.
        reference: the same under the reference.
    """
    behind = reference - log_probs
    return behind.exp() - behind - 1
