"""Tables: splits of a hub's clone, row groups that would fill memory, files that are damaged."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data import forms
from unimm.data.sources import BadRecord, Reading, open_source
from unimm.data.sources import tables as module
from unimm.data.sources.splits import split_of
from unimm.errors import UserError, UserNote


def clone(folder: Path, *names: str) -> Path:
    """Parquet files of one row, whose text is the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"text": name}]), path)
    return folder


def texts(source: Any) -> list[str]:
    return [source[i].messages[-1].parts[0] for i in range(len(source))]


SHARDS = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
CLONES = [
    ((*SHARDS, "data/test-00000-of-00001.parquet"), "test"),
    ((*SHARDS, "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"), "validation"),
    ((*SHARDS, "data/val-00000-of-00001.parquet"), "val"),
    ((*SHARDS, "data/test_hard-00000-of-00001.parquet"), "test_hard"),
    (("train/0000.parquet", "train/0001.parquet", "test/0000.parquet"), "test"),
    (("default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"), "test"),
    (("set-train-0.parquet", "set_train_1.parquet", "set-eval-0.parquet"), "eval"),
]


@pytest.mark.parametrize(("names", "other"), CLONES)
def test_the_train_split_of_a_clone_is_read_unless_another_is_named(
    names: tuple[str, ...], other: str, tmp_path: Path
) -> None:
    folder = clone(tmp_path, *names)
    with pytest.warns(UserNote, match="has the splits .*train.*; train is read; name another with split"):
        assert texts(open_source(folder)) == [name for name in names if "train" in name]
    for reading in (Reading(split=other), Reading(split="train")):
        found = texts(open_source(folder, reading))
        assert found and all((reading.split or "") in name for name in found)
    with pytest.raises(UserError, match="has no split extra; it has"):
        open_source(folder, Reading(split="extra"))


def test_the_split_of_tars_and_of_patterns(tmp_path: Path) -> None:
    for split in ("train", "test"):
        forms.write_tar(tmp_path / f"set-{split}-0000.tar", {"a.txt": split.encode()})
    for location in (str(tmp_path), str(tmp_path / "*.tar")):
        with pytest.warns(UserNote, match="train is read"):
            assert texts(open_source(location)) == ["train"]
        assert texts(open_source(location, Reading(split="test"))) == ["test"]
    assert texts(open_source(tmp_path / "set-test-0000.tar")) == ["test"], "the user names it"


def test_a_clone_without_train_asks_which(tmp_path: Path) -> None:
    folder = clone(tmp_path, "test-00000-of-00001.parquet", "validation-00000-of-00001.parquet")
    with pytest.raises(UserError, match="has the splits test, validation; say which with split"):
        open_source(folder)


def test_files_of_no_split_are_one(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = clone(tmp_path, "0.parquet", "1.parquet")
    assert len(open_source(folder)) == len(open_source(folder, Reading(split="train"))) == 2
    assert not recwarn.list
    with pytest.raises(UserError, match="has no split test; it has none"):
        open_source(folder, Reading(split="test"))


@pytest.mark.parametrize(
    ("name", "split"),
    [("latest-0.tar", None), ("contest.parquet", None), ("training.jsonl", "train"), ("a/dev/0.tar", "validation"),
     ("train/test_0.tar", "test"), ("TEST.tar", "test"), ("extra-00000-of-00001.parquet", "extra"),
     ("train2017.json", "train")],
)  # fmt: skip
def test_names_say_the_split(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


def bomb(path: Path, rows: int, size: int) -> Path:
    """A file of a few KB whose one row group holds a text of `size` bytes in every row."""
    text = pa.array(["a" * size]).dictionary_encode()
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), text.dictionary)
    pq.write_table(
        pa.table({"text": column}), path, compression="zstd", row_group_size=rows, store_schema=False
    )
    return path


def test_a_row_group_that_would_fill_memory_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bomb(tmp_path / "a.parquet", 4096, 1 << 20)
    assert path.stat().st_size < 10_000, "4 GiB in a few KB"
    monkeypatch.setattr(module, "MAX_GROUP", 1 << 26)
    monkeypatch.setattr(module, "MAX_BATCH", 1 << 24)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(BadRecord, match=r"a\.parquet: row 0: a row group of 0\.1 GiB, more than"):
        open_source(path)[0]
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    assert pa.default_memory_pool().max_memory() - before < 1 << 28
    tracemalloc.stop()


def test_a_row_group_that_says_that_it_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"text": "a" * 5000}] * 10), tmp_path / "a.parquet", use_dictionary=False
    )
    monkeypatch.setattr(module, "MAX_GROUP", 4096)
    with pytest.raises(BadRecord, match=r"a row group of .* GiB, more than .* write smaller ones"):
        open_source(tmp_path / "a.parquet")[3]


def test_more_rows_than_a_file_can_hold(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(10_000_000, pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"claims 10000000 rows in \d+ bytes"):
        open_source(tmp_path / "a.parquet")


def test_small_batches_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = forms.parquet(tmp_path / "p", 6)
    whole = [open_source(folder)[i].messages for i in range(6)]
    monkeypatch.setattr(module, "MAX_BATCH", 1)
    assert [open_source(folder)[i].messages for i in range(6)] == whole


@pytest.mark.parametrize(
    "state",
    ["[", "[]", "{}", '{"_data_files": 3}', '{"_data_files": [3]}', '{"_data_files": [{"filename": 3}]}',
     '{"_data_files": [{"filename": "none.arrow"}]}', '{"_data_files": [{"filename": "a\\u0000"}]}'],
)  # fmt: skip
def test_a_damaged_list_of_a_datasets_folder_is_one_line(state: str, tmp_path: Path) -> None:
    folder = forms.saved(tmp_path / "d", 2)
    (folder / "state.json").write_text(state)
    with pytest.raises(UserError) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "splits", ["[", "{}", '{"splits": 3}', '{"splits": []}', '{"splits": [1]}', '{"splits": ["x"]}']
)
def test_a_damaged_list_of_splits_is_one_line(splits: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(splits)
    with pytest.raises(UserError) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_rows_with_strange_columns_are_bad_or_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "extra": {"b": [1, 2], "c": b"\0"}}, {"text": None, "extra": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert texts([source[0]]) == ["a"]
    with pytest.raises(BadRecord, match=r"no other form of data fits \(columns: none\)"):
        source[1]
    assert json.dumps(source.signature())
