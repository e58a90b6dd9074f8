"""The policy that learns, and the reference that it is compared with: a frozen copy, or itself without adapters.

`PolicyTask` is what the tasks that train one have in common.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unimm.modeling import AnswerScores, UniMMModel
from unimm.processing import UniMMProcessor
from unimm.training import shards
from unimm.training.lora import LoraSection, adapters_off, add_adapters, save_model
from unimm.training.parts import EMBEDDED, model_groups

if TYPE_CHECKING:
    from unimm.training.preferences.recipe import PolicyRecipe
    from unimm.training.task import Batch


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
