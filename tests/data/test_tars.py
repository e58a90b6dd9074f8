"""Tars as people make them, and as nobody should: samples stay whole, an index is checked, bombs are refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.data import forms
from unimm.data.sources import BadRecord, Message, Reading, open_source
from unimm.data.sources import tars as tar_module
from unimm.data.sources.tar_scan import scan_tar
from unimm.errors import UserError
from unimm.files import sweep

PNG = [forms.encoded(forms.SCENES[number]) for number in range(3)]


def words(source: Any) -> dict[str, str]:
    """The text of each record by its key."""
    return {source[i].key: source[i].messages[-1].parts[0] for i in range(len(source))}


def test_members_in_any_order_find_together(tmp_path: Path) -> None:
    """As `tar` writes a folder of which the system gives the names in no order."""
    files = {
        "b.txt": b"B",
        "a.png": PNG[0],
        "c.json": b'{"text": "C"}',
        "b.png": PNG[1],
        "a.txt": b"A",
        "c.png": PNG[2],
    }
    source = open_source(forms.write_tar(tmp_path / "a.tar", files))
    assert words(source) == {"b": "B", "a": "A", "c": "C"}
    shown = [np.asarray(source[i].images()[0].image()) for i in range(3)]
    for image, number in zip(shown, (1, 0, 2), strict=True):
        assert np.array_equal(image, forms.SCENES[number].render())


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"img.v1.png": 0, "img.v1.txt": b"A", "img.v2.png": 1, "img.v2.txt": b"B"}, {"img.v1": "A", "img.v2": "B"}),
        ({"v1.0/x.png": 0, "v1.0/x.txt": b"A"}, {"v1.0/x": "A"}),
        ({"a.png": 0, "a.txt": b"A", "a.b.png": 1, "a.b.txt": b"B"}, {"a": "A", "a.b": "B"}),
        ({"d.1.json": b'{"text": "A"}', "d.1.JPG": 0, "d.2.json": b'{"text": "B"}', "d.2.JPG": 1},
         {"d.1": "A", "d.2": "B"}),
        ({"s.0.png": 0, "s.1.png": 1, "s.txt": b"A"}, {"s": "A"}),
        ({"s.0.png": 0, "s.1.png": 1, "s.caption.txt": b"A"}, {"s": "A"}),
        ({"s.png": 0, "s.long.txt": b"A", "s.txt": b"B"}, {"s": "B"}),
        ({"t.1.txt": b"A", "t.2.txt": b"B"}, {"t.1": "A", "t.2": "B"}),
        ({"a.jfif": 0, "a.txt": b"A", "b.avif": 1, "b.txt": b"B"}, {"a": "A", "b": "B"}),
    ],
)  # fmt: skip
def test_dots_in_names_lose_nothing(files: dict[str, Any], wanted: dict[str, str], tmp_path: Path) -> None:
    members = {name: PNG[data] if isinstance(data, int) else data for name, data in files.items()}
    source = open_source(forms.write_tar(tmp_path / "a.tar", members))
    assert words(source) == wanted
    images = sum(len(source[i].images()) for i in range(len(source)))
    assert images == sum(isinstance(data, int) for data in files.values())


def test_numbers_of_any_length_are_in_order(tmp_path: Path) -> None:
    files = {"s.txt": b"A"} | {f"s.{number}.png": PNG[0] for number in ("10", "9" * 5000, "02", "1")}
    source = open_source(forms.write_tar(tmp_path / "a.tar", files))
    names = [image.blob.name.rpartition(": s.")[2][:6] for image in source[0].images()]
    assert names == ["1.png", "02.png", "10.png", "999999"]


def test_texts_of_which_none_is_the_one_are_bad(tmp_path: Path) -> None:
    files = {"s.png": PNG[0], "s.long.txt": b"A", "s.short.txt": b"B"}
    with pytest.raises(BadRecord, match=r"long\.txt, short\.txt: which of them counts\? name one \.txt"):
        open_source(forms.write_tar(tmp_path / "a.tar", files))[0]


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def test_a_name_that_stands_twice_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for text in (b"A", b"B"):
            add(tar, "a.png", PNG[0])
            add(tar, "a.txt", text)
        add(tar, "b.txt", b"words")
    source = open_source(path)
    with pytest.raises(BadRecord, match=r"a\.tar: a: png: stands twice under this name"):
        source[0]
    assert source[1].messages == (Message("assistant", ("words",)),)


def test_a_key_that_stands_twice_in_an_object_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "A", "text": "B"}\n{"text": "C"}\n')
    source = open_source(tmp_path / "a.jsonl")
    with pytest.raises(BadRecord, match="line 1: text: given twice in one object"):
        source[0]
    assert source[1].messages[0].parts == ("C",)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(tarfile.SYMTYPE, "/etc/hostname"), (tarfile.SYMTYPE, "b.png"), (tarfile.LNKTYPE, "/etc/hostname"),
     (tarfile.CHRTYPE, ""), (tarfile.FIFOTYPE, "")],
)  # fmt: skip
def test_members_that_are_no_files_are_bad(kind: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.png", type=kind, linkname=name)
        add(tar, "a.txt", b"A")
    with pytest.raises(BadRecord, match="a: png: a link or a device, not a file"):
        open_source(path)[0]


def test_a_hard_link_is_the_member_that_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "a.png", PNG[1])
        add(tar, "a.txt", b"A")
        add(tar, "b.png", type=tarfile.LNKTYPE, linkname="a.png")
        add(tar, "b.txt", b"B")
    source = open_source(path)
    assert np.array_equal(np.asarray(source[1].images()[0].image()), forms.SCENES[1].render())
    assert words(source) == {"a": "A", "b": "B"}


@pytest.mark.parametrize(
    "said", ["/etc/hostname", "../x.png", {"path": "/etc/hostname"}, {"bytes": "/etc/hostname"}]
)
def test_the_json_of_a_sample_names_no_file(said: Any, tmp_path: Path) -> None:
    row = {"image": said, "text": "a"}
    path = forms.write_tar(tmp_path / "a.tar", {"s.json": json.dumps(row).encode()})
    with pytest.raises(BadRecord, match=r"no such member of the sample|expected bytes or base64"):
        open_source(path, Reading(allow_outside=True))[0]


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_not_learnt(mark: str, tmp_path: Path) -> None:
    text, row = "ein Äpfel".encode(mark), json.dumps({"text": "ein Äpfel"}).encode(mark)
    source = open_source(forms.write_tar(tmp_path / "a.tar", {"a.txt": text, "b.json": row}))
    assert words(source) == {"a": "ein Äpfel", "b": "ein Äpfel"}
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(PNG[0])
    (tmp_path / "p" / "a.txt").write_bytes(text)
    assert words(open_source(tmp_path / "p")) == {"a.png": "ein Äpfel"}


# --- damaged and hostile tars -------------------------------------------------------------------------------


def headers(*members: tuple[str, bytes, int]) -> bytes:
    """A tar of headers that claim a size (base 256 where it is negative), and of no more data than 512 bytes each."""
    data = b""
    for name, kind, size in members:
        member = tarfile.TarInfo(name)
        member.type = kind
        block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block[:512]):06o}\0 ".encode()
        data += bytes(block[:512])
    return data + bytes(1024)


@pytest.mark.parametrize(
    "data",
    [
        headers(("a.txt", tarfile.REGTYPE, -512)),
        headers(("a.txt", tarfile.REGTYPE, -513)),
        headers(("x", tarfile.XHDTYPE, -512), ("a.txt", tarfile.REGTYPE, 0)),
        headers(("x", tarfile.XHDTYPE, 1 << 40)),
        headers(("x", tarfile.GNUTYPE_LONGNAME, 1 << 40)),
        headers(("x", tarfile.XGLTYPE, 1 << 30)),
        headers(*[("x", tarfile.XHDTYPE, 0)] * 3000),
        headers(("a.txt", tarfile.REGTYPE, 1 << 50)),
        headers(("a.txt", tarfile.GNUTYPE_SPARSE, 0))[:512] + b"\xff" * 1024,
    ],
    ids=["back", "back unaligned", "negative attributes", "attributes", "long name", "global", "nested", "beyond",
         "sparse"],
)  # fmt: skip
def test_hostile_headers_are_refused_in_a_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar: (not a whole tar|damaged or cut short)") as caught:
        scan_tar(path)
    assert "\n" not in str(caught.value)


def test_attributes_that_fill_memory_are_not_read(tmp_path: Path) -> None:
    """4 GiB of attributes, in a file that takes a few KB of the disk."""
    path = tmp_path / "a.tar"
    path.write_bytes(headers(("x", tarfile.XHDTYPE, 1 << 32)))
    os.truncate(path, (1 << 32) + 2048)
    with pytest.raises(UserError, match="not a whole tar"):
        scan_tar(path)


def test_a_negative_size_in_attributes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.txt")
        member.pax_headers = {"size": "-1024", "comment": "x"}
        tar.addfile(member)
    with pytest.raises(UserError, match="not a whole tar"):
        scan_tar(path)


def test_sparse_members_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.txt")
        member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.size": "99999999", "GNU.sparse.map": "0,3"}
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(BadRecord, match="a link or a device, not a file"):
        open_source(path)[0]


# --- indexes that are not to be trusted ---------------------------------------------------------------------


def rewrite(path: Path, **changes: Any) -> None:
    """Write an index again with other arrays or notes; None leaves one out."""
    with safe_open(path, framework="np") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        notes = dict(stored.metadata())
    for name, value in changes.items():
        place = notes if isinstance(value, str) else arrays
        place[name] = value
        if value is None:
            arrays.pop(name)
    save_file(arrays, path, notes)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


WRONG: dict[str, dict[str, Any]] = {
    "samples": {"samples": str(10**12)},
    "no number": {"samples": "many"},
    "fewer samples": {"samples": "2"},
    "negative samples": {"samples": "-1"},
    "negative starts": {"starts": ints(-5, 2, 4, 6)},
    "starts beyond": {"starts": ints(0, 2, 4, 10**9)},
    "starts that fall": {"starts": ints(0, 4, 2, 6)},
    "no starts": {"starts": ints()},
    "one sample": {"starts": ints(0, 6)},
    "missing starts": {"starts": None},
    "missing keys": {"keys": None},
    "missing sizes": {"sizes": None},
    "negative offsets": {"offsets": ints(-1, 0, 0, 0, 0, 0)},
    "offsets beyond": {"offsets": ints(10**15, 0, 0, 0, 0, 0)},
    "sizes beyond": {"sizes": ints(10**15, 0, 0, 0, 0, 0)},
    "sizes that overflow": {"sizes": ints(2**63 - 1, 0, 0, 0, 0, 0)},
    "negative sizes": {"sizes": ints(-9, 0, 0, 0, 0, 0)},
    "fewer sizes": {"sizes": ints(1)},
    "extensions beyond": {"extensions": ints(0, 1, 0, 1, 0, 99)},
    "negative extensions": {"extensions": ints(0, 1, 0, 1, 0, -1)},
    "floats": {"offsets": np.zeros(6)},
    "a table": {"offsets": np.zeros((2, 3), np.int64)},
    "names": {"names": "[1, 2]"},
    "names that are none": {"names": "{}"},
    "names that are no JSON": {"names": "["},
    "key ends": {"key_ends": ints(0, 10**6, 12, 18)},
    "keys of numbers": {"keys": np.zeros(18, np.int64)},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_wrong_index_is_made_anew(changes: dict[str, Any], tmp_path: Path) -> None:
    path = forms.shards(tmp_path, 3) / "000.tar"
    wanted = words(open_source(path))
    rewrite(tmp_path / "000.tar.index", **changes)
    tar_module._load.cache_clear()
    assert words(open_source(path)) == wanted
    tar_module._load.cache_clear()
    assert scan_tar(path).fits(path.stat().st_size)


@pytest.mark.parametrize("kind", ["pipe", "link", "folder", "giant", "empty"])
def test_what_is_no_index_of_ours_is_not_read(kind: str, tmp_path: Path) -> None:
    path = forms.shards(tmp_path, 3) / "000.tar"
    wanted = words(open_source(path))
    index = tmp_path / "000.tar.index"
    index.rename(tmp_path / "other.index")
    if kind == "pipe":
        os.mkfifo(index)
    elif kind == "link":
        index.symlink_to("other.index")
    elif kind == "folder":
        index.mkdir()
    else:
        index.write_bytes(b"")
        os.truncate(index, (1 << 40) if kind == "giant" else 0)
    tar_module._load.cache_clear()
    assert words(open_source(path)) == wanted


@pytest.mark.parametrize("named", ["folder", "files"])
@pytest.mark.parametrize("where", ["sub", "a/b/sub"])
def test_no_index_is_written_where_a_link_in_the_data_leads(named: str, where: str, tmp_path: Path) -> None:
    outside, data = forms.shards(tmp_path / "outside", 6), tmp_path / "data"
    (data / where).parent.mkdir(parents=True)
    (data / where).symlink_to(outside)
    forms.shards(data / "own", 3)
    for path in tmp_path.rglob("*.index"):
        path.unlink()
    location: Any = data
    if named == "files":
        location = [str(data / "own" / "000.tar"), *(str(data / where / f"00{n}.tar") for n in range(2))]
    for _ in range(2):
        tar_module._load.cache_clear()
        source = open_source(location, Reading(allow_outside=True))
        assert len(source) == 9 and all(source[i].messages for i in range(9))
    assert not list(outside.glob("*.index"))
    assert [path.name for path in (data / "own").iterdir() if path.suffix == ".index"] == ["000.tar.index"]


def test_an_index_is_written_where_the_user_names_a_link(tmp_path: Path) -> None:
    forms.shards(tmp_path / "real", 3)
    (tmp_path / "real" / "000.tar.index").unlink(missing_ok=True)
    (tmp_path / "named").symlink_to("real")
    assert len(open_source(tmp_path / "named")) == 3
    assert (tmp_path / "real" / "000.tar.index").exists()


def test_opening_removes_what_a_killed_index_left(tmp_path: Path) -> None:
    folder = forms.shards(tmp_path, 3)
    wanted = words(open_source(folder))
    sweep.cache_clear()
    (folder / ".000.tar.index.0.unimm-writing").mkdir()
    assert words(open_source(folder)) == wanted
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "rows",
    [ints(10**12, 0, 0), ints(-3, 0, 0), ints(1, 2), np.zeros(3)],
    ids=["too many", "negative", "short", "floats"],
)
def test_a_wrong_count_of_samples_is_counted_again(
    rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = forms.shards(tmp_path, 6)
    monkeypatch.setattr(tar_module, "MANY", 2)
    wanted = words(open_source(folder))
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.tar"))]
    wrong = np.stack([np.resize(rows, 3) if len(rows) == 3 else rows] * 2)
    if wrong.shape[1] == 3:
        wrong[:, 1:] = states
    names = np.frombuffer(json.dumps(["000.tar", "001.tar"]).encode(), np.uint8)
    save_file(
        {"names": names, "rows": wrong}, folder / tar_module.COUNTS_FILE, {"format": tar_module.INDEX_FORMAT}
    )
    assert words(open_source(folder)) == wanted


def test_counts_of_other_samples_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = forms.shards(tmp_path, 3)
    monkeypatch.setattr(tar_module, "MANY", 1)
    state = (folder / "000.tar").stat()
    rows, names = ints(2, state.st_size, state.st_mtime_ns)[None], np.frombuffer(b'["000.tar"]', np.uint8)
    save_file(
        {"names": names, "rows": rows}, folder / tar_module.COUNTS_FILE, {"format": tar_module.INDEX_FORMAT}
    )
    with pytest.raises(BadRecord, match=r"has other samples than tars\.index says; remove that file"):
        open_source(folder)[0]
