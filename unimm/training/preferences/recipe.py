"""The recipe of the task `dpo`: where it starts, what it learns from, by which losses, against which reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from unimm.sections import NotNegative, Positive, Rate, Section, near
from unimm.training.lora import LoraSection
from unimm.training.preferences.data import MODALITIES
from unimm.training.preferences.losses import LOSSES, REFERENCE_FREE, Options
from unimm.training.recipe import BaseRecipe

if TYPE_CHECKING:
    from unimm.training.preferences.task import PreferenceTask


class Objective(Section):
    """What is minimised on pairs."""

    losses: dict[str, Rate] = Field(default={"sigmoid": 1.0}, min_length=1)
    """Weights of the losses, by name (`unimm.training.preferences.losses`)."""
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that may be the wrong way round; `robust` and `exo` read it."""
    per_position: bool = False
    """Whether log-probabilities are means over an answer's positions rather than sums."""

    @field_validator("losses")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in LOSSES:
                raise ValueError(f'unknown loss "{name}"{near(name, LOSSES)} (known: {", ".join(LOSSES)})')
        if not any(value.values()):
            raise ValueError("expected a weight above 0")
        return value

    @field_validator("label_smoothing")
    @classmethod
    def _doubt(cls, value: float, info: Any) -> float:
        if value == 0 and "exo" in info.data.get("losses", {}):
            raise ValueError("the loss exo needs more than 0, such as 0.01")
        return value

    @property
    def options(self) -> Options:
        """What the losses are set to."""
        return Options(self.beta, self.label_smoothing)


class ModalityObjective(Objective):
    """What is minimised on pairs of one modality, of several."""

    weight: Rate = 1.0
    """What a pair of this modality counts."""


class PreferenceData(Section):
    """The preferences, and how they go through the model."""

    file: Annotated[str, Field(min_length=1)]
    """JSON lines, as `unimm.training.preferences.data` has them."""
    packed: bool = True
    """Both answers in one row, after a prompt that is read once; else a row for each."""


class ReferenceSection(Section):
    """What the policy is compared with."""

    mode: Literal["copy", "adapter", "precomputed", "none"] = "copy"
    """A frozen copy of the first weights; the weights under the adapters, which rest; log-probabilities of the first
    weights, computed once and kept; or nothing."""
    file: str | None = None
    """Where precomputed log-probabilities are kept; null: beside the data."""
    sync_every: Positive | None = None
    """Steps after which a copy moves towards the policy (TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656)."""
    mix: Annotated[float, Field(gt=0, le=1)] = 0.6
    """How far it moves: the policy's share in the new reference; 1 makes it the policy."""

    @field_validator("sync_every")
    @classmethod
    def _copied(cls, value: int | None, info: Any) -> int | None:
        if value is not None and info.data.get("mode") != "copy":
            raise ValueError("only a reference of mode copy can follow the policy")
        return value


class DrawingPreview(Section):
    """What is drawn at every preview, before and after."""

    prompts: Annotated[tuple[str, ...], Field(max_length=16, strict=False)] = ()
    """To draw; by default the first prompts of the data."""
    guidance_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    seed: NotNegative = 0


class PolicyRecipe(BaseRecipe):
    """What the recipes have in common in which a policy starts from a model and is compared with a reference."""

    model: str | None = None
    """Folder or hub id of the model to start from; null: the embedded model."""
    lora: LoraSection | None = None
    """Adapters, trained as the group `lora`; the export is merged, the adapters alone are beside it."""
    reference: ReferenceSection = ReferenceSection()
    preview: DrawingPreview = DrawingPreview()
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the exported weights."""

    def check_policy(self) -> None:
        """Refuse options of a stage, and a reference that would not stay what it is.

        Raises:
            UserError: a stage has options; or adapters are to be switched off where there are none, or where other
                weights train too; or a copy is to follow a policy that is more than its weights.
        """
        for index, stage in enumerate(self.stages):
            if stage.options:
                raise self.error(f"stages[{index}].options", "this task has none; remove it")
        if self.reference.sync_every is not None and self.lora is not None:
            message = (
                "a copy cannot follow adapters, whose product is not that of their means; remove it, or lora"
            )
            raise self.error("reference.sync_every", message)
        if self.reference.mode != "adapter":
            return
        if self.lora is None:
            raise self.error(
                "reference.mode", "adapter switches adapters off, and there is no section lora; take copy"
            )
        for index, stage in enumerate(self.stages):
            for group in stage.lr:
                if group != "lora":
                    message = "would move the reference, which is the weights under the adapters; train lora alone, "
                    raise self.error(f"stages[{index}].lr.{group}", message + "or take reference.mode copy")

    def check_losses(self, key: str, objective: Objective) -> None:
        """Refuse losses that mean nothing without a reference where there is none.

        Raises:
            UserError: naming the loss under `key`, where the objective stands.
        """
        if self.reference.mode != "none":
            return
        for name in objective.losses:
            if name not in REFERENCE_FREE:
                message = f"needs a reference; without one: {', '.join(REFERENCE_FREE)}"
                raise self.error(f"{key}.losses.{name}", message)


class PreviewSection(DrawingPreview):
    """What is drawn and said at every preview, before and after."""

    texts: Positive = 8
    """Prompts of the data that are answered in words."""


class PreferenceRecipe(PolicyRecipe):
    """Recipe of the task `dpo`; groups are the model's parts, the mixture is over text and image pairs."""

    task: Literal["dpo"]
    data: PreferenceData
    text: ModalityObjective = ModalityObjective()
    image: ModalityObjective = ModalityObjective()
    preview: PreviewSection = PreviewSection()

    @classmethod
    def shrink(cls, data: dict[str, Any]) -> None:
        """A tiny model with random weights, and a few pairs of random drawings and of short texts."""
        from unimm.training.preferences.tiny import write_tiny_model, write_tiny_pairs

        folder = Path(data["output"]) / "tiny"
        data["model"] = str(folder / "model")
        data["data"] = {**data["data"], "file": str(folder / "pairs.jsonl")}
        data["reference"] = {key: value for key, value in data.get("reference", {}).items() if key != "file"}
        data["preview"] = {**data.get("preview", {}), "texts": 2}
        write_tiny_pairs(folder / "pairs.jsonl", write_tiny_model(folder / "model"))

    def objective(self, modality: str) -> ModalityObjective:
        """The section of a modality."""
        return self.text if modality == "text" else self.image

    def build_task(self) -> PreferenceTask:
        """The task that this recipe describes."""
        from unimm.training.preferences.task import PreferenceTask

        for index, stage in enumerate(self.stages):
            for kind in stage.mixture:
                if kind not in MODALITIES:
                    expected = f"expected one of {', '.join(MODALITIES)}{near(kind, MODALITIES)}"
                    raise self.error(f"stages[{index}].mixture.{kind}", expected)
        for modality in MODALITIES:
            self.check_losses(modality, self.objective(modality))
        self.check_policy()
        return PreferenceTask(self)
