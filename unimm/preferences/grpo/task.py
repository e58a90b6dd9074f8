"""Task `grpo`: make likelier what beat its group, and less likely what did not (DeepSeekMath, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unimm.preferences.grpo.objective import advantages, most_varied, position_terms
from unimm.preferences.grpo.recipe import GrpoRecipe
from unimm.preferences.online.task import DrawingPolicy, OnlineTask

if TYPE_CHECKING:
    from unimm.training.task import Batch, Metrics


class GrpoTask(OnlineTask):
    """Learns from each drawing's advantage over its group; see `Task`."""

    recipe: GrpoRecipe

    def __init__(self, recipe: GrpoRecipe) -> None:
        super().__init__(recipe)
        self.learnt = recipe.sampling.learnt or recipe.sampling.group

    def targets(self, batch: Batch) -> dict[str, int | float]:
        """Prompts, and the codes that will be learnt from."""
        count = len(batch["prompt"])
        return {"prompts": count, "code_tokens": count * self.learnt * self.codes}

    def choose(self, rewards: Tensor) -> Batch:
        """Those of each prompt whose rewards vary most, and the `advantages` [P, K] of each."""
        taken = most_varied(rewards, self.learnt)
        better = advantages(rewards.gather(1, taken), self.recipe.objective.divide_by_std)
        return {"owners": torch.arange(len(rewards)), "taken": taken, "advantages": better}

    def loss(
        self, module: nn.Module, batch: Batch, step: int, totals: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """Mean over codes of the clipped loss and the divergence from the reference."""
        assert isinstance(module, DrawingPolicy)
        module.eval()  # no dropout
        settings = self.recipe.objective
        reference = self.reference_log_probs(module, batch)
        scores = self.score(module.policy, batch)
        old = batch.get("old", scores.log_probs.detach())
        advantage = batch["advantages"].flatten().repeat_interleave(self.codes)
        epsilon = (settings.epsilon_low, settings.epsilon_high)
        terms = position_terms(scores.log_probs, old, reference, advantage, epsilon, settings.beta)
        metrics = {"kl": terms.kl, "ratio": terms.ratio, "clipped": terms.clipped, "entropy": scores.entropy}
        told = {name: value.double().sum() / totals["code_tokens"] for name, value in metrics.items()}
        return (terms.loss.sum() / totals["code_tokens"]).float(), {**told, **self.told(batch, totals)}
