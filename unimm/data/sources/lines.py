"""Rows in a JSON, JSONL, CSV or TSV file, with images in it or beside it: LLaVA, ShareGPT, COCO, lists of folders."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from unimm.data.sources.columns import KNOWN
from unimm.data.sources.entries import RowEntry, RowSource
from unimm.data.sources.images import find_file
from unimm.data.sources.rows import Reading, row_key
from unimm.data.sources.text import clip, decode_text, parse_strict_json
from unimm.errors import UserError
from unimm.files import open_regular
from unimm.processing.messages import BadRecord, Blob

LIST_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
MAX_CELL = 1 << 28  # bytes of one cell of a CSV file, which may hold an image as base64
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # marks of UTF-16, whose lines do not end as bytes say


class ListedRows(RowSource):
    """The rows of one file; names of images are relative to the file's folder, or to what the reading says.

    Args:
        path: the file.
        reading: how to read its rows.
        location: what the user called it.
    """

    def __init__(self, path: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(reading, location or str(path))
        self.path = path
        self.folder = Path(reading.images) if reading.images is not None else path.parent

    def name(self, index: int) -> str:
        """What a row is called that has no key."""
        return f"row {index}"

    def row(self, index: int) -> Any:
        """The row at `index`.

        Raises:
            UserError: it cannot be read.
        """
        raise NotImplementedError

    def place(self, index: int) -> str:
        """The file, and which of its rows."""
        return f"{self.path}: {self.name(self.check_index(index))}"

    def entry(self, index: int) -> RowEntry:
        """The row at `index`, with its key; see `RowSource.entry`."""
        index = self.check_index(index)
        name = self.name(index)
        try:
            row = self.row(index)
        except UserError as error:
            raise BadRecord(name, str(self.path), str(error)) from None
        return RowEntry(row_key(row, name), str(self.path), row, self._find)

    def _find(self, value: Any) -> Blob:
        return find_file(self.folder, value, self.reading.allow_outside)

    def files(self) -> Sequence[Path]:
        """The one file."""
        return [self.path]


class JsonRows(ListedRows):
    """A JSONL file, read by an index of its lines, or a JSON file (held in memory): a list, or COCO's captions.

    Raises:
        UserError: the file cannot be read, or is JSON of something else.
    """

    form = "json"

    def __init__(self, path: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(path, reading, location)
        self.rows: list[Any] | None = None
        self.starts: NDArray[np.int64] = np.zeros(1, np.int64)
        self.numbers: NDArray[np.int64] = np.zeros(0, np.int64)
        if path.suffix.lower() == ".json":
            self.rows = _read_list(path)
        else:
            self.starts, self.numbers = line_starts(path)

    def __len__(self) -> int:
        return len(self.starts) - 1 if self.rows is None else len(self.rows)

    def name(self, index: int) -> str:
        """What a row is called that has no key."""
        return f"row {index}" if self.rows is not None else f"line {self.numbers[index]}"

    def place(self, index: int) -> str:
        """The file, and which of its lines or rows."""
        index = self.check_index(index)
        return f"{self.path}:{self.numbers[index]}" if self.rows is None else super().place(index)

    def row(self, index: int) -> Any:
        """The object at `index`."""
        if self.rows is not None:
            return self.rows[index]
        start, stop = self.starts[index : index + 2].tolist()
        return parse_strict_json(
            Blob(str(self.path), path=str(self.path), offset=start, size=stop - start).read()
        )


def _read_list(path: Path) -> list[Any]:
    with open_regular(path) as file:
        data = file.read()
    try:
        rows = parse_strict_json(data)
    except UserError as error:
        raise UserError(f"{path}: {error}; one object a line is .jsonl") from None
    if isinstance(rows, dict) and {"images", "annotations"} <= rows.keys():
        return _coco_rows(path, rows)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of records, got {type(rows).__name__}")
    return rows


def _coco_rows(path: Path, document: Mapping[str, Any]) -> list[Any]:
    """COCO's captions as rows: each image with all of its captions.

    Raises:
        UserError: these are COCO's annotations of something else, or no lists.
    """
    if not isinstance(document["images"], list) or not isinstance(document["annotations"], list):
        raise UserError(f"{path}: expected lists of images and annotations")
    captions: dict[str, list[str]] = {}
    for annotation in document["annotations"]:
        if not isinstance(annotation, Mapping) or not isinstance(annotation.get("caption"), str):
            raise UserError(f"{path}: annotations without a caption; of COCO's files the captions are read")
        captions.setdefault(str(annotation.get("image_id")), []).append(annotation["caption"])
    rows: list[Any] = []
    for image in document["images"]:
        if not isinstance(image, Mapping) or "file_name" not in image:
            raise UserError(f"{path}: images without a file_name")
        key = image.get("id")
        rows.append({"id": key, "file_name": image["file_name"], "captions": captions.get(str(key))})
    return rows


def line_starts(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each line begins that is not blank, and where the last one ends: int64 [N + 1]; and their numbers [N].

    Blank lines count to the line before them, which JSON does not mind; those at the start to none.

    Raises:
        UserError: the file cannot be read, or is UTF-16.
    """
    starts, numbers, position = [], [], 0
    with open_regular(path) as handle:
        _refuse_wide(handle, path)
        for number, line in enumerate(handle, 1):
            if line.strip():
                starts.append(position)
                numbers.append(number)
            position += len(line)
    return np.array([*starts, position], np.int64), np.array(numbers, np.int64)


def _refuse_wide(handle: BinaryIO, path: Path) -> None:
    head = handle.read(2)
    handle.seek(0)
    if head in _WIDE:
        raise UserError(f"{path}: UTF-16; save it as UTF-8")


class CsvRows(ListedRows):
    """A CSV or TSV file with a line of names, read by an index of its rows; an empty cell is none.

    Raises:
        UserError: the file cannot be read, or has no names or the same twice.
    """

    form = "csv"

    def __init__(self, path: Path, reading: Reading, location: str | None = None) -> None:
        super().__init__(path, reading, location)
        csv.field_size_limit(MAX_CELL)
        with open_regular(path) as handle:
            _refuse_wide(handle, path)
            first = handle.readline()
            self.delimiter = _delimiter(path, first)
            handle.seek(0)
            lines = _Lines(handle)
            starts: list[int] = []
            try:
                rows = csv.reader(lines, delimiter=self.delimiter, strict=True)
                self.names = self._check_names(next(rows, []))
                start = lines.position
                for row in rows:
                    if row:  # else a blank line
                        starts.append(start)
                    start = lines.position
            except csv.Error as error:
                raise UserError(f"{path}: line {lines.number}: {error}") from None
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
        self.starts = np.array([*starts, lines.position], np.int64)

    def _check_names(self, names: list[str]) -> list[str]:
        if not any(names):
            raise UserError("its first line holds no names of columns")
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"two columns are called {clip(twice)}")
        if not any(name in KNOWN or name in self.reading.fields.values() for name in names):
            shown = ", ".join(map(clip, names[:8]))
            raise UserError(f"of unknown form; expected images and texts, but its first line says: {shown}")
        return names

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> Any:
        """The cells at `index` by their names."""
        start, stop = self.starts[index : index + 2].tolist()
        text = decode_text(Blob(str(self.path), path=str(self.path), offset=start, size=stop - start).read())
        cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.delimiter), [])
        if len(cells) > len(self.names):
            raise UserError(f"{len(cells)} cells, but {len(self.names)} columns")
        return {name: cell for name, cell in zip(self.names, cells, strict=False) if cell != ""}


class _Lines:
    """The lines of a file as text, with how far it was read, in bytes and in lines."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.position, self.number = handle, 0, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.handle:
            self.position += len(line)
            self.number += 1
            yield decode_text(line)


def _delimiter(path: Path, names: bytes) -> str:
    """What separates cells: a tab in a .tsv, else what the line of names has most of."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(",;\t", key=lambda mark: names.count(mark.encode()))
