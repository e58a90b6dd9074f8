"""GRPO's arithmetic: rewards to advantages within a group, and the clipped loss of each code, as pure functions.

Source: Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300), section 4.1; the clip is PPO's (Schulman et al. 2017,
arXiv 1707.06347).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unimm.training.preferences.losses import k3

SMALL = 1e-4  # added to a deviation, so that a group of near equals is not blown up


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
    return centred / (rewards.std(1, keepdim=True) + SMALL) if divide_by_std else centred


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
