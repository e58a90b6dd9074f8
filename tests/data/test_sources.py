"""Every form gives the same records; kinds, marks and turns map as they should; what is broken is named."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data import forms
from unimm.data.sources import BadRecord, ImagePart, Message, Reading, Record, open_source
from unimm.data.sources import tars as tar_module
from unimm.data.sources.rows import make_record
from unimm.errors import UserError

COUNT = 7
DRAWING = Reading(pairs="text_to_image")


@pytest.mark.parametrize("form", forms.PAIRS)
def test_every_form_of_pairs_gives_the_same_records(form: str, tmp_path: Path) -> None:
    source = open_source(forms.PAIRS[form](tmp_path / "data", COUNT))
    drawn = open_source(tmp_path / "data", DRAWING)
    assert len(source) == len(drawn) == COUNT
    order = list(range(COUNT))
    random.Random(0).shuffle(order)
    for i in order:
        record, scene = source[i], forms.SCENES[i]
        assert record.kind == "image_to_text"
        user, assistant = record.messages
        assert (user.role, assistant.role) == ("user", "assistant")
        assert assistant.parts == (scene.captions()[0],)
        assert np.array_equal(np.asarray(record.images()[0].image()), scene.render())
        assert drawn[i].kind == "text_to_image" and drawn[i].key == record.key
        assert drawn[i].messages[0] == Message("user", (scene.captions()[0],))
        assert drawn[i].images(draw=True) and not drawn[i].images(draw=False)
    assert len({source[i].key for i in range(COUNT)}) == COUNT
    with pytest.raises(IndexError):
        source[COUNT]


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_llava_conversations_keep_turns_and_images_in_place(name: str, tmp_path: Path) -> None:
    source = open_source(forms.llava(tmp_path, 4, name))
    assert [source[i].key for i in range(4)] == [f"scene-{i}" for i in range(4)]
    record = source[3]
    asked = forms.SCENES[3].questions()
    assert record.kind == "image_to_text"
    assert [message.role for message in record.messages] == ["user", "assistant"] * 2
    first, second, question = record.messages[0].parts
    assert question == asked[0].question
    for part, scene in zip((first, second), (forms.SCENES[3], forms.SCENES[4]), strict=True):
        assert isinstance(part, ImagePart) and not part.draw
        assert np.array_equal(np.asarray(part.image()), scene.render())
    assert record.messages[3].parts == (asked[1].answer,)


def record(row: object, reading: Reading | None = None) -> Record:
    """The record of a row whose images are bytes."""
    return make_record("k", row, lambda value: forms_blob(value), reading or Reading())


def forms_blob(value: object) -> object:
    from unimm.data.sources.lines import find_file

    return find_file(Path("root"), value)


@pytest.mark.parametrize(
    ("row", "kind", "shape"),
    [
        ({"text": "words"}, "text", [("assistant", "t")]),
        ({"image": "a.png", "caption": "words"}, "image_to_text", [("user", "s"), ("assistant", "t")]),
        (
            {"image": "a.png", "question": "q", "answer": "a"},
            "image_to_text",
            [("user", "st"), ("assistant", "t")],
        ),
        ({"question": "q", "answer": "a"}, "text", [("user", "t"), ("assistant", "t")]),
        (
            {"original_image": "a.png", "edit_prompt": "p", "edited_image": "b.png"},
            "image_text_to_image",
            [("user", "st"), ("assistant", "d")],
        ),
        (
            {"texts": ["one", None, "two"], "images": [None, "a.png", None]},
            "interleaved",
            [("assistant", "tdt")],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "see"}, {"type": "image", "image": "a.png"}],
                    },
                    {"role": "assistant", "content": "so"},
                    {"role": "user", "content": "and?"},
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "text": "here"}, {"type": "image", "image": "b.png"}],
                    },
                ]
            },
            "interleaved",
            [("system", "t"), ("user", "ts"), ("assistant", "t"), ("user", "t"), ("assistant", "td")],
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "image"}]},
                    {"role": "assistant", "content": "two"},
                ],
                "images": ["a.png", "b.png"],
            },
            "image_to_text",
            [("user", "ss"), ("assistant", "t")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "image": "a.png",
            },
            "image_to_text",
            [("user", "st"), ("assistant", "t")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "before <image> after"},
                    {"from": "gpt", "value": "<image>"},
                ],
                "images": ["a.png", "b.png"],
            },
            "image_text_to_image",
            [("user", "tst"), ("assistant", "d")],
        ),
    ],
)
def test_rows_map_to_kinds(row: dict[str, object], kind: str, shape: list[tuple[str, str]]) -> None:
    made = record(row)

    def letter(part: object) -> str:
        return "t" if isinstance(part, str) else "d" if isinstance(part, ImagePart) and part.draw else "s"

    assert made.kind == kind
    assert [(m.role, "".join(map(letter, m.parts))) for m in made.messages] == shape


def test_fields_rename_columns() -> None:
    made = record({"picture": "a.png", "alt": "words"}, Reading(fields={"image": "picture", "text": "alt"}))
    assert made.messages[1].parts == ("words",)
    assert made.images()[0].blob.path == "root/a.png"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ([1], "expected an object with columns, got list"),
        ({"picture": "a.png"}, r"text: missing, and no other form of data fits \(columns: picture\)"),
        ({"text": 3}, "text: expected a text, got int"),
        ({"text": " "}, "text: empty"),
        ({"image": 3, "text": "a"}, "image: expected the name of a file, got int"),
        ({"image": "https://a/b.png", "text": "a"}, "download it first"),
        ({"question": "a"}, "answer: missing"),
        ({"conversations": []}, "conversations: expected a list of turns"),
        (
            {"conversations": [{"from": "cat", "value": "a"}]},
            r"conversations\[0\].from: 'cat' is none of system",
        ),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: expected from and value"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "more <image> placeholders than images"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}], "images": ["a", "b"]},
            "2 images, but 1 <image>",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "nobody answers"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "video"}]}]},
            "expected text or image, got 'video'",
        ),
        ({"messages": [{"role": "assistant", "content": ""}]}, r"messages\[0\].content: empty"),
        ({"texts": ["a"], "images": []}, "texts: expected a list as long as images"),
        ({"output_image": "a.png"}, "instruction: missing"),
    ],
)
def test_rows_that_fit_no_form_say_why(row: object, line: str) -> None:
    with pytest.raises(UserError, match=line):
        record(row)


def test_a_bad_line_names_its_key_and_file_and_the_others_stay(tmp_path: Path) -> None:
    forms.image_list(tmp_path, 3)
    path = tmp_path / "metadata.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", "", json.dumps({"id": "x", "image": "0.png"}), lines[2]]))
    source = open_source(tmp_path)
    assert len(source) == 4
    with pytest.raises(BadRecord, match="line 2: not JSON") as caught:
        source[1]
    assert (caught.value.key, caught.value.file) == ("line 2", str(path))
    with pytest.raises(BadRecord, match="text: missing") as caught:
        source[2]
    assert caught.value.key == "x"
    assert source[3].messages[1].parts == (forms.caption(forms.SCENES[2]),)
    (tmp_path / "images" / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: no such file"):
        source[0].images()[0].image()


def test_the_index_of_a_tar_is_kept_and_made_anew_when_the_tar_changes(tmp_path: Path) -> None:
    folder = forms.shards(tmp_path, 6)
    index = folder / "000.tar.index"
    first = open_source(folder)[1].key
    written = index.stat().st_mtime_ns
    assert first == "00001" and len(open_source(folder)) == 6
    assert index.stat().st_mtime_ns == written, "an index that fits is used as it is"
    forms.write_tar(folder / "000.tar", {"a/b.c.0.png": b"", "new.txt": b"words"})
    again = open_source(folder)
    assert len(again) == 5 and index.stat().st_mtime_ns != written
    assert again[1].key == "new" and again[1].messages[0].parts == ("words",)
    index.write_bytes(b"garbage")
    assert open_source(folder)[1].key == "new"


def test_tars_need_no_place_for_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = forms.shards(tmp_path, 4)
    monkeypatch.setattr(tar_module, "index_file", lambda path: tmp_path / "nowhere" / f"{path.name}.index")
    tar_module._load.cache_clear()
    source = open_source(folder)
    assert [source[i].key for i in range(4)] == [f"{i:05d}" for i in range(4)]


def test_many_tars_are_opened_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = forms.shards(tmp_path, 6)
    counts, tars = folder / tar_module.COUNTS_FILE, sorted(folder.glob("*.tar"))
    keys = [open_source(folder)[i].key for i in range(6)]
    assert not counts.exists(), "few tars need no such file"
    monkeypatch.setattr(tar_module, "MANY", len(tars))
    assert len(open_source(folder)) == 6 and counts.exists()

    asked: list[Path] = []

    def noted(path: Path, keep: bool) -> int:
        asked.append(path)
        return count(path, keep)

    count = tar_module.count_samples
    monkeypatch.setattr(tar_module, "count_samples", noted)
    source = open_source(folder)
    assert [source[i].key for i in range(6)] == keys
    assert [source.locate(i) for i in range(6)] == [(i // 3, i % 3) for i in range(6)]  # type: ignore[attr-defined]
    assert not asked, "no index was opened to count"
    forms.write_tar(tars[0], {"new.txt": b"words"})
    assert len(open_source(folder)) == 4 and asked == [tars[0]], "a tar that has changed is counted again"
    assert len(open_source(folder)) == 4 and asked == [tars[0]]
    counts.write_bytes(b"garbage")
    assert len(open_source(folder)) == 4 and asked == [tars[0], *tars]
    tars[1].unlink()
    assert len(open_source(folder)) == 1


def test_tar_samples_take_their_json_and_their_images_in_order(tmp_path: Path) -> None:
    said = {
        "conversations": [{"from": "human", "value": "<image> <image> q"}, {"from": "gpt", "value": "a"}],
        "image": ["coco/x.jpg", "coco/y.jpg"],
    }
    images = {f"s.{number}.png": forms.encoded(forms.SCENES[number]) for number in (10, 2)}
    shown_one = {"role": "user", "content": [{"type": "image", "image": "1.png"}]}
    chat = {"messages": [shown_one, {"role": "assistant", "content": "yes"}]}
    path = forms.write_tar(
        tmp_path / "a.tar",
        {
            **images,
            "s.json": json.dumps(said).encode(),
            "t.0.png": b"",
            "t.1.png": forms.encoded(forms.SCENES[1]),
            "t.json": json.dumps(chat).encode(),
            "bad.json": b"[",
        },
    )
    source = open_source(path)
    shown = [np.asarray(image.image()) for image in source[0].images()]
    assert np.array_equal(shown[0], forms.SCENES[2].render()), "2 comes before 10"
    assert np.array_equal(shown[1], forms.SCENES[10].render())
    assert np.array_equal(np.asarray(source[1].images()[0].image()), forms.SCENES[1].render())
    with pytest.raises(BadRecord, match=r"a\.tar: bad: json: not JSON"):
        source[2]


@pytest.mark.parametrize("fault", ["cut", "garbage", "boundary", "words"])
def test_a_broken_shard_is_named(fault: str, tmp_path: Path) -> None:
    folder = forms.shards(tmp_path, 6)
    path = folder / "001.tar"
    data = path.read_bytes()
    if fault == "cut":
        path.write_bytes(data[:700])
    elif fault == "garbage":
        offset = 512 + (len(forms.encoded(forms.SCENES[3])) + 511) // 512 * 512
        path.write_bytes(data[:offset] + os.urandom(512) + data[offset + 512 :])
    elif fault == "boundary":
        path.write_bytes(data[: 512 + (len(forms.encoded(forms.SCENES[3])) + 511) // 512 * 512])
    else:
        path.write_bytes(b"no tar at all")
    with pytest.raises(UserError, match=r"001\.tar: ") as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    checked = open_source(folder, strict=False)
    assert len(checked) == 3 and [bad.file for bad in checked.broken] == [str(path)]


def test_a_range_of_shards_names_the_one_that_is_missing(tmp_path: Path) -> None:
    folder = forms.shards(tmp_path, 6)
    assert len(open_source(f"{folder}/{{000..001}}.tar")) == len(open_source(f"{folder}/*.tar")) == 6
    with pytest.raises(UserError, match=r"002\.tar: cannot be read \(No such file"):
        open_source(f"{folder}/{{000..002}}.tar")


def test_broken_tables_are_named(tmp_path: Path) -> None:
    folder = forms.parquet(tmp_path / "p", 6)
    (folder / "train-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"train-0\.parquet: not a whole Parquet file"):
        open_source(folder)
    assert len(open_source(folder, strict=False)) == 3
    saved = forms.saved(tmp_path / "d", 4)
    next(saved.glob("*.arrow")).write_bytes(b"")
    with pytest.raises(UserError, match="d: not a whole datasets folder"):
        open_source(saved)


def test_splits_of_a_datasets_folder(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_list([{"text": f"t{i}"} for i in range(5)])
    whole.train_test_split(2, shuffle=False).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match="has the splits train, test; say which with split"):
        open_source(tmp_path / "d")
    assert len(open_source(tmp_path / "d", Reading(split="test"))) == 2
    with pytest.raises(UserError, match="has no split dev; it has train, test"):
        open_source(tmp_path / "d", Reading(split="dev"))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("missing.json", None, r"missing\.json: no such file or folder"),
        ("a.csv", b"x", r"a\.csv: of unknown form; expected images"),
        ("a.tar.gz", b"x", "unpack it with gunzip"),
        ("a.json", b"{}", r"a\.json: expected a list of records, got dict"),
        ("a.json", b"[", r"a\.json: not JSON"),
    ],
)
def test_what_is_no_source_is_one_line(name: str, content: bytes | None, line: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line):
        open_source(tmp_path / name)


def test_folders_that_hold_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no data; expected images"):
        open_source(tmp_path)
    (tmp_path / "a.png").write_bytes(forms.encoded(forms.SCENES[0]))
    with pytest.raises(UserError, match="1 images, but no words; expected metadata"):
        open_source(tmp_path)
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(BadRecord, match=r"b\.png: b\.txt: missing beside the image"):
        open_source(tmp_path)[1]
