"""Fuzzing: whatever a tar, its index, a list or a row holds, there is a record or one line that says why not."""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import forms
from unimm.data.samples import SampleBuilder, blank_codes
from unimm.data.sources import Reading, Source, open_source
from unimm.data.sources import tars as tar_module
from unimm.data.sources.columns import ANSWERED, ASKED, COLUMN_NAMES
from unimm.data.sources.images import find_file
from unimm.data.sources.rows import make_record, row_key
from unimm.data.sources.tar_scan import scan_tar
from unimm.errors import UserError, UserNote
from unimm.pipeline import UniMM

PNG = forms.encoded(forms.SCENES[0])


def read_all(source: Source) -> None:
    """Read what a source has; every fault is a line."""
    for index in range(min(len(source), 20)):
        try:
            for image in source[index].images():
                image.image()
        except UserError as error:
            assert "\n" not in str(error)


def open_and_read(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserNote)
        try:
            source = open_source(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            read_all(source)


# --- rows ---------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.text(max_size=20), st.sampled_from(["<image>", "a <image>", "a.png", "", " ", "\ud800", "data:,"])
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.binary(max_size=8), st.just(PNG)
)
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "cat", None, 3])
PARTS = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["text", "image", "image_url", "video", None]), "text": SCALARS,
                  "image": SCALARS, "image_url": SCALARS, "draw": SCALARS},
)  # fmt: skip
CONTENT = st.one_of(SCALARS, st.lists(st.one_of(PARTS, SCALARS), max_size=3))
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": ROLES, "content": CONTENT}),
        st.fixed_dictionaries({"from": ROLES, "value": CONTENT}),
        st.fixed_dictionaries({"user": CONTENT, "assistant": CONTENT}),
        SCALARS,
    ),
    max_size=4,
)
IMAGES = st.one_of(
    SCALARS, st.fixed_dictionaries({}, optional={"bytes": SCALARS, "path": SCALARS, "url": SCALARS})
)
COLUMN = st.sampled_from(
    sorted({*COLUMN_NAMES, *(n for names in COLUMN_NAMES.values() for n in names), *ASKED, *ANSWERED, "messages",
            "texts", "others", "key", "history", "system", "context", "chosen", "rejected", "other"})
)  # fmt: skip
ROWS = st.dictionaries(
    COLUMN,
    st.one_of(SCALARS, IMAGES, TURNS, st.lists(IMAGES, max_size=3), st.lists(WORDS, max_size=3)),
    max_size=5,
)


SAID = st.one_of(
    st.sampled_from(["q", "a", "x" * 90, "<image>", "see <image> and"]),
    st.lists(
        st.sampled_from([{"type": "text", "text": "t"}, {"type": "image", "image": PNG}, {"type": "image"}]),
        min_size=1, max_size=3,
    ),
)  # fmt: skip
TALKS = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": SAID}),
            min_size=1, max_size=5,
        ),
        "images": st.lists(st.just(PNG), max_size=3),
    }
)  # fmt: skip
"""Turns that mean something more often than not."""
JSON_ROWS = ROWS.map(lambda row: json.dumps(row, default=str).encode())
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


@settings(max_examples=600)
@given(ROWS, st.sampled_from(["image_to_text", "text_to_image"]), st.sampled_from([None, "image", "text"]))
def test_a_row_is_a_record_or_a_line(row: dict[str, Any], pairs: Any, field: str | None) -> None:
    reading = Reading(pairs, {} if field is None else {field: "other"})
    assert row_key(row, "k").isprintable()
    try:
        record = make_record("k", row, lambda value: find_file(Path("root"), value), reading)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return
    assert record.messages and all(message.parts for message in record.messages)
    for number in range(record.versions):
        for message in record.version(number).messages:
            assert all(not isinstance(part, str) or part.encode().strip() for part in message.parts)
    for image in record.images():
        assert image.blob.data is not None or Path(image.blob.path or "").is_relative_to("root")


@settings(max_examples=200)
@given(
    st.one_of(TALKS, TALKS, ROWS),
    st.sampled_from(["image_to_text", "text_to_image"]),
    st.integers(0, 2**31 - 1),
)
def test_a_record_is_a_sample_or_bad(tiny_model: UniMM, row: dict[str, Any], pairs: Any, number: int) -> None:
    processor = tiny_model.processor
    target_size = processor.target_size()
    builder = SampleBuilder(processor, target_size, blank_codes(target_size))
    try:
        record = make_record("k", row, lambda value: find_file(Path("root"), value), Reading(pairs))
        sample = builder.build(record, "here")
    except UserError as error:
        assert str(error).isprintable()
        return
    again = builder.build(record, "here", request=number, drop_prompt=number % 2 == 0)
    for one in (sample, again):
        ids, layout = torch.from_numpy(one["ids"]), processor.layout
        assert 0 < len(ids) <= processor.context and (one["labels"] >= 0).any()
        assert int(layout.feature_positions(ids).sum()) == 4 * len(one["images"])
        drawn = one["images"].codes
        assert int(layout.code_positions(ids).sum()) == (0 if drawn is None else drawn.numel())


@settings(max_examples=100)
@given(st.lists(st.one_of(JSON_ROWS, st.binary(max_size=30)), max_size=4), st.sampled_from(SUFFIXES))
def test_a_list_is_read_or_a_line(tmp_path: Path, lines: list[bytes], suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    data = b"\n".join(lines)
    path.write_bytes(b"[" + data.replace(b"\n", b",") + b"]" if suffix == ".json" else data)
    open_and_read(path)


@settings(max_examples=100)
@given(st.lists(st.lists(st.text(max_size=6), max_size=4), max_size=5), st.sampled_from(",;\t"))
def test_cells_of_any_text_are_read_or_a_line(tmp_path: Path, rows: list[list[str]], mark: str) -> None:
    path = tmp_path / "rows.csv"
    lines = [mark.join(('"' + cell.replace('"', '""') + '"') for cell in row) for row in rows]
    path.write_bytes("\n".join(["text,image".replace(",", mark), *lines]).encode("utf-8", "surrogatepass"))
    open_and_read(path)


# --- tars ---------------------------------------------------------------------------------------------------


def sample_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {
            "a.png": PNG[:600],
            "a.txt": b"words",
            "b.json": b'{"text": "b"}',
            "ü.txt": b"c",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


TAR = sample_tar()
CHANGES = st.lists(
    st.tuples(st.integers(0, len(TAR) - 1), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4
)


def changed(data: bytes, changes: list[tuple[int, bytes]], signed: bool = False) -> bytes:
    """Bytes with some of them replaced; `signed` makes the sums of a tar's headers right again."""
    found = bytearray(data)
    for place, new in changes:
        found[place : place + len(new)] = new
    for start in range(0, len(data) - 511, 512) if signed else ():
        if found[start + 257 : start + 262] == b"ustar":
            found[start + 148 : start + 156] = b" " * 8
            found[start + 148 : start + 156] = f"{sum(found[start : start + 512]):06o}\0 ".encode()
    return bytes(found)


@settings(max_examples=250)
@given(CHANGES, st.booleans(), st.integers(0, len(TAR)))
def test_a_tar_is_read_or_a_line(
    tmp_path: Path, changes: list[tuple[int, bytes]], signed: bool, cut: int
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(changed(TAR, changes, signed)[: cut if cut % 3 == 0 else None])
    (tmp_path / "a.tar.index").unlink(missing_ok=True)
    try:
        assert scan_tar(path).fits(path.stat().st_size) or path.stat().st_size < len(TAR)
    except UserError as error:
        assert "\n" not in str(error)
    open_and_read(path)


NAMES_IN_TARS = st.text(st.sampled_from("ab.01/"), min_size=1, max_size=6)
ENDS = st.sampled_from(["png", "txt", "json", "0.png", "v1.txt", "caption", "cls", ""])


@settings(max_examples=120)
@given(st.lists(st.tuples(NAMES_IN_TARS, ENDS), max_size=8, unique=True))
def test_no_member_is_lost_whatever_the_names(tmp_path: Path, names: list[tuple[str, str]]) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for stem, end in names:
            member = tarfile.TarInfo(f"{stem}.{end}" if end else stem)
            tar.addfile(member, io.BytesIO())
    index = scan_tar(path)
    with tarfile.open(path) as tar:
        members = [m for m in tar if not m.isdir()]
    kept = {m.offset_data for m in members if m.name.rpartition("/")[2].partition(".")[0]}
    assert sorted(index.offsets.tolist()) == sorted(kept)
    assert len(index.starts) == len(index.key_ends) and index.fits(path.stat().st_size)


def index_bytes(folder: Path) -> bytes:
    (folder / "a.tar").write_bytes(TAR)
    open_and_read(folder / "a.tar")
    return (folder / "a.tar.index").read_bytes()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The index of the tar."""
    return index_bytes(tmp_path_factory.mktemp("index"))


@settings(max_examples=150)
@given(st.data())
def test_an_index_of_any_bytes_gives_records_or_a_line(
    tmp_path: Path, index: bytes, data: st.DataObject
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(TAR)
    state = path.stat()
    stamp = tar_module._stamp(state.st_size, state.st_mtime_ns)
    changes = data.draw(
        st.lists(st.tuples(st.integers(0, len(index) - 1), st.binary(min_size=1, max_size=9)), max_size=3)
    )
    fresh = _stamped(index, stamp)
    (tmp_path / "a.tar.index").write_bytes(changed(fresh, changes))
    tar_module._load.cache_clear()
    open_and_read(path)


def _stamped(index: bytes, stamp: dict[str, str]) -> bytes:
    """An index's bytes with the time of another tar, so that it is not refused for that."""
    length = int.from_bytes(index[:8], "little")
    header = json.loads(index[8 : 8 + length])
    header["__metadata__"] |= stamp
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + index[8 + length :]


@settings(max_examples=100)
@given(st.data())
def test_arrays_of_any_numbers_are_no_index_or_a_safe_one(data: st.DataObject) -> None:
    numbers = st.lists(st.one_of(st.integers(-3, 12), st.integers(-(2**63), 2**63 - 1)), max_size=5)
    starts, offsets, sizes, extensions, ends = (np.array(data.draw(numbers), np.int64) for _ in range(5))
    keys = np.frombuffer(data.draw(st.binary(max_size=12)), np.uint8)
    index = tar_module.TarIndex(starts, offsets, sizes, extensions, ["txt", "png"], keys, ends)
    if not index.fits(10):
        return
    for sample in range(len(index.starts) - 1):
        assert isinstance(index.key(sample), str)
        for member in range(*index.starts[sample : sample + 2].tolist()):
            assert index.offsets[member] >= 0 and index.offsets[member] + index.sizes[member] <= 10
            assert index.names[index.extensions[member]]
