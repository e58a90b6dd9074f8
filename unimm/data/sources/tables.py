"""Parquet files and Hugging Face `datasets` folders, read by random access through pyarrow and datasets."""

from __future__ import annotations

import functools
import importlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimm.data.sources.entries import RowEntry, RowSource
from unimm.data.sources.images import find_file
from unimm.data.sources.reach import Reach
from unimm.data.sources.rows import Reading, row_key
from unimm.errors import UserError
from unimm.files import open_regular, read_json
from unimm.processing.messages import BadRecord

OPEN_GROUPS = 8  # row groups held in memory at once
MAX_GROUP = 1 << 31  # bytes of a row group once it is read
MAX_BATCH = 1 << 28  # bytes of the rows of one that are unpacked at once
MAX_ROWS = 100  # rows for each byte of a file: more are a bomb


def need(name: str, what: str) -> Any:
    """Import an optional library, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what}: reading it needs {name}; pip install 'unimm[data]'") from None


class ParquetRows(RowSource):
    """The rows of Parquet files; images are columns of bytes, or of `{"bytes", "path"}` as Hugging Face writes.

    A row is had by reading its whole row group, of which the last few are kept: write small ones (100 rows), or
    make tars of them, where rows are read in random order.

    Raises:
        UserError: a file is broken (unless not `strict`: then it is left out and named in `broken`).
    """

    form = "parquet"

    def __init__(self, paths: Sequence[Path], reading: Reading, location: str, strict: bool = True) -> None:
        super().__init__(reading, location)
        self.parquet = need("pyarrow.parquet", location)
        self.paths: list[Path] = []
        self.groups: list[tuple[int, int]] = []  # file and row group
        counts: list[int] = []
        for path in paths:
            try:
                sizes = self._group_sizes(path)
            except UserError as error:
                if strict:
                    raise
                self.broken.append(BadRecord("", str(path), str(error).removeprefix(f"{path}: ")))
                continue
            self.groups += [(len(self.paths), group) for group in range(len(sizes))]
            counts += sizes
            self.paths.append(path)
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.tables: OrderedDict[int, Any] = OrderedDict()
        self.lock = threading.Lock()

    def _group_sizes(self, path: Path) -> list[int]:
        """How many rows each row group of a file has.

        Raises:
            UserError: the file is broken, or says of itself what cannot be.
        """
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                metadata = self.parquet.read_metadata(file)
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds
            raise UserError(f"{path}: not a whole Parquet file ({_line(error)})") from None
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = [group.num_rows for group in groups]
        if min(sizes, default=0) < 0 or sum(sizes) > MAX_ROWS * size:
            raise UserError(
                f"{path}: claims {sum(sizes)} rows in {size} bytes; it is damaged or made to fill memory"
            )
        return sizes

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def place(self, index: int) -> str:
        """The file, and the number of the row among all."""
        index = self.check_index(index)
        return f"{self.paths[self.groups[self._group(index)][0]]}: row {index}"

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))

    def entry(self, index: int) -> RowEntry:
        """The row at `index`; see `RowSource.entry`."""
        index = self.check_index(index)
        group = self._group(index)
        path = self.paths[self.groups[group][0]]
        row_number = index - (int(self.ends[group - 1]) if group else 0)
        name = f"row {index}"
        try:
            row = self._table(group).slice(row_number, 1).to_pylist()[0]
        except Exception as error:  # pyarrow raises many kinds
            reason = str(error) if isinstance(error, UserError) else f"cannot be read ({_line(error)})"
            raise BadRecord(name, str(path), reason) from None
        return _entry(row, name, path, path.parent, self.reading)

    def _table(self, group: int) -> Any:
        """A row group, from memory if it was read lately."""
        with self.lock:
            if group not in self.tables:
                file, number = self.groups[group]
                self.tables[group] = self._read(self.paths[file], number)
            self.tables.move_to_end(group)
            while len(self.tables) > OPEN_GROUPS:
                self.tables.popitem(last=False)
            return self.tables[group]

    def _read(self, path: Path, number: int) -> Any:
        """A row group, in batches so small that none of them can fill memory.

        Raises:
            UserError: the group is larger than `MAX_GROUP`.
        """
        with open_regular(path) as handle:
            file = self.parquet.ParquetFile(handle)
            metadata = file.metadata.row_group(number)
            columns = [metadata.column(place) for place in range(metadata.num_columns)]
            _check_group(sum(column.total_uncompressed_size for column in columns))
            # A value may be stored once and stand in every row, so a batch may be its rows times the largest value.
            largest = max((column.total_uncompressed_size for column in columns), default=0)
            rows = max(1, min(1000, MAX_BATCH // max(largest, 1)))
            batches, total = [], 0
            for batch in file.iter_batches(batch_size=rows, row_groups=[number]):
                total += batch.nbytes
                _check_group(total)
                batches.append(batch)
            return importlib.import_module("pyarrow").Table.from_batches(batches, schema=file.schema_arrow)

    def files(self) -> Sequence[Path]:
        """The Parquet files."""
        return self.paths


def _check_group(size: int) -> None:
    if size > MAX_GROUP:
        raise UserError(
            f"a row group of {size / 2**30:.1f} GiB, more than {MAX_GROUP >> 30} GiB; write smaller ones (100 rows)"
        )


class DatasetFolder(RowSource):
    """What `datasets` wrote with `save_to_disk`; images stay encoded.

    Raises:
        UserError: it is broken, names files outside, or holds several splits and none was named.
    """

    form = "datasets"

    def __init__(self, folder: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(reading, location or str(folder))
        datasets = need("datasets", str(folder))
        self.folder = folder
        chosen = _split_folder(folder, reading)
        _check_files(chosen, Reach(folder, reading.allow_outside))
        try:
            loaded = datasets.load_from_disk(str(chosen))
        except Exception as error:  # datasets raises many kinds
            raise UserError(f"{folder}: not a whole datasets folder ({_line(error)})") from None
        self.rows = loaded.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """The folder, and the number of the row."""
        return f"{self.folder}: row {self.check_index(index)}"

    def entry(self, index: int) -> RowEntry:
        """The row at `index`; see `RowSource.entry`."""
        index = self.check_index(index)
        name = f"row {index}"
        try:
            row = self.rows[index].to_pylist()[0]
        except Exception as error:  # datasets and pyarrow raise many kinds
            raise BadRecord(name, str(self.folder), f"cannot be read ({_line(error)})") from None
        return _entry(row, name, self.folder, self.folder, self.reading)

    def files(self) -> Sequence[Path]:
        """The Arrow files."""
        return [Path(file["filename"]) for file in self.rows.cache_files]


def _split_folder(folder: Path, reading: Reading) -> Path:
    """The folder of one split.

    Raises:
        UserError: the list of splits is damaged, there is no such split, or there are several and none was named.
    """
    listed = folder / "dataset_dict.json"
    if not listed.exists():
        return folder
    splits = read_json(listed).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise UserError(f"{folder}: not a whole datasets folder ({listed.name} lists no splits)")
    names = ", ".join(splits)
    if reading.split is None and len(splits) > 1:
        raise UserError(f"{folder}: has the splits {names}; say which with split")
    split = reading.split or splits[0]
    if split not in splits:
        raise UserError(f"{folder}: has no split {split}; it has {names}")
    return Reach(folder, reading.allow_outside).path(split)


def _check_files(folder: Path, reach: Reach) -> None:
    """Refuse a folder whose lists of files are no lists, or name files outside.

    Raises:
        UserError: they do.
    """
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder}: not a whole datasets folder (state.json: not found)")
    for name in _named_files(folder):
        try:
            path = reach.path(os.path.relpath(folder / name, reach.folder))
        except UserError as error:
            raise UserError(f"{folder}: not a whole datasets folder ({error})") from None
        with open_regular(path):
            pass  # a pipe or a device would block the library that reads it


def _named_files(folder: Path) -> Iterator[str]:
    yield from ("state.json", "dataset_info.json")
    files = read_json(folder / "state.json").get("_data_files")
    if not isinstance(files, list):
        raise UserError(f"{folder}: not a whole datasets folder (state.json names no _data_files)")
    for file in files:
        if not isinstance(file, dict) or not isinstance(file.get("filename"), str):
            raise UserError(
                f"{folder}: not a whole datasets folder (state.json: _data_files without a filename)"
            )
        yield file["filename"]


def _entry(row: Any, name: str, file: Path, folder: Path, reading: Reading) -> RowEntry:
    """A table's row; images named by path are looked for in the reading's folder, or beside."""
    root = Path(reading.images) if reading.images is not None else folder
    find = functools.partial(find_file, root, allow_outside=reading.allow_outside)
    return RowEntry(row_key(row, name), str(file), row, find)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
