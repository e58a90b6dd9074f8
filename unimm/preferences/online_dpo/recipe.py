"""The recipe of the task `online_dpo`: what to draw, which drawings make a pair, and the losses of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from unimm.preferences.online.recipe import OnlineRecipe
from unimm.sections import Positive, Section
from unimm.training.preferences.recipe import Objective

if TYPE_CHECKING:
    from unimm.preferences.online_dpo.task import OnlineDpoTask


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
        from unimm.preferences.online_dpo.task import OnlineDpoTask

        self.check_policy()
        self.check_losses("objective", self.objective)
        most = self.sampling.group // 2
        if self.pairs.each > most:
            message = f"expected at most {most} of {self.sampling.group} drawings (sampling.group)"
            raise self.error("pairs.each", f"{message}, got {self.pairs.each}")
        return OnlineDpoTask(self)
