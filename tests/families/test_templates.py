"""Turns follow a checkpoint's own chat template, token by token as transformers' processors write it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import Emu3Processor, JanusProcessor

import unimm
from tests.families.emu3_checkpoints import emu3, original
from tests.families.janus_checkpoints import janus
from tests.families.templates import (
    CHATML,
    CONVERSATIONS,
    EDITED,
    HOSTILE,
    INSTRUCT,
    PUBLISHED_JANUS,
    TEXTS_ONLY,
    turn,
)
from unimm.data.samples import SampleBuilder
from unimm.errors import UserError
from unimm.families.convert import convert
from unimm.families.emu3 import SYSTEM
from unimm.families.source import Checkpoint
from unimm.models.layout import IGNORED
from unimm.preferences.data import read_preferences
from unimm.preferences.samples import PairSamples
from unimm.processing.messages import Blob, ImagePart, Message, Record
from unimm.processing.processor import UniMMProcessor, grids_of
from unimm.processing.rows import Row

FILE = "chat_template.jinja"
ANSWER = "a red one"
Edit = Callable[[str, str], Path]


def of(folder: Path) -> UniMMProcessor:
    return Checkpoint(folder).processor


def record(messages: list[dict[str, Any]]) -> Record:
    """The same conversation as data has it."""
    image = ImagePart(Blob("0.png"))
    return Record(
        "conversation",
        tuple(
            Message(
                m["role"], tuple(image if part["type"] == "image" else part["text"] for part in m["content"])
            )
            for m in messages
        ),
    )


def shown(messages: list[dict[str, Any]]) -> list[Image.Image]:
    count = sum(part["type"] == "image" for m in messages for part in m["content"])
    return [Image.new("RGB", (20 + 6 * n, 20), (40 * n, 9, 99)) for n in range(count)]


def with_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    images = iter(shown(messages))
    return [
        {
            **m,
            "content": [
                part if part["type"] == "text" else {**part, "image": next(images)} for part in m["content"]
            ],
        }
        for m in messages
    ]


def reference(theirs: Any, messages: list[dict[str, Any]], asks: bool = True) -> list[int]:
    out = theirs.apply_chat_template(
        with_images(messages),
        tokenize=True,
        return_dict=True,
        add_generation_prompt=asks,
        return_tensors="pt",
    )
    return list(out["input_ids"][0].tolist())


def written(ours: UniMMProcessor, messages: list[dict[str, Any]]) -> Row:
    """The row of a conversation and an answer to it."""
    images = shown(messages)
    grids = grids_of(ours.look(images))
    ours.conversation.context = 1000  # more than the small models have
    builder = SampleBuilder(ours, None, lambda pixels: pixels)
    return builder.row(record([*messages, turn("assistant", ANSWER)]), grids, [])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    janus(folder / "janus")
    emu3(folder / "emu3")
    return folder


@pytest.fixture
def edit(published: Path, tmp_path: Path) -> Edit:
    """Gives the folder of a family's checkpoint with another template."""

    def edited(family: str, template: str) -> Path:
        folder = tmp_path / family
        shutil.copytree(published / family, folder, dirs_exist_ok=True)
        (folder / FILE).write_text(template)
        return folder

    return edited


JANUS = {
    "published": PUBLISHED_JANUS.replace("EOS", "<eos>"),
    "chatml": CHATML,
    "instruct": INSTRUCT,
    "edited": EDITED,
}


@pytest.mark.parametrize(
    ("template", "default"),
    [("published", True), ("chatml", False), ("chatml", True), ("instruct", False), ("edited", True)],
)
def test_janus(edit: Edit, template: str, default: bool) -> None:
    folder = edit("janus", JANUS[template].replace("IMAGE", "<image_placeholder>"))
    options = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(
        json.dumps({**options, "use_default_system_prompt": default})
    )
    follows(of(folder), JanusProcessor.from_pretrained(folder))


@pytest.mark.parametrize("template", [CHATML, EDITED], ids=["chatml", "edited"])
def test_emu3(edit: Edit, template: str) -> None:
    folder = edit("emu3", template.replace("IMAGE", "<image>"))
    theirs = Emu3Processor.from_pretrained(folder)
    theirs.downsample_ratio = 4  # fixed at 8 in its code
    follows(of(folder), theirs)


def follows(ours: UniMMProcessor, theirs: Any) -> None:
    """Check every conversation: a question alone, the prompt in a record, and a whole record."""
    eos = ours.tokenizer.eos_token_id
    for name, messages in CONVERSATIONS.items():
        expected = reference(theirs, messages)
        if len(messages) == 1:
            question = messages[0]["content"][-1]["text"]
            asked = ours([question], [shown(messages)])["input_ids"][0].tolist()
            assert asked == expected, name
        row = written(ours, messages)
        assert row.ids[: len(expected)] == expected, name
        labelled = [label for label in row.labels[len(expected) :] if label != IGNORED]
        assert labelled == row.ids[len(expected) : len(expected) + len(labelled)]
        assert ours.tokenizer.decode(labelled, skip_special_tokens=True).strip() == ANSWER
        whole = reference(theirs, [*messages, turn("assistant", ANSWER)], asks=False)
        ended = (
            row.ids[-1] == eos and row.ids[:-1] == whole[: len(row.ids) - 1]
        )  # where the template writes no end
        assert row.ids == whole or ended, name
        ends = sum(message["role"] == "assistant" for message in messages) + 1
        stop = ours.tokenizer.convert_tokens_to_ids(ours.turns.end) if ours.turns.end else eos
        assert row.labels.count(stop) == ends and ours.end_tokens[0] == stop, name


def test_answers_to_compare_are_written_as_those_to_learn(edit: Edit, tmp_path: Path) -> None:
    um = unimm.load(edit("janus", EDITED.replace("IMAGE", "<image_placeholder>")), device="cpu")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "what is this?", "chosen": ANSWER, "rejected": "a blue one"}))
    pair = PairSamples(read_preferences(path), um.processor, um.model)[0]
    row = written(um.processor, CONVERSATIONS["one turn"])
    assert pair["chosen"]["row"] == row


def test_a_drawing_opens_as_the_template_does(edit: Edit) -> None:
    folder = edit("janus", EDITED.replace("IMAGE", "<image_placeholder>"))
    theirs = JanusProcessor.from_pretrained(folder)
    text = theirs.apply_chat_template([turn("user", "a red apple")], add_generation_prompt=True)
    expected = theirs(text=text, generation_mode="image", return_tensors="pt")["input_ids"][0]
    assert of(folder).drawing_ids("a red apple") == expected.tolist()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.json", {"chat_template": EDITED}),
        ("processor_config.json", {"chat_template": EDITED}),
        ("tokenizer_config.json", {"chat_template": EDITED}),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": EDITED}]},
        ),
        ("processor_config.json", {"chat_template": {"default": EDITED, "tools": "x"}}),
    ],
)
def test_wherever_it_lies(edit: Edit, file: str, content: dict[str, Any]) -> None:
    folder = edit("emu3", "")
    (folder / FILE).unlink()
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **content}).replace("IMAGE", "<image>"))
    ids = of(folder).question_ids("what?", [])
    assert of(folder).tokenizer.decode(ids).endswith("Guest> what?\n--\nPainter>")


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        (
            "chat_template.json",
            {"chat_template": 5},
            "chat_template: expected a text, or texts by name, got int",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "tools", "template": "x"}]},
            "a template called default",
        ),
        ("processor_config.json", {"chat_template": {"default": None}}, "expected a text, or texts by name"),
        ("processor_config.json", {"chat_template": ["x"]}, "expected a text, or texts by name, got list"),
    ],
)
def test_what_is_no_template_is_named(edit: Edit, file: str, content: dict[str, Any], line: str) -> None:
    folder = edit("emu3", "")
    (folder / FILE).unlink()
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{file}: .*{line}"):
        of(folder)


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_template_is_one_line(edit: Edit, fault: str) -> None:
    folder = edit("janus", HOSTILE[fault])
    with pytest.raises(UserError, match=FILE) as caught:
        unimm.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


CANNOT = {
    "leaves out images": (EDITED.replace("'IMAGE'", "''"), "images as <image_placeholder>"),
    "images last": (
        "{% for m in messages %}{{ m['role'] + ':' }}{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}"
        "{% endfor %}{% for p in m['content'] if p['type'] == 'image' %}IMAGE{% endfor %}{{ '\n' }}{% endfor %}",
        "puts images where they cannot be followed",
    ),
    "numbered images": (
        EDITED.replace("'IMAGE'", "'IMAGE' + loop.index | string"),
        "cannot be followed, between",
    ),
    "numbered turns": (
        EDITED.replace("'\n--\n'", "'\n' + loop.index | string"),
        "cannot be followed, between",
    ),
    "capitals": (EDITED.replace("part['text'] if", "part['text'] | upper if"), "changes what is said"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_followed_is_named(edit: Edit, case: str) -> None:
    template, line = CANNOT[case]
    folder = edit("janus", template.replace("IMAGE", "<image_placeholder>"))
    with pytest.raises(UserError, match=rf"{FILE}: .*{line}"):
        _ = Checkpoint(folder).config


def test_a_template_of_texts_alone_has_images_where_the_family_has_them(edit: Edit) -> None:
    ours = of(edit("janus", TEXTS_ONLY))
    text = ours.tokenizer.decode(ours.question_ids("what is this?", 2))
    image = ours.tokenizer.decode(ours.ids(*ours.layout.understanding(*ours.layout.grid)))
    assert text.endswith(f"user: {image}\n\n{image}\nwhat is this?\nassistant:")


def test_faults_in_words_around_turns(edit: Edit) -> None:
    never_asks = EDITED.replace("'Painter>' if add_generation_prompt else ''", "''")
    ours = of(edit("emu3", never_asks.replace("IMAGE", "<image>")))
    assert ours.tokenizer.decode(ours.question_ids("what?", [])).endswith("what?\n--\nPainter>")
    row = written(ours, CONVERSATIONS["one turn"])
    assert ours.tokenizer.decode(row.ids).endswith("Painter> a red one<|extra_204|>")

    twice = "{{ bos_token }}{{ bos_token }}" + EDITED
    ours = of(edit("janus", twice.replace("IMAGE", "<image_placeholder>")))
    for ids in (ours.question_ids("what?"), ours.drawing_ids("a red apple")):
        assert ids[0] == ours.bos and ids.count(ours.bos) == 1

    no_system = EDITED.replace(
        "{{- {", "{{- raise_exception('no rules') if message['role'] == 'system' else {"
    )
    ours = of(edit("janus", no_system.replace("IMAGE", "<image_placeholder>")))
    assert written(ours, CONVERSATIONS["several turns"]).ids
    with pytest.raises(UserError, match=r"chat_template.jinja: .* no system.text"):
        written(ours, CONVERSATIONS["a system's message"])


def test_the_familys_system_message_stays_where_a_template_has_none(edit: Edit) -> None:
    plain = EDITED.replace("{{- 'The talk of a painter.\n' -}}", "")
    texts = []
    for template in (plain, EDITED):
        ours = of(edit("emu3", template.replace("IMAGE", "<image>")))
        texts.append(ours.tokenizer.decode(ours.question_ids("what?", [])[1:]))
    assert texts[0] == f"Rule> {SYSTEM}\n--\nGuest> what?\n--\nPainter>"
    assert texts[1] == "The talk of a painter.\nGuest> what?\n--\nPainter>"


@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_saved_converted_and_edited_models_keep_it(edit: Edit, tmp_path: Path, family: str) -> None:
    mark = "<image>" if family == "emu3" else "<image_placeholder>"
    folder = edit(family, EDITED.replace("IMAGE", mark))
    um = unimm.load(folder, device="cpu")
    grids = [(2, 3)] * 2
    ids, drawn = um.processor.question_ids("what?", grids), um.processor.drawing_ids("a red apple", (2, 3))
    um.save(tmp_path / "saved")
    convert(folder, tmp_path / "ours", "unimm")
    convert(tmp_path / "saved", tmp_path / "theirs", "transformers")
    for name in ("saved", "ours", "theirs"):
        assert (tmp_path / name / FILE).read_text() == EDITED.replace("IMAGE", mark)
        again = of(tmp_path / name)
        assert again.question_ids("what?", grids) == ids and again.drawing_ids("a red apple", (2, 3)) == drawn
    path = tmp_path / "saved" / FILE
    path.write_text(path.read_text().replace("Guest", "Visitor"))
    text = um.processor.tokenizer.decode(of(tmp_path / "saved").question_ids("what?", grids))
    assert "Visitor> " in text and "Guest" not in text
    with pytest.raises(UserError, match="original layout writes turns as"):
        convert(tmp_path / "saved", tmp_path / "original", "original")
    assert not (tmp_path / "original").exists()


def test_the_originals_format_is_followed(edit: Edit, tmp_path: Path) -> None:
    folder = tmp_path / "original"
    original(folder, emu3(tmp_path / "new"))
    format_ = "Be kind. USER: {image_prompt}, {text_prompt}! ASSISTANT:"
    (folder / "processor_config.json").write_text(json.dumps({"chat_template": format_}))
    ours = of(folder)
    text = ours.tokenizer.decode(ours.question_ids("what?", [(2, 3)]))
    assert text.startswith("<|extra_203|>Be kind. USER: <|image start|>2*3")
    assert text.endswith("<|image end|>, what?! ASSISTANT:")
    (folder / "processor_config.json").write_text(
        json.dumps({"chat_template": format_.replace("{image", "{picture")})
    )
    with pytest.raises(
        UserError, match=r"processor_config.json: chat_template: expected \{image_prompt\}, then"
    ):
        of(folder)
