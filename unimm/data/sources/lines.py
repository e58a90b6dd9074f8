"""Rows in a JSON or JSONL file, with pictures as files beside it: image folders with a list, LLaVA, ShareGPT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unimm.data.sources.record import BadRecord, Blob, Record, Source
from unimm.data.sources.rows import Reading, make_record, row_key
from unimm.errors import UserError


def find_file(folder: Path, value: Any) -> Blob:
    """The blob of what a column says: a file name relative to `folder`, bytes, or `{"bytes": …, "path": …}`.

    Raises:
        UserError: it says something else.
    """
    if isinstance(value, Blob):
        return value
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        name = str(value.get("path") or "a picture of this row")
        return Blob(name, value["bytes"]) if value.get("bytes") else find_file(folder, value.get("path"))
    if isinstance(value, bytes):
        return Blob("a picture of this row", value)
    if not isinstance(value, str) or not value:
        raise UserError(f"image: expected the name of a file, got {type(value).__name__}")
    if value.startswith(("http://", "https://")):
        raise UserError(f"image: {value} is not on this machine; download it first")
    path = str(folder / value)
    return Blob(path, path=path)


class JsonRows(Source):
    """A JSONL file, read by an index of its lines, or a JSON file that holds a list (which is held in memory).

    Args:
        path: the file.
        reading: how to read its rows.
        location: what the user called it.

    Raises:
        UserError: the file cannot be read, or is JSON of something else than a list.
    """

    form = "json"

    def __init__(self, path: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(location or str(path))
        self.path, self.reading = path, reading
        self.folder = Path(reading.images) if reading.images is not None else path.parent
        self.rows: list[Any] | None = None
        self.starts: NDArray[np.int64] = np.zeros(1, np.int64)
        try:
            if path.suffix == ".json":
                self.rows = _read_list(path)
            else:
                self.starts = line_starts(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None

    def __len__(self) -> int:
        return len(self.starts) - 1 if self.rows is None else len(self.rows)

    def __getitem__(self, index: int) -> Record:
        index = self.check_index(index)
        name = f"row {index}" if self.rows is not None else f"line {index + 1}"
        try:
            row = self._row(index)
            key = row_key(row, name)
        except (ValueError, RecursionError) as error:
            raise BadRecord(name, str(self.path), f"not JSON ({error})") from None
        try:
            return make_record(key, row, lambda value: find_file(self.folder, value), self.reading)
        except UserError as error:
            raise BadRecord(key, str(self.path), str(error)) from None

    def _row(self, index: int) -> Any:
        if self.rows is not None:
            return self.rows[index]
        start, stop = self.starts[index : index + 2].tolist()
        return json.loads(Blob(str(self.path), path=str(self.path), offset=start, size=stop - start).read())

    def files(self) -> Sequence[Path]:
        """The one file."""
        return [self.path]


def _read_list(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); one object a line is .jsonl") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of records, got {type(rows).__name__}")
    return rows


def line_starts(path: Path) -> NDArray[np.int64]:
    """Where each line begins that is not blank, and where the last one ends: int64 [N + 1].

    Blank lines count to the line before them, which JSON does not mind; those at the start to none.
    """
    starts, position = [], 0
    with path.open("rb") as handle:
        for line in handle:
            if line.strip():
                starts.append(position)
            position += len(line)
    return np.array([*starts, position], np.int64)
