"""What a model returns: of a forward pass, and of a score."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils.generic import ModelOutput

from unimm.models.experts import RouterLosses


@dataclasses.dataclass
class UniMMOutput(ModelOutput):
    """What a forward pass gives.

    Attributes:
        loss: scalar mean over all counted positions, with labels.
        logits: text logits [B, T, V], without labels.
        text_loss: scalar sum over the `text_count` text positions.
        code_loss: scalar sum over the `code_count` code positions.
        cache: keys and values of what was read, if they were kept.
        router: losses of a decoder's routers, means over positions, with labels and `output_router_logits`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    text_loss: Tensor | None = None
    code_loss: Tensor | None = None
    text_count: int | None = None
    code_count: int | None = None
    cache: Any = None
    router: RouterLosses | None = None


class AnswerScores(NamedTuple):
    """How likely a model finds answers, each a float64 tensor [S] over S answers.

    Attributes:
        log_probs: log-probability of the answer's labels, summed.
        entropy: entropy of the predictions at the same positions, summed; without gradient.
        length: how many positions were counted.
    """

    log_probs: Tensor
    entropy: Tensor
    length: Tensor
