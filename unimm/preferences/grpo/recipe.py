"""The recipe of the task `grpo`: what to draw, how it is rewarded, and how far a step may go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from unimm.preferences.online.recipe import OnlineRecipe, SamplingSection
from unimm.sections import Positive, Rate, Section

if TYPE_CHECKING:
    from unimm.preferences.grpo.task import GrpoTask


class GrpoSampling(SamplingSection):
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
        from unimm.preferences.grpo.task import GrpoTask

        self.check_policy()
        if self.reference.mode == "none" and self.objective.beta:
            raise self.error("objective.beta", "needs a reference; without one it is 0")
        for index, stage in enumerate(self.stages):
            if stage.steps % self.updates:
                expected = f"expected a multiple of objective.updates ({self.updates}), got {stage.steps}"
                raise self.error(f"stages[{index}].steps", expected)
        return GrpoTask(self)
