"""The policy that learns, and the reference that it is compared with: a frozen copy, or itself without adapters.

`PolicyRecipe` and `PolicyTask` are what the recipes and tasks that train one have in common.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from unimm.locate import EMBEDDED
from unimm.models.lora import LoraSection, adapters_off, add_adapters, save_model
from unimm.models.model_outputs import AnswerScores
from unimm.models.modeling import UniMMModel
from unimm.preferences.losses import REFERENCE_FREE, Objective
from unimm.processing.processor import UniMMProcessor
from unimm.sections import NotNegative, Positive, Section
from unimm.training import shards
from unimm.training.model_builder import model_groups
from unimm.training.recipe import BaseRecipe

if TYPE_CHECKING:
    from unimm.training.task import Batch


class ReferenceSection(Section):
    """What the policy is compared with."""

    mode: Literal["copy", "adapter", "precomputed", "none"] = "copy"
    """A frozen copy of the first weights; the weights under the adapters, which rest; log-probabilities of the first
    weights, computed once and cached; or nothing."""
    file: str | None = None
    """Where precomputed log-probabilities are cached; null: beside the data."""
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
    """Folder or hub id of the model to start from; null or "embedded": the embedded model."""
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


class PolicyModel(nn.Module):
    """A policy and, where the recipe keeps one, its frozen reference.

    Args:
        policy: the model that learns, still without adapters.
        copied: whether to keep a copy of it as the reference.
        lora: adapters to put into the policy.
    """

    def __init__(self, policy: UniMMModel, copied: bool, lora: LoraSection | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.reference: UniMMModel | None = frozen_copy(policy) if copied else None
        if lora is not None:
            add_adapters(policy, lora)

    @contextmanager
    def as_reference(self) -> Iterator[UniMMModel]:
        """Give the reference: the copy, or else the policy, whose adapters are off within."""
        if self.reference is not None:
            yield self.reference
            return
        with adapters_off(self.policy):
            yield self.policy


def frozen_copy(model: UniMMModel) -> UniMMModel:
    """Return a copy that does not train, without the image tokenizer: it is given codes."""
    tokenizer, model.image_tokenizer = model.image_tokenizer, None
    try:
        copied = copy.deepcopy(model).requires_grad_(False)
    finally:
        model.image_tokenizer = tokenizer
    return copied


class PolicyTask(ABC):
    """Groups, reference and export of a task that trains a `PolicyModel`; see `unimm.training.task.Task`."""

    recipe: PolicyRecipe
    processor: UniMMProcessor

    @abstractmethod
    def score(self, model: UniMMModel, batch: Batch) -> AnswerScores:
        """Scores of a batch's answers by a policy or its reference."""

    def reference_log_probs(self, module: nn.Module, batch: Batch) -> Tensor | None:
        """The reference's log-probabilities, as `score` has them; None where there is no reference."""
        assert isinstance(module, PolicyModel)
        if self.recipe.reference.mode == "none":
            return None
        with torch.no_grad(), module.as_reference() as reference:
            return self.score(reference, batch).log_probs

    def score_both(self, module: nn.Module, batch: Batch) -> tuple[AnswerScores, Tensor | None]:
        """What every loss begins with: the policy's scores, and the reference's log-probabilities, without dropout."""
        assert isinstance(module, PolicyModel)
        module.eval()
        reference = self.reference_log_probs(module, batch)
        return self.score(module.policy, batch), reference

    def groups(self, module: nn.Module) -> dict[str, list[nn.Parameter]]:
        """One group for each part of the policy, and one for all adapters where it has some."""
        assert isinstance(module, PolicyModel)
        return model_groups(module.policy, self.recipe.lora is not None)

    def before_step(self, module: nn.Module, step: int) -> None:
        """Move a reference that follows the policy, where its time has come."""
        assert isinstance(module, PolicyModel)
        every = self.recipe.reference.sync_every
        if every is not None and step and step % every == 0:
            assert module.reference is not None
            shards.blend(module.reference, module.policy, self.recipe.reference.mix)

    def export(self, module: nn.Module, folder: Path) -> None:
        """Write a folder that `unimm.load` takes."""
        assert isinstance(module, PolicyModel)
        dtype = getattr(torch, self.recipe.export_dtype)
        save_model(module.policy, folder, dtype, self.recipe.model or EMBEDDED)
        self.processor.save_pretrained(folder)
