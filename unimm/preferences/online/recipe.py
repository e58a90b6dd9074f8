"""What recipes have in common whose model draws while it learns: of what, how, and by which scorer it is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from unimm.data.emojiscenes import Split
from unimm.preferences.candidates import Emphasis
from unimm.sections import NotNegative, Positive, Section
from unimm.training.preferences.recipe import PolicyRecipe


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
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """The policy that learns is the one that draws: log-probabilities are taken at this temperature too."""
    guidance_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """1 draws without guidance, from the very distribution that learns; with any other the drawings are better and
    off-policy, and learnt from as if the unguided policy had drawn them."""
    at_once: Positive = 64
    """Drawings that are sampled together."""


class OnlineRecipe(PolicyRecipe):
    """Recipe of a model that draws while it learns; groups are the model's parts, a stage's batch counts prompts."""

    prompts: PromptSection
    scorer: Annotated[str, Field(min_length=1)] = "rules"
    """Judges drawings: a name of `unimm.preferences.scorers`, or the dotted path of a callable."""
    sampling: SamplingSection = SamplingSection()
    packed: bool = True
    """Drawings that are learnt from side by side (a prompt's, or a pair's) in one row, after a prompt that is read
    once; else a row for each."""

    @property
    def updates(self) -> int:
        """Optimisation steps on each batch of drawings."""
        return 1

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """A tiny model with random weights, which draws a few scenes twice and is judged by rules."""
        from unimm.training.preferences.tiny import write_tiny_model

        folder = Path(data["output"]) / "tiny"
        write_tiny_model(folder)
        data |= {"model": str(folder), "prompts": {"scenes": 16}, "scorer": "rules"}
        data["sampling"] = {**data.get("sampling", {}), "group": 2}
        data["preview"] = {**data.get("preview", {}), "prompts": ["a star"]}

    def check_policy(self) -> None:
        """Refuse also a scorer that is none, and a reference that cannot be kept.

        Raises:
            UserError: as said.
        """
        from unimm.preferences.scorers import find_scorer

        find_scorer(self.scorer)
        super().check_policy()
        if self.reference.mode == "precomputed":
            raise self.error("reference.mode", "drawings are new in every step; take copy, adapter or none")
