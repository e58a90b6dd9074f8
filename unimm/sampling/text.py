"""Answers in words: a batch of questions through an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import BatchFeature

from unimm.models.inputs import Images
from unimm.models.modeling import UniMMModel
from unimm.models.seeing import seen_of
from unimm.processing.processor import UniMMProcessor
from unimm.sampling.engine import Engine
from unimm.sampling.requests import (
    FinishReason,
    TextRequest,
    TextSampling,
    Ticket,
    check_max_new_tokens,
)


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: its words.
        tokens: how many were generated, without the one that ends an answer.
        finish_reason: `stop` where the model ended it or a stop was met, `length` where it was cut.
        ids: the tokens, special ones too, which the words are without.
    """

    text: str
    tokens: int
    finish_reason: FinishReason
    ids: tuple[int, ...] = ()

    @property
    def cut(self) -> bool:
        """Whether it was stopped, by `max_new_tokens` or the end of the context, before the model ended it."""
        return self.finish_reason == "length"

    @classmethod
    def of(cls, ticket: Ticket) -> Answer:
        """Return what came of a request."""
        assert ticket.finish_reason is not None
        return cls(ticket.text, len(ticket.ids), ticket.finish_reason, tuple(ticket.ids))


def generate_answers(
    model: UniMMModel,
    processor: UniMMProcessor,
    inputs: BatchFeature,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
) -> list[Answer]:
    """Answer a batch greedily, each row until the model ends it or its room does.

    Args:
        model: the unified model.
        processor: its processor, which knows the tokens that end an answer.
        inputs: what the processor returns for questions and images.
        max_new_tokens: most tokens of an answer; by default what the context has room for.
        min_new_tokens: fewest.
    """
    sampling = replace(
        TextSampling(), max_new_tokens=check_max_new_tokens(max_new_tokens), min_new_tokens=min_new_tokens
    )
    engine = Engine(model, processor)
    return [Answer.of(ticket) for ticket in engine.run(_requests(model, inputs, sampling))]


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


def _requests(model: UniMMModel, inputs: BatchFeature, sampling: TextSampling) -> Iterator[TextRequest]:
    """Split a padded batch into its rows, each with its own images."""
    given, layout = dict(inputs), model.layout
    images = Images.from_inputs(given) or Images()
    grids = seen_of(model.seeing, images, layout).grids if len(images) else ()
    seen = 0
    for row, mask in zip(given["input_ids"], given["attention_mask"].bool(), strict=True):
        ids = row[mask].tolist()
        left, first = int(layout.feature_positions(row[mask]).sum()), seen
        while left > 0 and seen < len(grids):
            left -= layout.features(*grids[seen])
            seen += 1
        own = images.part(first, seen) if seen > first else None
        yield TextRequest(ids, own, sampling=sampling)
