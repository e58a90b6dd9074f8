"""Task `online_dpo`: DPO on the best and the worst of what the policy draws now.

Guo et al. 2024 ("Direct Language Model Alignment from Online AI Feedback", arXiv 2402.04792): pairs are never those of
an older model, since each step makes its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unimm.preferences.dpo import pair_metrics
from unimm.preferences.losses import Objective, Pairs, k3, objective
from unimm.preferences.online import OnlineRecipe, OnlineTask, sum_and_count
from unimm.preferences.rank import best_and_worst
from unimm.sections import Positive, Section

if TYPE_CHECKING:
    from unimm.training.task import Batch, Metrics


class PairSection(Section):
    """Which drawings of a prompt make a pair, as `unimm preferences rank` has it."""

    each: Positive = 1
    """Pairs of a prompt: the best drawing and the worst, the second best and the second worst, and so on."""
    margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Pairs whose scores differ by less teach nothing and cost nothing; nor do ties."""
    weighted: bool = False
    """Whether a pair counts as much as its scores differ, as GRPO's advantages do; else all count 1."""


class OnlineDpoRecipe(OnlineRecipe):
    """Recipe of the task `online_dpo`."""

    task: Literal["online_dpo"]
    pairs: PairSection = PairSection()
    objective: Objective = Objective()

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """The same as others that draw, with the one pair that two drawings make."""
        super().shrink(data)
        data["pairs"] = {**data.get("pairs", {}), "each": 1}

    def build_task(self) -> OnlineDpoTask:
        """The task that this recipe describes."""
        self.check_policy()
        self.check_losses("objective", self.objective)
        most = self.sampling.group // 2
        if self.pairs.each > most:
            message = f"expected at most {most} of {self.sampling.group} drawings (sampling.group)"
            raise self.error("pairs.each", f"{message}, got {self.pairs.each}")
        return OnlineDpoTask(self)


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
        scores, reference = self.score_both(module, batch)
        pairs = self._pairs(scores.log_probs, reference)
        section, weights = self.recipe.objective, batch["weights"]
        counted = weights > 0
        used = pairs.per_position() if section.per_position else pairs
        losses = objective(used, section.losses, section.options) * weights
        codes = counted.repeat_interleave(2 * self.codes)
        metrics = {
            "entropy": sum_and_count(scores.entropy, codes),
            "counted": counted.double().sum() / totals["pairs"],
        }
        if reference is not None:
            metrics["kl"] = sum_and_count(k3(scores.log_probs.detach(), reference), codes)
        for name, value in pair_metrics(pairs, used, section.beta).items():
            metrics[f"pairs/{name}"] = sum_and_count(value, counted)
        return (losses.sum() / totals["pairs"]).float(), {**metrics, **self.reward_metrics(batch, totals)}

    def _pairs(self, log_probs: Tensor, reference: Tensor | None) -> Pairs:
        """Pairs [R] from log-probabilities of every code [R 2 h w]."""
        if reference is None:
            reference = torch.zeros_like(log_probs)
        sums = (one.view(-1, 2, self.codes).sum(-1) for one in (log_probs, reference))
        (chosen, rejected), (better, worse) = (one.unbind(1) for one in sums)
        length = torch.full_like(chosen, self.codes)
        return Pairs(chosen, rejected, better, worse, length, length)
