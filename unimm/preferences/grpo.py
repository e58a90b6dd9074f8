"""Task `grpo`: make likelier what beat its group, and less likely what did not (DeepSeekMath, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unimm.preferences.losses import advantages, most_varied, position_terms
from unimm.preferences.online import DrawingSampling, OnlineRecipe, OnlineTask
from unimm.sections import Positive, Rate, Section

if TYPE_CHECKING:
    from unimm.training.task import Batch, Metrics


class GrpoSampling(DrawingSampling):
    """How the policy draws, and which drawings it learns from."""

    learnt: Annotated[int, Field(ge=2)] | None = None
    """Of each group, so many are learnt from, those whose rewards vary most; null: all. Learning takes about as long
    as drawing and scoring, and of a group of which all but one are equal most teach the same."""

    @model_validator(mode="after")
    def _of_group(self) -> GrpoSampling:
        if self.learnt is not None and self.learnt > self.group:
            raise ValueError(f"learnt: expected at most group ({self.group}), got {self.learnt}")
        return self


class GrpoObjective(Section):
    """How rewards become steps."""

    beta: Rate = 0.04
    """Weight of the divergence from the reference."""
    epsilon_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far below 1 a ratio still counts."""
    epsilon_high: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
    """How far above 1."""
    divide_by_std: bool = True
    """Whether advantages are divided by the group's standard deviation; false: Dr. GRPO."""
    updates: Positive = 1
    """Optimisation steps on each batch of drawings; more than 1 keeps a copy of the weights that drew."""


class GrpoRecipe(OnlineRecipe):
    """Recipe of the task `grpo`."""

    task: Literal["grpo"]
    sampling: GrpoSampling = GrpoSampling()
    objective: GrpoObjective = GrpoObjective()

    @property
    def updates(self) -> int:
        """Optimisation steps on each batch of drawings."""
        return self.objective.updates

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """The same as others that draw, and learns from all drawings."""
        super().shrink(data)
        data["sampling"] |= {"learnt": None}

    def build_task(self) -> GrpoTask:
        """The task that this recipe describes."""
        self.check_policy()
        if self.reference.mode == "none" and self.objective.beta:
            raise self.error("objective.beta", "needs a reference; without one it is 0")
        for index, stage in enumerate(self.stages):
            if stage.steps % self.updates:
                expected = f"expected a multiple of objective.updates ({self.updates}), got {stage.steps}"
                raise self.error(f"stages[{index}].steps", expected)
        return GrpoTask(self)


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
        settings = self.recipe.objective
        scores, reference = self.score_both(module, batch)
        old = batch.get("old", scores.log_probs.detach())
        advantage = batch["advantages"].flatten().repeat_interleave(self.codes)
        epsilon = (settings.epsilon_low, settings.epsilon_high)
        terms = position_terms(scores.log_probs, old, reference, advantage, epsilon, settings.beta)
        values = {"kl": terms.kl, "ratio": terms.ratio, "clipped": terms.clipped, "entropy": scores.entropy}
        metrics = {name: value.double().sum() / totals["code_tokens"] for name, value in values.items()}
        return (terms.loss.sum() / totals["code_tokens"]).float(), {
            **metrics,
            **self.reward_metrics(batch, totals),
        }
