"""Parquet files and Hugging Face `datasets` folders, read by random access through pyarrow and datasets."""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimm.data.sources.lines import find_file
from unimm.data.sources.record import BadRecord, Record, Source
from unimm.data.sources.rows import Reading, make_record, row_key
from unimm.errors import UserError

OPEN_GROUPS = 8  # row groups held in memory at once


def need(name: str, what: str) -> Any:
    """Import an optional library, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what}: reading it needs {name}; pip install 'unimm[data]'") from None


class ParquetRows(Source):
    """The rows of Parquet files; pictures are columns of bytes, or of `{"bytes", "path"}` as Hugging Face writes.

    A row is had by reading its whole row group, of which the last few are kept: write small ones (100 rows), or
    make tars of them, where rows are read in random order.

    Raises:
        UserError: a file is broken (unless not `strict`: then it is left out and named in `broken`).
    """

    form = "parquet"

    def __init__(self, paths: Sequence[Path], reading: Reading, location: str, strict: bool = True) -> None:
        super().__init__(location)
        self.parquet = need("pyarrow.parquet", location)
        self.reading = reading
        self.paths: list[Path] = []
        self.groups: list[tuple[int, int]] = []  # file and row group
        counts: list[int] = []
        for path in paths:
            try:
                metadata = self.parquet.read_metadata(path)
            except Exception as error:  # pyarrow raises many kinds
                if strict:
                    raise UserError(f"{path}: not a whole Parquet file ({_line(error)})") from None
                self.broken.append(BadRecord("", str(path), f"not a whole Parquet file ({_line(error)})"))
                continue
            self.groups += [(len(self.paths), group) for group in range(metadata.num_row_groups)]
            counts += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self.paths.append(path)
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.tables: OrderedDict[int, Any] = OrderedDict()
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Record:
        index = self.check_index(index)
        group = int(np.searchsorted(self.ends, index, side="right"))
        path = self.paths[self.groups[group][0]]
        row_number = index - (int(self.ends[group - 1]) if group else 0)
        name = f"row {index}"
        try:
            row = self._table(group).slice(row_number, 1).to_pylist()[0]
        except Exception as error:  # pyarrow raises many kinds
            raise BadRecord(name, str(path), f"cannot be read ({_line(error)})") from None
        return record_of(row, name, path, path.parent, self.reading)

    def _table(self, group: int) -> Any:
        """A row group, from memory if it was read lately."""
        with self.lock:
            if group not in self.tables:
                file, number = self.groups[group]
                self.tables[group] = self.parquet.ParquetFile(self.paths[file]).read_row_group(number)
            self.tables.move_to_end(group)
            while len(self.tables) > OPEN_GROUPS:
                self.tables.popitem(last=False)
            return self.tables[group]

    def files(self) -> Sequence[Path]:
        """The Parquet files."""
        return self.paths


class DatasetFolder(Source):
    """What `datasets` wrote with `save_to_disk`; pictures stay encoded.

    Raises:
        UserError: it is broken, or holds several splits and none was named.
    """

    form = "datasets"

    def __init__(self, folder: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(location or str(folder))
        datasets = need("datasets", str(folder))
        self.folder, self.reading = folder, reading
        try:
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:  # datasets raises many kinds
            raise UserError(f"{folder}: not a whole datasets folder ({_line(error)})") from None
        if isinstance(loaded, datasets.DatasetDict):
            names = ", ".join(loaded)
            if reading.split is None and len(loaded) > 1:
                raise UserError(f"{folder}: has the splits {names}; say which with split")
            split = reading.split or next(iter(loaded))
            if split not in loaded:
                raise UserError(f"{folder}: has no split {split}; it has {names}")
            loaded = loaded[split]
        self.rows = loaded.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        index = self.check_index(index)
        name = f"row {index}"
        try:
            row = self.rows[index].to_pylist()[0]
        except Exception as error:  # datasets and pyarrow raise many kinds
            raise BadRecord(name, str(self.folder), f"cannot be read ({_line(error)})") from None
        return record_of(row, name, self.folder, self.folder, self.reading)

    def files(self) -> Sequence[Path]:
        """The Arrow files."""
        return [Path(file["filename"]) for file in self.rows.cache_files]


def record_of(row: Any, name: str, file: Path, folder: Path, reading: Reading) -> Record:
    """The record of a table's row; pictures named by path are looked for in the reading's folder, or beside."""
    root = Path(reading.images) if reading.images is not None else folder
    key = row_key(row, name)
    try:
        return make_record(key, row, lambda value: find_file(root, value), reading)
    except UserError as error:
        raise BadRecord(key, str(file), str(error)) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
