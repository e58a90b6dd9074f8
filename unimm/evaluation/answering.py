"""Answers of a model to items: words by generation, or the likeliest of their choices."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from unimm.errors import UserError
from unimm.evaluation.items import LETTERS, EvalItem
from unimm.evaluation.protocol import AnswerSection
from unimm.models.model_outputs import AnswerScores
from unimm.processing.messages import SHOWN, Message
from unimm.processing.processor import grids_of
from unimm.processing.rows import branch, stack_answers
from unimm.sampling.requests import TextRequest, TextSampling, Ticket
from unimm.sampling.sampler import noise_keys
from unimm.sampling.text import Answer
from unimm.videos import Video

if TYPE_CHECKING:
    from unimm.images import ImageInput
    from unimm.pipeline import UniMM

Said = dict[str, Any]
"""What came of an item: `answer`, and `cut` (generation) or `log_probs` of the choices (likelihood)."""


def answer_items(
    um: UniMM, items: Iterable[EvalItem], how: AnswerSection
) -> Iterator[list[tuple[EvalItem, Said]]]:
    """Answer items; yields those that are done as soon as they are, in no order.

    Args:
        um: the model.
        items: taken one by one as there is room for them.
        how: by generation or by likelihood.

    Raises:
        UserError: an image cannot be read, or a question is too long; the line names the item.
    """
    if how.by == "likelihood":
        return ([(item, likeliest(um, item, how))] for item in items)
    return _generated(um, items, how)


def _generated(
    um: UniMM, items: Iterable[EvalItem], how: AnswerSection
) -> Iterator[list[tuple[EvalItem, Said]]]:
    """Run items through the engine, `batch_size` of them together."""
    sampling = TextSampling.of({"temperature": how.temperature, "top_p": how.top_p}, how.max_new_tokens)
    engine, left = um.engine, iter(items)
    running: deque[tuple[EvalItem, Ticket]] = deque()
    try:
        more = True
        while more or running:
            for item in itertools.islice(left, um.batch_size - len(running)):
                running.append((item, engine.submit(_request(um, item, how.seed, sampling))))
            more = len(running) == um.batch_size
            if not running:
                break
            engine.step()
            done = [(item, ticket) for item, ticket in running if ticket.done]
            if done:
                running = deque(pair for pair in running if not pair[1].done)
                yield [(item, _said(item, ticket)) for item, ticket in done]
    finally:
        for _, ticket in running:
            engine.cancel(ticket)
        if running:
            engine.step()
        engine.release()


def _request(um: UniMM, item: EvalItem, seed: int, sampling: TextSampling) -> TextRequest:
    try:
        ids, images = um.processor.question(item.prompt, [image.read() for image in item.images])
    except UserError as error:
        raise UserError(f"{_name(item)}: {error}") from None
    return TextRequest(ids, images, noise_keys([seed + item.index], 1)[0], sampling=sampling)


def _name(item: EvalItem) -> str:
    shown = f" ({item.images[0].name})" if item.images else ""
    return f"item {item.key}{shown}"


def _said(item: EvalItem, ticket: Ticket) -> Said:
    if ticket.error is not None:
        if isinstance(ticket.error, UserError):
            raise UserError(f"{_name(item)}: {ticket.error}") from ticket.error
        raise ticket.error
    answer = Answer.of(ticket)
    return {"answer": answer.text, "cut": answer.cut}


@torch.inference_mode()
def score_texts(
    um: UniMM, prompt: str, shown: Sequence[ImageInput | Video], texts: Sequence[str]
) -> AnswerScores:
    """How likely a model finds each of several answers to one question, as branches behind one reading of it.

    Raises:
        UserError: an image cannot be read, or the question is too long.
    """
    images = um.processor.look(shown)
    grids = grids_of(images)
    question = Message("user", (*[SHOWN] * len(grids), prompt.strip()))
    rows = [
        um.processor.conversation.write([question, Message("assistant", (text,))], grids) for text in texts
    ]
    row = branch(rows)
    arrays = [{**row.arrays(), "answers": row.numbered(range(len(rows)))}]
    inputs: dict[str, Any] = {**stack_answers(arrays, um.processor.pad), "images": images}
    device = um.device
    scores: AnswerScores = um.model.score(
        {name: value.to(device) for name, value in inputs.items()}, len(rows)
    )
    return scores


def likeliest(um: UniMM, item: EvalItem, how: AnswerSection) -> Said:
    """The letter of the likeliest choice of an item, and how likely each is.

    One item goes through the model at a time, so that no other has a part in the last bits of a number.

    Raises:
        UserError: the item has no choices, or is too long.
    """
    if not item.choices:
        raise UserError(f"{_name(item)}: has no choices; answer.by: generation asks in words")
    letters = LETTERS[: len(item.choices)]
    said = list(letters) if how.choices == "letters" else list(item.choices)
    try:
        scores = score_texts(um, item.prompt, [image.read() for image in item.images], said)
    except UserError as error:
        raise UserError(f"{_name(item)}: {error}") from None
    log_probs = scores.log_probs.double().cpu()
    if how.normalise == "mean":
        log_probs = log_probs / scores.length.double().cpu()
    found = [round(value, 4) for value in log_probs.tolist()]
    return {"answer": letters[int(log_probs.argmax())], "log_probs": found}
