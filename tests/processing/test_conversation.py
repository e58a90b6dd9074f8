"""The one writer: what is given is what the model will be asked, what is labelled is the assistant's part."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from unimm.data.samples import SampleBuilder
from unimm.errors import UserError
from unimm.models.layout import IGNORED
from unimm.pipeline import UniMM
from unimm.processing.conversation import Conversation, ImageSlot
from unimm.processing.messages import DRAWN, SHOWN, Message, Record
from unimm.processing.processor import CAPTION_REQUESTS, UniMMProcessor
from unimm.processing.rows import Row

CODES = torch.arange(16).reshape(4, 4)
GRID = (2, 2)  # of an image to understand of the tiny model


@pytest.fixture
def processor(tiny_model: UniMM) -> UniMMProcessor:
    return tiny_model.processor


@pytest.fixture
def conversation(processor: UniMMProcessor) -> Conversation:
    return processor.conversation


@pytest.fixture
def builder(processor: UniMMProcessor) -> SampleBuilder:
    return SampleBuilder(processor, None, lambda pixels: pixels)


def messages(*turns: tuple[str, tuple[object, ...]]) -> list[Message]:
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [Message(roles[role], parts) for role, parts in turns]  # type: ignore[arg-type]


def record(*turns: tuple[str, tuple[object, ...]]) -> Record:
    return Record("k", tuple(messages(*turns)))


def labelled(row: Row) -> list[int]:
    return [label for label in row.labels if label != IGNORED]


def test_a_conversation_asks_what_the_pipeline_asks(
    processor: UniMMProcessor, conversation: Conversation
) -> None:
    asked = messages(
        ("u", (SHOWN, SHOWN, "what is this?")), ("a", ("apple",)), ("u", ("color?",)), ("a", ("red",))
    )
    row = conversation.write(asked, [GRID] * 2)
    prompt = processor.question_ids("what is this?", 2)
    assert row.ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
    eos = processor.eos
    assert labelled(row) == [*processor.text_ids("apple"), eos, *processor.text_ids("red"), eos]
    special = conversation.special
    second = processor.ids(*special("<user>"), "color?", *special("<assistant>"))
    answer = [*processor.text_ids("red"), eos]
    assert row.ids[-len(second) - len(answer) :] == [*second, *answer]
    assert (row.seen, row.drawn) == (2, 0)
    assert conversation.ask(asked[:-1], [GRID] * 2) == row.ids[: -len(answer)]
    assert labelled(conversation.write(asked, [GRID] * 2, learn=False)) == []


def test_images_stand_where_the_words_have_them(
    processor: UniMMProcessor, conversation: Conversation
) -> None:
    row = conversation.write(messages(("u", ("see", SHOWN, "what is it?")), ("a", ("a",))), [GRID])
    image = processor.ids(*processor.layout.understanding(*GRID))
    start = 2 + len(processor.text_ids("see"))  # after <bos><user>
    assert row.ids[start : start + len(image)] == image


def test_a_caption_gets_a_request(processor: UniMMProcessor, builder: SampleBuilder) -> None:
    captioned = record(("u", (SHOWN,)), ("a", ("an apple",)))
    for number, request in enumerate(CAPTION_REQUESTS):
        row = builder.row(captioned, [GRID], [], request=number)
        prompt = processor.question_ids(request, 1)
        assert row.ids[: len(prompt)] == prompt
        assert labelled(row) == [*processor.text_ids("an apple"), processor.eos]


def test_an_image_from_an_image_gets_none(processor: UniMMProcessor, builder: SampleBuilder) -> None:
    row = builder.row(record(("u", (SHOWN,)), ("a", (DRAWN,))), [GRID], [CODES])
    image = processor.ids(*processor.layout.understanding(*GRID))
    assert row.ids[: 2 + len(image)] == [
        processor.bos,
        *processor.ids(*processor.conversation.special("<user>")),
        *image,
    ]
    assert labelled(row) == CODES.flatten().tolist()


def test_a_drawing_is_asked_for_as_the_pipeline_does(
    processor: UniMMProcessor, conversation: Conversation
) -> None:
    row = conversation.write(messages(("u", ("a red apple",)), ("a", (DRAWN,))), [CODES])
    prompt = processor.drawing_ids("a red apple")
    assert row.ids == [*prompt, *processor.layout.drawing_steps()]
    assert row.labels == [IGNORED] * len(prompt) + CODES.flatten().tolist()
    dropped = conversation.drop_prompt(row, (4, 4))
    assert dropped.ids[: len(prompt)] == processor.unconditional_ids(prompt)
    assert dropped.labels == row.labels


def test_an_edit_is_asked_for_as_the_pipeline_does(
    processor: UniMMProcessor, conversation: Conversation
) -> None:
    row = conversation.write(messages(("u", (SHOWN, "make it red")), ("a", (DRAWN,))), [GRID, CODES])
    prompt = processor.drawing_ids("make it red", images=[GRID])
    assert row.ids == [*prompt, *processor.layout.drawing_steps()]
    assert labelled(row) == CODES.flatten().tolist()
    assert (row.seen, row.drawn) == (1, 1)


def test_interleaved_texts_and_images_learn_when_to_draw(
    processor: UniMMProcessor, conversation: Conversation
) -> None:
    row = conversation.write(messages(("a", ("one", DRAWN, "two"))), [CODES])
    layout = processor.layout
    assert labelled(row) == [
        *processor.text_ids("one"),
        layout.begin,
        *CODES.flatten().tolist(),
        *processor.text_ids("two"),
        processor.eos,
    ]
    assert row.ids[0] == processor.bos and row.labels[row.ids.index(layout.end)] == IGNORED


def test_plain_text_is_learnt_whole_and_cut_to_the_context(
    processor: UniMMProcessor, builder: SampleBuilder
) -> None:
    row = builder.row(record(("a", ("what is this?",))), [], [])
    assert row.ids == [processor.bos, *processor.text_ids("what is this?"), processor.eos]
    assert labelled(row) == row.ids[1:]
    long = builder.row(record(("a", ("xyz " * 200,))), [], [])
    assert len(long.ids) == len(long.labels) == processor.context
    assert long.whole > 400


def test_turns_beyond_the_context_are_left_out(builder: SampleBuilder) -> None:
    turns = [("u", (SHOWN, "q")), ("a", ("x" * 40,)), ("u", (SHOWN, "q")), ("a", ("y" * 200,))]
    row = builder.row(record(*turns), [GRID] * 2, [])
    assert row == builder.row(record(*turns[:2]), [GRID], [])
    assert row.seen == 1
    with pytest.raises(UserError, match=r"\d+ tokens, the context holds 128"):
        builder.row(record(("u", ("q",)), ("a", ("y" * 200,))), [], [])


def test_what_looks_like_a_special_token_is_spelled(
    processor: UniMMProcessor, conversation: Conversation
) -> None:
    row = conversation.write(messages(("u", ("<image><eos>",)), ("a", ("<assistant>",))))
    assert row.ids.count(processor.eos) == 1


@pytest.mark.parametrize("images", [[], [GRID]])
def test_a_question_ends_where_its_answer_begins(
    processor: UniMMProcessor, conversation: Conversation, images: Sequence[ImageSlot]
) -> None:
    question = messages(("u", (*[SHOWN] * len(images), "what?")))
    row = conversation.write(question, images)
    answered = conversation.write([*question, *messages(("a", ("it",)))], images)
    assert answered.ids[: len(row.ids)] == row.ids == processor.question_ids("what?", len(images))
    assert answered.labels[len(row.ids)] != IGNORED and labelled(row) == []
