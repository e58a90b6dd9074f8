"""Task `online_dpo`: DPO on the best and the worst of what the policy draws now.

Guo et al. 2024 ("Direct Language Model Alignment from Online AI Feedback", arXiv 2402.04792): pairs are never those of
an older model, since each step makes its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unimm.preferences.online.task import DrawingPolicy, OnlineTask, sum_and_count
from unimm.preferences.online_dpo.recipe import OnlineDpoRecipe
from unimm.preferences.rank import best_and_worst
from unimm.training.preferences.losses import Pairs, k3, objective
from unimm.training.preferences.task import told_of_pairs

if TYPE_CHECKING:
    from unimm.training.task import Batch, Metrics


class OnlineDpoTask(OnlineTask):
    """Learns from pairs of its own drawings; see `Task`."""

    recipe: OnlineDpoRecipe

    def choose(self, rewards: Tensor) -> Batch:
        """Pairs of the best and the worst that differ enough, and what each counts: `weights` [R].

        Where no pair does, one that counts nothing keeps the batch from being empty.
        """
        section = self.recipe.pairs
        pairs = best_and_worst(rewards, section.each).unflatten(1, (2, -1)).transpose(1, 2)  # [P, each, 2]
        better, worse = rewards.gather(1, pairs.flatten(1)).view_as(pairs).unbind(-1)
        margin = better - worse
        counted = (margin > 0) & (margin >= section.margin)
        weights = margin * counted if section.weighted else counted.double()
        if not counted.any():
            counted[0, 0] = True
        return {"owners": counted.nonzero()[:, 0], "taken": pairs[counted], "weights": weights[counted]}

    def targets(self, batch: Batch) -> dict[str, int | float]:
        """Prompts, and the most pairs that there can be."""
        return {**super().targets(batch), "pairs": len(batch["prompt"]) * self.recipe.pairs.each}

    def loss(
        self, module: nn.Module, batch: Batch, step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """Mean over possible pairs of their losses times what each counts; of those that differ too little it is 0."""
        assert isinstance(module, DrawingPolicy)
        module.eval()  # no dropout
        reference = self.reference_log_probs(module, batch)
        scores = self.score(module.policy, batch)
        pairs = self._pairs(scores.log_probs, reference)
        section, weights = self.recipe.objective, batch["weights"]
        counted = weights > 0
        used = pairs.per_position() if section.per_position else pairs
        losses = objective(used, section.losses, section.options) * weights
        codes = counted.repeat_interleave(2 * self.codes)
        told = {
            "entropy": sum_and_count(scores.entropy, codes),
            "counted": counted.double().sum() / totals["pairs"],
        }
        if reference is not None:
            told["kl"] = sum_and_count(k3(scores.log_probs.detach(), reference), codes)
        for name, value in told_of_pairs(pairs, used, section.beta).items():
            if name != "kl":  # which takes answers for the reference's, and these are the policy's
                told[f"pairs/{name}"] = sum_and_count(value, counted)
        return (losses.sum() / totals["pairs"]).float(), {**told, **self.told(batch, totals)}

    def _pairs(self, log_probs: Tensor, reference: Tensor | None) -> Pairs:
        """Pairs [R] from log-probabilities of every code [R 2 h w]."""
        if reference is None:
            reference = torch.zeros_like(log_probs)
        sums = (one.view(-1, 2, self.codes).sum(-1) for one in (log_probs, reference))
        (chosen, rejected), (better, worse) = (one.unbind(1) for one in sums)
        length = torch.full_like(chosen, self.codes)
        return Pairs(chosen, rejected, better, worse, length, length)
