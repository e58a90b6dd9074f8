"""Text answers: transformers' own generation over the unified model's stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria, StoppingCriteriaList

from unimm.errors import UserError
from unimm.models.inputs import Images
from unimm.models.modeling import UniMMModel
from unimm.processing.processor import UniMMProcessor


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: its words.
        tokens: how many were generated, without the one that ends an answer.
        cut: whether it was stopped, by `max_new_tokens` or the end of the context, before the model ended it.
    """

    text: str
    tokens: int
    cut: bool


class _Room(StoppingCriteria):
    """Stops each row after as many tokens as it has room for, whatever else is in the batch."""

    def __init__(self, room: Tensor) -> None:
        self.room = room

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        """Say which rows [B] are full; `input_ids` [B, T] holds generated tokens only."""
        return input_ids.shape[1] >= self.room


def check_max_new_tokens(most: Any) -> int | None:
    """Return the bound on an answer's length; None: up to the end of the context.

    Raises:
        UserError: it is no whole number of at least 1.
    """
    if most is None:
        return None
    value = most.item() if hasattr(most, "item") else most
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"max_new_tokens: {most!r}; give a whole number of at least 1, or leave it out")
    return value


@torch.inference_mode()
def generate_answers(
    model: UniMMModel,
    processor: UniMMProcessor,
    inputs: BatchFeature,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
) -> list[Answer]:
    """Answer a left-padded batch greedily, each row until the model ends it or its room does.

    Args:
        model: the unified model.
        processor: its processor, which knows the tokens that end an answer.
        inputs: what the processor returns for questions and images.
        max_new_tokens: most tokens of an answer; by default what the context has room for.
        min_new_tokens: fewest.
    """
    inputs = inputs.to(model.device)
    stream = model.embed(inputs["input_ids"], Images.from_inputs(dict(inputs))).stream
    room = processor.context - inputs["attention_mask"].sum(-1)
    if max_new_tokens is not None:
        room = room.clamp(max=max_new_tokens)
    ids: Tensor = model.decoder.generate(
        inputs_embeds=stream,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=int(room.max()),
        min_new_tokens=min_new_tokens,
        do_sample=False,
        eos_token_id=processor.end_tokens,
        pad_token_id=processor.pad,
        stopping_criteria=StoppingCriteriaList([_Room(room)]),
    )
    kept: list[tuple[list[int], bool]] = []
    for row, most in zip(ids.tolist(), room.tolist(), strict=True):
        written = row[:most]
        end = next((i for i, token in enumerate(written) if token in processor.end_tokens), None)
        kept.append((written[:end], end is None))
    texts = processor.decode_text([row for row, _ in kept])
    return [Answer(text, len(row), cut) for text, (row, cut) in zip(texts, kept, strict=True)]


def generate_text(
    model: UniMMModel,
    processor: UniMMProcessor,
    inputs: BatchFeature,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
) -> list[str]:
    """Return the texts of `generate_answers`, for which what became of them does not matter."""
    answers = generate_answers(model, processor, inputs, max_new_tokens, min_new_tokens)
    return [answer.text for answer in answers]
