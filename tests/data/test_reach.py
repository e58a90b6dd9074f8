"""Data reaches no file outside its folder unless the user says so, and what is no regular file is no image."""

from __future__ import annotations

import json
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data import forms
from unimm.data.sources import BadRecord, Reading, Source, open_source
from unimm.data.sources.reach import Reach, walk
from unimm.errors import UserError, UserNote
from unimm.training.tokenizer.images import ImageFiles

OUTSIDE = r"outside .*; allow_outside: true \(--allow-outside\)"
FREE = Reading(allow_outside=True)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image that lies outside the data."""
    path = tmp_path / "private" / "secret.png"
    path.parent.mkdir()
    path.write_bytes(forms.encoded(forms.SCENES[0]))
    return path


def by_name(folder: Path, secret: Path) -> str:
    return "../private/secret.png"


def by_path(folder: Path, secret: Path) -> str:
    return str(secret)


def by_url(folder: Path, secret: Path) -> str:
    return f"file://{secret}"


def by_link(folder: Path, secret: Path) -> str:
    (folder / "innocent.png").symlink_to(secret)
    return "innocent.png"


def by_linked_folder(folder: Path, secret: Path) -> str:
    (folder / "more").symlink_to(secret.parent)
    return "more/secret.png"


WAYS: list[Callable[[Path, Path], str]] = [by_name, by_path, by_url, by_link, by_linked_folder]


def listed(folder: Path, name: str) -> Source:
    (folder / "data.jsonl").write_text(json.dumps({"image": name, "text": "a"}))
    return open_source(folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["jsonl", "csv", "json", "parquet", "datasets", "part"])
def test_no_way_leads_out(way: Callable[[Path, Path], str], form: str, tmp_path: Path, secret: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    name = way(folder, secret)
    row = {"image": name, "text": "a"}
    if form == "jsonl":
        (folder / "data.jsonl").write_text(json.dumps(row))
    elif form == "json":
        (folder / "data.json").write_text(json.dumps([row]))
    elif form == "csv":
        (folder / "data.csv").write_text(f"image,text\n{name},a\n")
    elif form == "part":
        turns = [
            {"role": "user", "content": [{"type": "image", "image": {"path": name}}]},
            {"role": "assistant", "content": "a"},
        ]
        (folder / "data.jsonl").write_text(json.dumps({"messages": turns}))
    elif form == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pa.Table.from_pylist([{"image": {"bytes": None, "path": name}, "text": "a"}])
        pq.write_table(table, folder / "0.parquet")
    else:
        pytest.importorskip("datasets").Dataset.from_list([row]).save_to_disk(str(folder))
    with pytest.raises(BadRecord, match=OUTSIDE):
        open_source(folder)[0]
    assert open_source(folder, FREE)[0].images()[0].image().size == (64, 64)


def test_images_given_by_the_user_are_the_folder_that_counts(tmp_path: Path, secret: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "secret.png", "text": "a"}))
    reading = Reading(images=str(secret.parent))
    assert open_source(tmp_path / "rows.jsonl", reading)[0].images()[0].image().size == (64, 64)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "../rows.jsonl", "text": "a"}))
    with pytest.raises(BadRecord, match=OUTSIDE):
        open_source(tmp_path / "rows.jsonl", reading)[0]


def test_links_within_the_folder_are_no_matter(tmp_path: Path, secret: Path) -> None:
    (secret.parent / "same.png").symlink_to("secret.png")
    assert listed(secret.parent, "same.png")[0].images()[0].image().size == (64, 64)
    (tmp_path / "shortcut").symlink_to(secret.parent)
    assert open_source(tmp_path / "shortcut")[0].images()[0].image().size == (64, 64)


def test_a_folder_of_images_stays_inside(tmp_path: Path, secret: Path) -> None:
    folder = forms.image_folder(tmp_path / "data", 2)
    secret.with_suffix(".txt").write_text("private words")
    (folder / "a.png").symlink_to(secret)
    (folder / "a.txt").write_text("words")
    (folder / "b.png").write_bytes(secret.read_bytes())
    (folder / "b.txt").symlink_to(secret.with_suffix(".txt"))
    source = open_source(folder)
    for key in ("a.png", "b.png"):
        index = next(i for i, path in enumerate(source.images) if path.name == key)  # type: ignore[attr-defined]
        with pytest.raises(BadRecord, match=OUTSIDE):
            source[index]
        assert open_source(folder, FREE)[index].images()[0].image().size == (64, 64)


def test_a_linked_folder_is_followed_or_named(tmp_path: Path, secret: Path) -> None:
    folder = forms.image_folder(tmp_path / "data", 2)
    secret.with_suffix(".txt").write_text("words")
    (folder / "more").symlink_to(secret.parent)
    (folder / "round").symlink_to(folder)
    with pytest.warns(UserNote, match="more: a link that leads out of .*, not followed; allow_outside: true"):
        assert len(open_source(folder)) == 2
    checked = open_source(folder, strict=False)
    assert [bad.file for bad in checked.broken] == [str(folder / "more")]
    assert len(open_source(folder, FREE)) == 3, "and no image twice, though a link leads round"
    with pytest.warns(UserNote, match="a link that leads out"):
        assert len(ImageFiles(str(folder))) == 2
    assert len(ImageFiles(str(folder), allow_outside=True)) == 3


def test_a_link_to_a_hidden_folder_inside_is_followed(tmp_path: Path) -> None:
    forms.image_folder(tmp_path / ".store", 2)
    (tmp_path / "cats").symlink_to(".store")
    assert [open_source(tmp_path)[i].key for i in range(2)] == ["cats/000.png", "cats/001.png"]


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl", "state", "split"])
def test_lists_and_tables_of_the_folder_stay_inside_too(kind: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    if kind in ("tar", "parquet"):
        made = (forms.shards if kind == "tar" else forms.parquet)(elsewhere, 2)
        folder.mkdir()
        target = sorted(made.glob(f"*.{kind}"))[0]
        (folder / target.name).symlink_to(target)
    elif kind == "jsonl":
        forms.image_list(elsewhere, 2)
        folder.mkdir()
        (folder / "metadata.jsonl").symlink_to(elsewhere / "metadata.jsonl")
    else:
        forms.saved(elsewhere, 2)
        if kind == "split":
            folder.mkdir()
            (folder / "dataset_dict.json").write_text('{"splits": ["../elsewhere"]}')
        else:
            forms.saved(folder, 2)
            state = json.loads((folder / "state.json").read_text())
            state["_data_files"] = [{"filename": "../elsewhere/data-00000-of-00001.arrow"}]
            (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=OUTSIDE):
        open_source(folder)
    assert len(open_source(folder, FREE)) > 0


def test_a_snapshot_in_the_cache_of_a_hub_is_whole(tmp_path: Path) -> None:
    """Its files are links to the blobs beside it."""
    repository = tmp_path / "datasets--owner--name"
    made = forms.image_list(tmp_path / "made", 2)
    (repository / "blobs").mkdir(parents=True)
    for path in sorted(made.rglob("*.*")):
        target = repository / "snapshots" / "abc" / path.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        (repository / "blobs" / path.name).write_bytes(path.read_bytes())
        target.symlink_to(os.path.relpath(repository / "blobs" / path.name, target.parent))
    source = open_source(repository / "snapshots" / "abc")
    assert [source[i].images()[0].image().size for i in range(2)] == [(64, 64)] * 2
    (tmp_path / "datasets--owner--other").mkdir()
    assert not Reach(repository / "snapshots" / "abc").holds(tmp_path / "datasets--owner--other" / "x")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_what_is_no_file_is_no_image_and_hangs_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = forms.image_folder(tmp_path / "data", 1)
    path = folder / "a.png"
    (folder / "a.txt").write_text("words")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(folder)  # a socket's name may have 107 bytes only
        socket.socket(socket.AF_UNIX).bind("a.png")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    source = open_source(folder, FREE)
    keys = [path.name for path in source.images]  # type: ignore[attr-defined]
    assert keys == (["000.png"] if kind == "folder" else ["000.png", "a.png"])
    if kind != "folder":
        with pytest.raises(UserError, match="expected a regular file"):
            source[1].images()[0].image()


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jsonl", "a.json", "a.csv"])
def test_a_pipe_is_no_source(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="a pipe; expected a regular file"):
        open_source(tmp_path / name)


@pytest.mark.parametrize("name", ["a\0b.png", "a\ud800.png", "x" * 5000, "a/" * 2000 + "b.png", "folder/"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    source = listed(tmp_path, name)
    with pytest.raises(UserError) as caught:
        source[0].images()[0].image()
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()


def test_a_walk_ends_where_links_go_round(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "b" / "same").symlink_to("../b")
    (tmp_path / "a" / "b" / "x.png").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(walk(Reach(tmp_path), pytest.fail)) == [tmp_path / "a" / "b" / "x.png"]
