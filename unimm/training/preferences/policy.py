"""The policy that learns, and the reference that it is compared with: a frozen copy, or itself without adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from unimm.modeling import UniMMModel
from unimm.training.lora import LoraSection, adapters_off, add_adapters


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
