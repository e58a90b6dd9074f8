"""Rows as many sets have them: each becomes what its form says, or says why not; none is read as something else."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import forms
from unimm.data.sources import Blob, ImagePart, Reading, Record
from unimm.data.sources.images import find_file
from unimm.data.sources.rows import make_record
from unimm.errors import UserError

PNG = forms.encoded(forms.SCENES[0])
TEXT64 = base64.b64encode(PNG).decode()
SHOWN, DRAWN = "<shown>", "<drawn>"


def record(row: object, reading: Reading | None = None) -> Record:
    return make_record("k", row, lambda value: find_file(Path("root"), value), reading or Reading())


def said(made: Record) -> list[tuple[str, ...]]:
    """Who says what, with a sign for each image."""
    signs = {True: DRAWN, False: SHOWN}
    return [
        (m.role[0], *(part if isinstance(part, str) else signs[part.draw] for part in m.parts))
        for m in made.messages
    ]


IMAGE = {"bytes": PNG, "path": None}
ASKED = [("u", SHOWN, "q"), ("a", "a")]
CASES: list[tuple[str, dict[str, Any], list[tuple[str, ...]]]] = [
    ("the_cauldron",
     {"images": [IMAGE], "texts": [{"user": "q", "assistant": "a", "source": "AI2D"}]}, ASKED),
    ("FineVision of two turns and two images",
     {"images": [IMAGE, IMAGE], "texts": [{"user": "q", "assistant": "a"}, {"user": "r", "assistant": "b"}],
      "source": "s", "relevance_ratings": [3, 4]},
     [("u", SHOWN, SHOWN, "q"), ("a", "a"), ("u", "r"), ("a", "b")]),
    ("turns as a table stores them", {"images": [IMAGE], "texts": {"user": ["q"], "assistant": ["a"]}}, ASKED),
    ("turns written as JSON",
     {"image": IMAGE, "conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])},
     ASKED),
    ("a question with a mark", {"image": IMAGE, "question": "<image>\nq", "answer": "a"}, ASKED),
    ("a question with a mark within",
     {"image": IMAGE, "question": "in <image> q", "answer": "a"}, [("u", "in", SHOWN, "q"), ("a", "a")]),
    ("an answer with a mark", {"image": IMAGE, "question": "q", "answer": "so: <image>"},
     [("u", "q"), ("a", "so:", DRAWN)]),
    ("a caption after a mark", {"image": IMAGE, "text": "<image>\na cat"}, [("u", SHOWN), ("a", "a cat")]),
    ("captions of two marked images", {"images": [IMAGE, IMAGE], "caption": "<image><image> cats"},
     [("u", SHOWN, SHOWN), ("a", "cats")]),
    ("VQA's answers", {"image": IMAGE, "question": "q", "answers": [{"answer": x} for x in ("b", "a", "a")]}, ASKED),
    ("VQA's choice", {"image": IMAGE, "question": "q", "answers": ["b", "b"], "multiple_choice_answer": "a"}, ASKED),
    ("answers as texts", {"image": IMAGE, "question": "q", "answers": ["a", "b"]}, ASKED),
    ("SQuAD", {"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [3]}},
     [("u", "q\n\nc"), ("a", "a")]),
    ("Alpaca", {"instruction": "q", "input": "i", "output": "a"}, [("u", "q\n\ni"), ("a", "a")]),
    ("Alpaca without input", {"instruction": "q", "input": "", "output": "a"}, [("u", "q"), ("a", "a")]),
    ("Alpaca with an image", {"instruction": "<image>q", "output": "a", "images": [IMAGE]}, ASKED),
    ("Dolly", {"instruction": "q", "context": "", "response": "a"}, [("u", "q"), ("a", "a")]),
    ("query and response", {"query": "q", "response": "a", "images": [IMAGE]}, ASKED),
    ("with a history and a system", {"system": "s", "query": "r", "response": "b", "history": [["q", "a"]]},
     [("s", "s"), ("u", "q"), ("a", "a"), ("u", "r"), ("a", "b")]),
    ("TRL's prompt and completion",
     {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}],
      "images": [IMAGE]}, ASKED),
    ("prompt and completion as texts", {"prompt": "q", "completion": "a"}, [("u", "q"), ("a", "a")]),
    ("OpenAI's parts",
     {"messages": [
         {"role": "user", "content": [
             {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{TEXT64}"}},
             {"type": "text", "text": "q"}]},
         {"role": "assistant", "content": "a"}]}, ASKED),
    ("parts as a table stores them",
     {"messages": [
         {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "q"}]},
         {"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
      "images": [IMAGE]}, ASKED),
    ("neighbours of one role",
     {"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "more"},
                   {"role": "assistant", "content": "a"}]}, [("u", "q\nmore"), ("a", "a")]),
    ("texts that are parted", {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "a"}]}, [("u", "one two"), ("a", "a")]),
    ("a row's system", {"system": "s", "conversations": [
        {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [("s", "s"), ("u", "q"), ("a", "a")]),
    ("a byte-order mark", {"text": "\ufeffwords"}, [("a", "words")]),
    ("no image among the images", {"images": [], "text": "words"}, [("a", "words")]),
    ("another file's name", {"text": "print()", "path": "src/main.py"}, [("a", "print()")]),
    ("a document", {"texts": ["one", None, "two"], "images": [None, IMAGE, None]}, [("a", "one", DRAWN, "two")]),
    ("an edit of two", {"input_image": [IMAGE, IMAGE], "instruction": "p", "output_image": IMAGE},
     [("u", SHOWN, SHOWN, "p"), ("a", DRAWN)]),
    ("an edit with a mark", {"input_image": IMAGE, "instruction": "turn <image> red", "output_image": IMAGE},
     [("u", "turn", SHOWN, "red"), ("a", DRAWN)]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "wanted"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_row_becomes_what_its_form_says(row: dict[str, Any], wanted: list[tuple[str, ...]]) -> None:
    assert said(record(row)) == wanted


@pytest.mark.parametrize(
    "name",
    [
        "image",
        "filename",
        "file_name",
        "image_file",
        "image_path",
        "photo",
        "picture",
        "path",
        "img",
        "jpg",
        "file",
    ],
)
@pytest.mark.parametrize("pairs", ["image_to_text", "text_to_image"])
def test_a_column_of_images_is_known_by_many_names(name: str, pairs: Any) -> None:
    made = record({name: "a.jpg", "text": "words"}, Reading(pairs))
    image = made.images()[0]
    assert made.kind == pairs and image.blob.path == "root/a.jpg"


def test_a_file_name_without_a_suffix_is_an_image_beside_a_caption() -> None:
    assert record({"filename": "000123", "caption": "words"}).kind == "image_to_text"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"snapshot": "a.jpg", "text": "a"}, r"snapshot: looks like an image.*fields: \{image: snapshot\}"),
        ({"thumb": IMAGE, "question": "q", "answer": "a"}, "thumb: looks like an image"),
        ({"thumb": PNG, "messages": [{"role": "assistant", "content": "a"}]}, "thumb: looks like an image"),
        ({"raw": TEXT64, "text": "a"}, "raw: looks like an image"),
        ({"url": "https://a.b/c.jpg?x=1", "text": "a"}, "url: looks like an image"),
        ({"captoin": "a", "image": "a.png"}, r'captoin: did you mean "caption"\?; known are messages; conversations'),
        ({"foo": 1}, r"no other form of data fits \(columns: foo\); known are messages"),
        ({"texts": ["a", "b"], "images": [None, IMAGE]}, r"texts\[1\]: a text where images has an image"),
        ({"texts": ["a", 3], "images": [None, None]}, r"texts\[1\]: expected a text, got int"),
        ({"texts": [None], "images": [None]}, r"texts\[0\]: neither a text nor an image"),
        ({"texts": [{"user": "q"}], "images": [IMAGE]}, r"texts\[0\]: expected user and assistant"),
        ({"image": IMAGE, "text": "a <image> b"}, "text: <image> within the words"),
        ({"image": IMAGE, "text": "<image><image> b"}, "text: 2 <image> placeholders, but 1 images"),
        ({"image": IMAGE, "question": "<image><image>", "answer": "a"}, "more <image> placeholders than images"),
        ({"images": [IMAGE, IMAGE], "question": "<image>", "answer": "a"}, "2 images, but 1 <image> placeholders"),
        ({"instruction": "q"}, "output: missing"),
        ({"query": "q"}, "response: missing"),
        ({"image": IMAGE, "question": "q", "answers": []}, "answers: empty"),
        ({"image": IMAGE, "caption": []}, "text: empty"),
        ({"image": IMAGE, "caption": ["a", 3]}, "text: expected a text, got int"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "chosen and rejected: preferences"),
        ({"prompt": "p", "completion": "a", "label": False}, "completion and label: judged answers"),
        ({"query": "q", "response": "a", "history": ["q"]}, r"history\[0\]: expected a question and an answer"),
        ({"text": "\ud800"}, "text: holds half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\udfff"}]}, "surrogate"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png", "draw": 1}]}]},
         r"content\[0\].draw: expected true or false, got 1"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
         "expected a text, got NoneType"),
        ({"messages": [{"role": "assistant", "content": None}]}, "expected a text or a list of parts"),
        ({"image": {"bytes": "/etc/passwd"}, "text": "a"}, "image.bytes: expected bytes or base64 of an image"),
        ({"image": {"bytes": "notes.png"}, "text": "a"}, "image.bytes: expected bytes or base64 of an image"),
        ({"image": {"width": 3}, "text": "a"}, r"image: neither bytes nor path in it \(keys: width\)"),
        ({"image": "data:image/png,abc", "text": "a"}, "a data URL that is not base64"),
        ({"image": "data:image/png;base64,!!", "text": "a"}, "a data URL with broken base64"),
        ({"image": "x" * 5000, "text": "a"}, "neither base64 of an image nor the name of a file"),
        ({"image": "", "text": "a"}, "expected the name of a file, got an empty text"),
    ],
)  # fmt: skip
def test_what_is_no_such_row_says_why_on_one_line(row: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        record(row)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "value",
    [TEXT64, TEXT64 + "\n", f"data:image/png;base64,{TEXT64}", {"bytes": TEXT64}, {"base64": TEXT64}, PNG,
     {"url": f"data:image/png;base64,{TEXT64}"}, bytearray(PNG)],
    ids=["base64", "base64 line", "data URL", "bytes as base64", "base64 key", "bytes", "url", "bytearray"],
)  # fmt: skip
def test_images_within_the_row(value: Any) -> None:
    image = record({"image": value, "text": "a"}).images()[0]
    assert np.array_equal(np.asarray(image.image()), forms.SCENES[0].render())
    assert len(image.blob.name) < 30, "messages do not print the image"


@pytest.mark.parametrize(
    "text", ["A" * 64 + " " * 300_000 + "!", "<image>" * 100_000 + "x", "<image> " * 100_000, "data:," * 100_000],
    ids=["spaces", "placeholders", "placeholders apart", "data"],
)  # fmt: skip
def test_long_texts_take_no_time(text: str) -> None:
    """Each would take minutes if patterns were tried from every place."""
    assert record({"text": text}).kind == "text"
    with pytest.raises(UserError):
        record({"image": text, "text": text})


def test_base64_of_a_jpeg_is_no_absolute_path() -> None:
    text = base64.b64encode(forms.encoded(forms.SCENES[0], "JPEG")).decode()
    assert text.startswith("/9j/")
    assert record({"image": text, "text": "a"}).images()[0].image().size == (64, 64)


def test_fields_name_columns_or_say_that_there_is_none() -> None:
    row = {"snapshot": "a.jpg", "text": "words"}
    assert record(row, Reading(fields={"image": "snapshot"})).kind == "image_to_text"
    assert record(row, Reading(fields={"image": ""})).kind == "text"
    with pytest.raises(
        UserError, match=r'snapshto: missing \(fields says it holds image\); did you mean "snapshot"'
    ):
        record(row, Reading(fields={"image": "snapshto"}))


def test_each_of_several_captions_is_a_version() -> None:
    row = {"image": IMAGE, "captions": ["one", "two", "three"]}
    for pairs in ("image_to_text", "text_to_image"):
        made = record(row, Reading(pairs))
        words = [
            part
            for n in range(3)
            for m in made.version(n).messages
            for part in m.parts
            if isinstance(part, str)
        ]
        assert made.versions == 3 and words == ["one", "two", "three"]
        assert made.version(4).messages == made.version(1).messages
        assert all(isinstance(made.version(n).images()[0], ImagePart) for n in range(3))


def test_keys_are_short_and_printable() -> None:
    from unimm.data.sources.rows import row_key

    assert row_key({"id": "a\x1b[31mb"}, "row 1") == r"a\x1b[31mb"
    assert len(row_key({"id": "x" * 10_000}, "row 1")) == 200
    assert row_key({"id": None, "key": 7}, "row 1") == "7" and row_key([], "row 1") == "row 1"
    assert isinstance(find_file(Path("root"), Blob("a")), Blob)
