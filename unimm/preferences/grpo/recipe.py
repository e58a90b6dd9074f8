"""The recipe of the task `grpo`: what to draw, how it is rewarded, and how far a step may go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from unimm.data.emojiscenes import Split
from unimm.preferences.candidates import Emphasis
from unimm.sections import NotNegative, Positive, Rate, Section
from unimm.training.preferences.recipe import PolicyRecipe

if TYPE_CHECKING:
    from unimm.preferences.grpo.task import GrpoTask


class PromptSection(Section):
    """What is drawn: a file of prompts, or captions of EmojiScenes."""

    file: str | None = None
    """A prompt a line, or `.jsonl` with questions, as `unimm preferences draw` takes it."""
    scenes: Positive | None = None
    """In place of a file: captions of so many scenes."""
    split: Split = "train"
    """Of the scenes."""
    seed: NotNegative = 0
    """Of the scenes."""
    emphasis: Emphasis = 1.0
    """Weight of the questions about what a scene is for, against 1 of the others (`scene_prompts`)."""

    @model_validator(mode="after")
    def _one(self) -> PromptSection:
        if (self.file is None) == (self.scenes is None):
            raise ValueError("expected either file or scenes")
        return self


class SamplingSection(Section):
    """How the policy draws."""

    group: Annotated[int, Field(ge=2)] = 8
    """Drawings of each prompt, which are compared with each other."""
    learnt: Annotated[int, Field(ge=2)] | None = None
    """Of each group, so many are learnt from, those whose rewards vary most; null: all. Learning takes about as long
    as drawing and scoring, and of a group of which all but one are equal most teach the same."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The policy that learns is the one that draws: log-probabilities are taken at this temperature too."""
    guidance_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """1 draws without guidance, from the very distribution that learns; with any other the drawings are better and
    off-policy: ratios start at 1 as if the unguided policy had drawn them."""
    at_once: Positive = 64
    """Drawings that are sampled together."""

    @model_validator(mode="after")
    def _of_group(self) -> SamplingSection:
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


class GrpoRecipe(PolicyRecipe):
    """Recipe of the task `grpo`; groups are the model's parts, a stage's batch counts prompts."""

    task: Literal["grpo"]
    prompts: PromptSection
    scorer: Annotated[str, Field(min_length=1)] = "rules"
    """Gives rewards: a name of `unimm.preferences.scorers`, or the dotted path of a callable."""
    sampling: SamplingSection = SamplingSection()
    objective: GrpoObjective = GrpoObjective()
    packed: bool = True
    """All drawings of a prompt in one row, after a prompt that is read once; else a row for each."""

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """A tiny model with random weights, which draws a few scenes twice and is judged by rules."""
        from unimm.training.preferences.tiny import write_tiny_model

        folder = Path(data["output"]) / "tiny"
        write_tiny_model(folder)
        data |= {"model": str(folder), "prompts": {"scenes": 16}, "scorer": "rules"}
        data["sampling"] = {**data.get("sampling", {}), "group": 2, "learnt": None}
        data["preview"] = {**data.get("preview", {}), "prompts": ["a star"]}

    def build_task(self) -> GrpoTask:
        """The task that this recipe describes."""
        from unimm.preferences.grpo.task import GrpoTask
        from unimm.preferences.scorers import find_scorer

        find_scorer(self.scorer)
        self.check_policy()
        if self.reference.mode == "precomputed":
            raise self.error("reference.mode", "drawings are new in every step; take copy, adapter or none")
        if self.reference.mode == "none" and self.objective.beta:
            raise self.error("objective.beta", "needs a reference; without one it is 0")
        for index, stage in enumerate(self.stages):
            if stage.steps % self.objective.updates:
                expected = (
                    f"expected a multiple of objective.updates ({self.objective.updates}), got {stage.steps}"
                )
                raise self.error(f"stages[{index}].steps", expected)
        return GrpoTask(self)
