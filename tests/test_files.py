"""Files are written whole or not at all, through no link and over nothing but files; reading never blocks."""

from __future__ import annotations

import io
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unimm.errors import UserError
from unimm.files import (
    append,
    atomic_write,
    make_folder,
    open_append,
    open_regular,
    read_json,
    read_text,
    remove_leftovers,
    write_json,
)
from unimm.images import read_image

ODD = ("link", "dangling", "link to a folder", "folder", "pipe", "socket", "device")


def make_odd(kind: str, path: Path, outside: Path) -> None:
    """Put something that is no regular file at `path`; links lead to `outside`."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root may make devices")
    elif kind == "link to a folder":
        outside.mkdir()
        path.symlink_to(outside)
    else:
        if kind == "link":
            outside.write_text("theirs")
        path.symlink_to(outside)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


@pytest.mark.parametrize("name", ["config.json", "a.png", "train-0.tar", "rows.parquet", "notes.txt"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    line = f"{tmp_path / name}: a git-lfs pointer, not the file itself; run `git lfs pull` in its folder"
    for read in (open_regular, read_json, read_text):
        with pytest.raises(UserError) as caught:
            read(tmp_path / name)
        assert str(caught.value) == line


def test_so_is_one_that_stands_for_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(POINTER)
    for image in (tmp_path / "a.png", POINTER, io.BytesIO(POINTER)):
        with pytest.raises(UserError, match=": a git-lfs pointer, not the file itself"):
            read_image(image)


def test_a_text_about_pointers_is_read(tmp_path: Path) -> None:
    text = "a pointer begins with: " + POINTER.decode()
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(POINTER.decode() + text * 100)  # no pointer is as long
    assert read_text(tmp_path / "a.txt") == text
    assert read_text(tmp_path / "b.txt").endswith(text)


# --- whole or not at all -----------------------------------------------------------------------------------


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_old_file_stays_on_error(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_is_said_and_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_text("old")
    with (
        pytest.raises(UserError, match=r"a\.bin: cannot be written \(No space left on device\)"),
        atomic_write(path),
        open("/dev/full", "wb") as full,  # every write to it fails as on a full disk
    ):
        full.write(b"x" * 100_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_system_errors_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        (tmp_path / "something else").read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["no/such/folder/a.txt", "."])
def test_unwritable_place_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be written"), atomic_write(tmp_path / name):
        pytest.fail("the block must not run")


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_mode_follows_the_umask_whatever_a_library_does(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600  # safetensors' own
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~current_umask()


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize(
    "message", ["I/O error: No space left (os error 28)", "File too large (os error 27)"]
)
def test_full_disk_in_the_words_of_a_library(tmp_path: Path, message: str) -> None:
    with pytest.raises(UserError, match=r"a\.bin: cannot be written \("), atomic_write(tmp_path / "a.bin"):
        raise Exception(message)  # as tokenizers does
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [1, 100, 251, 255])
def test_names_of_any_length_and_script(tmp_path: Path, length: int) -> None:
    for letter in ("a", "é"):
        path = tmp_path / (letter * max(1, length // len(letter.encode())))
        with atomic_write(path) as temporary:
            temporary.write_text("x")
        assert path.read_text() == "x"


# --- what stands in the way --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("write", ["atomic_write", "write_json", "append", "open_append"])
def test_only_regular_files_are_written_over(tmp_path: Path, kind: str, write: str) -> None:
    path, outside = tmp_path / "a.json", tmp_path / "outside"
    make_odd(kind, path, outside)
    before = os.lstat(path)
    with pytest.raises(UserError, match=r"a\.json: cannot be written \(it is a ") as caught:
        if write == "atomic_write":
            with atomic_write(path):
                pytest.fail("the block must not run")
        elif write == "write_json":
            write_json(path, {})
        elif write == "append":
            append(path, "line\n")
        else:
            open_append(path).close()
    assert "\n" not in str(caught.value)
    assert os.path.samestat(before, os.lstat(path))
    if kind == "link":
        assert outside.read_text() == "theirs"
    elif kind == "dangling":
        assert not outside.exists()
    assert not list(tmp_path.glob("*.unimm-writing"))


@pytest.mark.parametrize("name", ["a\0b", "a\udcff\ud800b"])
def test_impossible_names_are_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="not a name"), atomic_write(tmp_path / name):
        pytest.fail("the block must not run")
    with pytest.raises(UserError, match="not a name"):
        open_regular(tmp_path / name)


def test_lines_are_added(tmp_path: Path) -> None:
    append(tmp_path / "a.jsonl", "one\n")
    append(tmp_path / "a.jsonl", "two\n")
    with open_append(tmp_path / "a.jsonl") as file:
        file.write("three\n")
    assert (tmp_path / "a.jsonl").read_text() == "one\ntwo\nthree\n"


@pytest.mark.parametrize("kind", [kind for kind in ODD if kind not in ("folder", "dangling")])
def test_a_folder_is_made_through_no_link(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "run"
    root.mkdir()
    make_odd(kind, root / "samples", tmp_path / "outside")
    with pytest.raises(UserError, match=r"is in the way|is a link"):
        make_folder(root, "samples", "deep")
    assert not list((tmp_path / "outside").glob("*")) or kind == "link"


def test_a_folder_may_be_there_and_its_root_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")  # named by the user
    for _ in range(2):
        assert make_folder(tmp_path / "run", "samples", "deep").is_dir()
    assert (tmp_path / "real" / "samples" / "deep").is_dir()


# --- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device", "dangling", "link to a folder"])
@pytest.mark.parametrize("read", [open_regular, read_json])
def test_reading_takes_regular_files_and_never_waits(
    tmp_path: Path, kind: str, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "a.json"
    make_odd(kind, path, tmp_path / "outside")
    with pytest.raises(UserError, match=r"a\.json: (is a .*; expected a regular file|not found)") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_reading_follows_links(tmp_path: Path) -> None:
    make_odd("link", tmp_path / "a", tmp_path / "outside")
    with open_regular(tmp_path / "a") as file:
        assert file.read() == b"theirs"


# --- what a kill leaves ------------------------------------------------------------------------------------


def killed_in(write: Callable[[], None]) -> None:
    """Run `write` in a process of its own, which kills itself in it."""
    child = os.fork()
    if not child:
        try:
            write()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def half(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        (temporary.parent / ".tmpAb3").write_text("a library's own")
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_write_removes_what_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    killed_in(lambda: half(path))
    assert len(list(tmp_path.iterdir())) == 2
    assert path.read_text() == "old"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.txt", "b.tar.index", "n" * 250])
def test_leftovers_of_other_names_go_too(tmp_path: Path, name: str) -> None:
    killed_in(lambda: half(tmp_path / name))
    assert len(list(tmp_path.iterdir())) == 1
    write_json(tmp_path / "other.json", {})  # the first write of this process into this folder
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]
    killed_in(lambda: half(tmp_path / name))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_living_writer_keeps_its_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:  # as another process at the same time
            second.write_text("second")
        remove_leftovers(tmp_path)
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_links_that_bear_a_neighbours_name_are_left_alone(tmp_path: Path) -> None:
    data, outside = tmp_path / "data", tmp_path / "outside"
    data.mkdir(), outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    for slot, target in enumerate([outside, outside / "mine.txt", tmp_path / "none"]):
        (data / f".a.txt.{slot}.unimm-writing").symlink_to(target)
    with atomic_write(data / "a.txt") as temporary:
        temporary.write_text("new")
    assert (data / "a.txt").read_text() == "new"
    assert [path.name for path in outside.iterdir()] == ["mine.txt"]
    assert len(list(data.iterdir())) == 4
