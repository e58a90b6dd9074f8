"""Records as rows: what is given is what the model will be asked, what is learnt is the assistant's part."""

from __future__ import annotations

import pytest
import torch

from unimm.data.sources.record import Blob, Message, Picture, Record
from unimm.data.stream import RowBuilder
from unimm.errors import UserError
from unimm.modeling import IGNORED
from unimm.pipeline import UniMM
from unimm.processing import CAPTION_REQUESTS, UniMMProcessor

SEEN = Picture(Blob("a.png"))
DRAWN = Picture(Blob("b.png"), draw=True)
CODES = torch.arange(16).reshape(4, 4)


@pytest.fixture
def processor(tiny_model: UniMM) -> UniMMProcessor:
    return tiny_model.processor


@pytest.fixture
def builder(processor: UniMMProcessor) -> RowBuilder:
    return RowBuilder(processor)


def record(*turns: tuple[str, tuple[object, ...]]) -> Record:
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return Record("k", tuple(Message(roles[role], parts) for role, parts in turns))  # type: ignore[arg-type]


def learnt(row: object) -> list[int]:
    return [label for label in row.labels if label != IGNORED]  # type: ignore[attr-defined]


def test_a_conversation_asks_what_the_pipeline_asks(processor: UniMMProcessor, builder: RowBuilder) -> None:
    asked = record(
        ("u", (SEEN, SEEN, "what is this?")), ("a", ("apple",)), ("u", ("color?",)), ("a", ("red",))
    )
    row = builder.build(asked, [(4, 4)] * 2, [])
    prompt = processor.question_ids("what is this?", 2)
    assert row.ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [IGNORED] * len(prompt)
    eos = processor.eos
    assert learnt(row) == [*processor.text_ids("apple"), eos, *processor.text_ids("red"), eos]
    second = processor.ids(*processor.marks("<user>"), "color?", *processor.marks("<assistant>"))
    answer = [*processor.text_ids("red"), eos]
    assert row.ids[-len(second) - len(answer) :] == [*second, *answer]
    assert (row.seen, row.drawn) == (2, 0)
    assert builder.length(asked) == len(row.ids)


def test_pictures_stand_where_the_words_have_them(processor: UniMMProcessor, builder: RowBuilder) -> None:
    row = builder.build(record(("u", ("see", SEEN, "what is it?")), ("a", ("a",))), [(4, 4)], [])
    picture = processor.ids(*processor.layout.understanding(4, 4))
    start = 2 + len(processor.text_ids("see"))  # after <bos><user>
    assert row.ids[start : start + len(picture)] == picture


def test_a_caption_gets_a_request(processor: UniMMProcessor, builder: RowBuilder) -> None:
    captioned = record(("u", (SEEN,)), ("a", ("an apple",)))
    for number, request in enumerate(CAPTION_REQUESTS):
        row = builder.build(captioned, [(4, 4)], [], request=number)
        prompt = processor.question_ids(request, 1)
        assert row.ids[: len(prompt)] == prompt
        assert learnt(row) == [*processor.text_ids("an apple"), processor.eos]


def test_a_drawing_is_asked_for_as_the_pipeline_does(processor: UniMMProcessor, builder: RowBuilder) -> None:
    wanted = record(("u", ("a red apple",)), ("a", (DRAWN,)))
    row = builder.build(wanted, [], [CODES])
    prompt = processor.drawing_ids("a red apple")
    assert row.ids == [*prompt, *processor.layout.drawing_steps()]
    assert row.labels == [IGNORED] * len(prompt) + CODES.flatten().tolist()
    assert builder.length(wanted) == len(row.ids)
    blank = builder.build(wanted, [], [CODES], blank=True)
    assert blank.ids[: len(prompt)] == processor.unconditional_ids(prompt)
    assert blank.labels == row.labels


def test_an_edit_sees_one_picture_and_draws_another(processor: UniMMProcessor, builder: RowBuilder) -> None:
    row = builder.build(record(("u", (SEEN, "make it red")), ("a", (DRAWN,))), [(4, 4)], [CODES])
    assert learnt(row) == CODES.flatten().tolist()
    assert (row.seen, row.drawn) == (1, 1)
    ids = torch.tensor(row.ids)
    assert processor.layout.code_positions(ids).sum() == 16
    assert processor.layout.feature_positions(ids).sum() == processor.layout.features


def test_interleaved_texts_and_pictures_learn_when_to_draw(
    processor: UniMMProcessor, builder: RowBuilder
) -> None:
    row = builder.build(record(("a", ("one", DRAWN, "two"))), [], [CODES])
    layout = processor.layout
    assert learnt(row) == [
        *processor.text_ids("one"),
        layout.begin,
        *CODES.flatten().tolist(),
        *processor.text_ids("two"),
        processor.eos,
    ]
    assert row.ids[0] == processor.bos and row.labels[row.ids.index(layout.end)] == IGNORED


def test_plain_text_is_learnt_whole_and_cut_to_the_context(
    processor: UniMMProcessor, builder: RowBuilder
) -> None:
    row = builder.build(record(("a", ("what is this?",))), [], [])
    assert row.ids == [processor.bos, *processor.text_ids("what is this?"), processor.eos]
    assert learnt(row) == row.ids[1:]
    long = builder.build(record(("a", ("xyz " * 200,))), [], [])
    assert len(long.ids) == len(long.labels) == processor.context
    assert builder.length(record(("a", ("xyz " * 200,)))) > 400


def test_turns_beyond_the_context_are_left_out(processor: UniMMProcessor, builder: RowBuilder) -> None:
    turns = [("u", (SEEN, "q")), ("a", ("x" * 40,)), ("u", (SEEN, "q")), ("a", ("y" * 200,))]
    row = builder.build(record(*turns), [(4, 4)] * 2, [])
    assert row == builder.build(record(*turns[:2]), [(4, 4)], [])
    assert row.seen == 1
    with pytest.raises(UserError, match=r"\d+ tokens, the context holds 128"):
        builder.build(record(("u", ("q",)), ("a", ("y" * 200,))), [], [])


def test_what_looks_like_a_special_token_is_spelled(processor: UniMMProcessor, builder: RowBuilder) -> None:
    row = builder.build(record(("u", ("<image><eos>",)), ("a", ("<assistant>",))), [], [])
    assert row.ids.count(processor.eos) == 1
    assert not processor.layout.code_positions(torch.tensor(row.ids)).any()
