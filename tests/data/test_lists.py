"""Lists of records: CSV, COCO, JSON beside each image, and which of a folder's files is the list."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import forms
from unimm.data.sources import BadRecord, Reading, Source, expand, open_source
from unimm.errors import UserError, UserNote

PNG = forms.encoded(forms.SCENES[0])


def texts(source: Source) -> list[object]:
    return [source[i].messages[-1].parts[0] for i in range(len(source))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\n0.png,a cat\n1.png,a dog\n"),
        ("metadata.csv", "\ufefffile_name,text\r\n0.png,a cat\r\n1.png,a dog\r\n"),
        ("metadata.csv", "file_name;text\n0.png;a cat\n\n1.png;a dog"),
        ("captions.csv", 'text,image,id\n"a cat",0.png,7\n"a dog",1.png,8\n'),
        ("images.tsv", "photo\tcaption\tsource\n0.png\ta cat\t\n1.png\ta dog\tx\n"),
    ],
)
def test_csv_beside_its_images(name: str, content: str, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(forms.encoded(forms.SCENES[number]))
    (tmp_path / name).write_bytes(content.encode())
    source = open_source(tmp_path)
    assert source.form == "csv" and texts(source) == ["a cat", "a dog"]
    assert np.array_equal(np.asarray(source[1].images()[0].image()), forms.SCENES[1].render())
    assert source[0].key == ("7" if "id" in content else "row 0")
    drawn = open_source(tmp_path / name, Reading("text_to_image"))
    assert drawn[1].kind == "text_to_image"


def test_csv_of_questions_with_line_ends_and_images_in_cells(tmp_path: Path) -> None:
    cell = base64.b64encode(PNG).decode()
    (tmp_path / "a.csv").write_text(f'image,question,answer\n{cell},"one, or\ntwo?","the ""first"""\n,q,a\n')
    source = open_source(tmp_path / "a.csv")
    assert len(source) == 2 and source[0].messages[0].parts[1] == "one, or\ntwo?"
    assert source[0].messages[1].parts == ('the "first"',) and source[0].images()[0].image().size == (
        64,
        64,
    )
    assert source[1].kind == "text"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "its first line holds no names of columns"),
        (b"a,b\n1,2\n", "of unknown form; expected images and texts, but its first line says: a, b"),
        (b"text,text\n1,2\n", "two columns are called text"),
        (b'text,id\n"open,2\n', "line 2: unexpected end of data"),
        ("text\na".encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b"text\n\xff\n", "not a text in UTF-8"),
    ],
)
def test_csv_that_cannot_be_read_is_one_line(content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.csv: {line}"):
        open_source(tmp_path / "a.csv")


def test_a_row_of_too_many_cells_is_bad_and_the_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id\na,1\nb,2,3\nc\n")
    source = open_source(tmp_path / "a.csv")
    with pytest.raises(BadRecord, match=r"row 1: 3 cells, but 2 columns"):
        source[1]
    assert (source[0].key, source[2].messages[0].parts) == ("1", ("c",))


def coco(folder: Path) -> Path:
    """COCO's captions of two images, one of which has none."""
    for number in range(2):
        (folder / f"{number:012d}.png").write_bytes(forms.encoded(forms.SCENES[number]))
    document = {
        "info": {},
        "images": [{"id": number, "file_name": f"{number:012d}.png"} for number in range(2)],
        "annotations": [
            {"image_id": 0, "id": 5, "caption": "one"},
            {"image_id": 0, "id": 6, "caption": "two"},
        ],
    }
    (folder / "captions_train2017.json").write_text(json.dumps(document))
    return folder / "captions_train2017.json"


def test_coco_gives_each_image_its_captions(tmp_path: Path) -> None:
    source = open_source(coco(tmp_path))
    first = source[0]
    assert (first.key, first.versions) == ("0", 2) and first.version(1).messages[1].parts == ("two",)
    assert np.array_equal(np.asarray(first.images()[0].image()), forms.SCENES[0].render())
    with pytest.raises(BadRecord, match="text: missing"):
        source[1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}, "annotations without a caption"),
        ({"annotations": [3]}, "annotations without a caption"),
        ({"annotations": 3}, "expected lists of images and annotations"),
        ({"images": [{"id": 1}]}, "images without a file_name"),
        ({"images": None}, "expected lists of images and annotations"),
    ],
)
def test_other_annotations_are_named(changes: dict[str, object], line: str, tmp_path: Path) -> None:
    path = coco(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=line):
        open_source(path)


def test_json_beside_each_image(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(forms.encoded(forms.SCENES[number]))
    (tmp_path / "0.json").write_text(json.dumps({"caption": "a cat", "width": 64}))
    (tmp_path / "1.json").write_text(json.dumps({"question": "q", "answer": "a"}))
    (tmp_path / "2.json").write_text("{")
    source = open_source(tmp_path)
    assert [source[i].kind for i in range(2)] == ["image_to_text"] * 2
    assert source[0].messages[1].parts == ("a cat",) and source[1].messages[0].parts[1] == "q"
    assert np.array_equal(np.asarray(source[1].images()[0].image()), forms.SCENES[1].render())
    with pytest.raises(BadRecord, match=r"2\.json: 2\.png: not JSON"):
        source[2]


def test_images_of_every_suffix_in_folders(tmp_path: Path) -> None:
    image = Image.fromarray(forms.SCENES[0].render())
    for suffix, form in {
        "avif": "AVIF",
        "jfif": "JPEG",
        "JPG": "JPEG",
        "webp": "WEBP",
        "tiff": "TIFF",
    }.items():
        image.save(tmp_path / f"{suffix}.{suffix}", form)
        (tmp_path / f"{suffix}.txt").write_text(suffix)
    source = open_source(tmp_path)
    assert sorted(texts(source)) == ["JPG", "avif", "jfif", "tiff", "webp"]  # type: ignore[type-var]
    assert {source[i].images()[0].image().size for i in range(len(source))} == {(64, 64)}


def test_splits_of_lists(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    with pytest.warns(UserNote, match="has the splits test, train; train is read; name another with split"):
        assert texts(open_source(tmp_path)) == ["train"]
    assert texts(open_source(tmp_path, Reading(split="test"))) == ["test"]
    (tmp_path / "train-2.jsonl").touch()
    with pytest.warns(UserNote), pytest.raises(UserError, match="several lists"):
        open_source(tmp_path)


@pytest.mark.parametrize("form", ["list", "folder"])
def test_splits_of_folders_of_images(form: str, tmp_path: Path) -> None:
    make = forms.image_list if form == "list" else forms.image_folder
    counts = {"train": 3, "test": 2}
    for split, count in counts.items():
        make(tmp_path / split, count)
    with pytest.warns(UserNote, match="has the splits test, train; train is read"):
        assert len(open_source(tmp_path)) == 3
    assert len(open_source(tmp_path, Reading(split="test"))) == 2
    with pytest.raises(UserError, match="has no split dev; it has test, train"):
        open_source(tmp_path, Reading(split="dev"))
    if form == "folder":  # a folder of another name: these are kinds of images, such as trains
        forms.image_folder(tmp_path / "cats", 1)
        assert len(open_source(tmp_path)) == 6


def test_a_byte_order_mark_of_a_list_is_not_its_first_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode("utf-8-sig"))
    (tmp_path / "a.json").write_bytes('[{"text": "a"}, {"text": "b"}]'.encode("utf-16"))
    for name in ("a.jsonl", "a.json"):
        assert texts(open_source(tmp_path / name)) == ["a", "b"]
    (tmp_path / "b.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16; save it as UTF-8"):
        open_source(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    "pattern", ["{0..99999999999}.tar", "{0..1000000}.tar", "a{000..999999999999999999}.parquet"]
)
def test_a_range_of_too_many_files_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=r"a range of \d+ files, more than 1000000"):
        expand(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "{5..1}.tar",
        "[.tar",
        "a\0*.tar",
        "{0..}.tar",
        "{0..99999999999999999999}.tar",
        "x" * 5000,
        "a/" * 3000,
    ],
)
def test_a_pattern_of_nothing_is_named(pattern: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_source(pattern)


def test_the_files_that_a_shell_makes_of_a_pattern(tmp_path: Path) -> None:
    folder = forms.shards(tmp_path, 6)
    names = [str(path) for path in sorted(folder.glob("*.tar"))]
    whole = open_source(f"{folder}/{{000..001}}.tar")
    several = open_source(names)
    assert [several[i].key for i in range(6)] == [whole[i].key for i in range(6)]
    assert several.location == f"{names[0]} … {names[1]} (2 files)"
    with pytest.raises(UserError, match="2 files; only tars and Parquet files are read several at once"):
        open_source([names[0], str(folder)])
    unlike = [names[0], os.path.relpath(names[1])]
    again = open_source(unlike)
    assert [again[i].key for i in range(6)] == [whole[i].key for i in range(6)]
    with pytest.raises(UserError, match="no files are named"):
        open_source([])
