"""The rows of a data set's published files: TSV, CSV, Parquet, JSON, JSON lines, and folders of these or of images.

Rows come as the file has them; what their columns are called is the protocol's (`unimm.evaluation.items`).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unimm.data.sources.tables import need
from unimm.documents import check_document
from unimm.errors import UserError
from unimm.families.hub import is_hub_id
from unimm.files import open_regular
from unimm.images import SUFFIXES
from unimm.sections import near

MAX_DOCUMENT = 2**31  # bytes of a JSON file; the largest published one, VQAv2's annotations, has 600 MB
ROW_LISTS = (
    "data",
    "questions",
    "annotations",
    "items",
    "images",
)  # keys under which JSON files hold their rows
ROW_FORMATS = (".tsv", ".csv", ".parquet", ".jsonl", ".ndjson", ".json", ".txt")
Columns = dict[str, Any]


def find_files(names: Sequence[str]) -> list[Path]:
    """The files of a data set, in the order given; of a folder those in it, by name; a hub id is fetched.

    Raises:
        UserError: one is missing, or a folder holds none.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name)
        if not path.exists() and is_hub_id(name):
            path = _fetched(name)
        if path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in ROW_FORMATS)
            if not inside:
                raise UserError(f"{name}: holds no file of rows ({', '.join(ROW_FORMATS)})")
            found += inside
        elif not path.exists():
            raise UserError(f"{name}: not found")
        else:
            found.append(path)
    return found


def _fetched(name: str) -> Path:
    """The folder of a data set of the hub, in its cache."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, repo_type="dataset"))
    except Exception as error:  # the hub client raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: no such file, and not available from the hub ({reason})") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Columns]:
    """The rows of one file.

    Args:
        path: the file; its suffix says what it is.
        columns: names of the columns of a file without a header (.txt, tab-separated).

    Raises:
        UserError: it cannot be read; the line names the file and the row.
    """
    suffix = path.suffix.lower()
    if suffix in (".tsv", ".csv", ".txt"):
        yield from _separated(path, "," if suffix == ".csv" else "\t", columns)
    elif suffix == ".parquet":
        yield from _parquet(path)
    elif suffix in (".jsonl", ".ndjson"):
        yield from _lines(path)
    elif suffix == ".json":
        yield from _document(path)
    else:
        raise UserError(f"{path}: no format of rows; expected one of {', '.join(ROW_FORMATS)}")


def _separated(path: Path, separator: str, columns: Sequence[str]) -> Iterator[Columns]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # images stand in cells, as base64
    with open_regular(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            names = list(columns) or None
            if path.suffix.lower() == ".txt":  # prompts, in which a quotation mark is one
                reader = csv.DictReader(text, names, delimiter=separator, quoting=csv.QUOTE_NONE)
            else:
                reader = csv.DictReader(text, names, delimiter=separator)
            for number, row in enumerate(reader, 1):
                if None in row:
                    raise UserError(f"{path}: row {number}: more cells than the header has")
                yield {str(name): value for name, value in row.items() if value not in (None, "")}
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a text file in UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num}: {error}") from None


def _parquet(path: Path) -> Iterator[Columns]:
    parquet = need("pyarrow.parquet", str(path))
    with open_regular(path) as handle:
        try:
            for batch in parquet.ParquetFile(handle).iter_batches(batch_size=64):
                yield from batch.to_pylist()
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: not a whole Parquet file ({reason})") from None


def _lines(path: Path) -> Iterator[Columns]:
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(_parsed(line, f"{path}: line {number}"), f"{path}: line {number}")


def _document(path: Path) -> Iterator[Columns]:
    with open_regular(path) as file:
        content = file.read(MAX_DOCUMENT + 1)
    if len(content) > MAX_DOCUMENT:
        raise UserError(f"{path}: larger than {MAX_DOCUMENT:,} bytes; give it as JSON lines")
    try:
        document = _parsed(content, str(path))
    except UserError:
        if b"\n" not in content.strip():
            raise
        yield from _lines(path)  # JSON lines under the name .json, as POPE has them
        return
    rows = _rows_of(document)
    if rows is None:
        raise UserError(f"{path}: expected a list of rows, or one under {', '.join(ROW_LISTS)}")
    for number, row in enumerate(rows, 1):
        yield _object(row, f"{path}: row {number}")


def _rows_of(document: Any) -> list[Any] | None:
    """The rows of a document: its list, the list under a known key, or its entries by name."""
    if isinstance(document, list):
        return document
    if not isinstance(document, dict):
        return None
    for name in ROW_LISTS:
        if isinstance(document.get(name), list):
            found: list[Any] = document[name]
            return found
    if document and all(isinstance(row, dict) for row in document.values()):
        return [{"key": key, **row} for key, row in document.items()]
    return None


def _parsed(content: bytes, source: str) -> Any:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not readable as JSON ({str(error)[:100]})") from None
    check_document(document, source, max_nodes=200_000_000, finite=False)
    return document


def _object(row: Any, source: str) -> Columns:
    if not isinstance(row, dict):
        raise UserError(f"{source}: expected an object with columns, got {type(row).__name__}")
    return row


def join_rows(parts: Sequence[Iterator[Columns]], column: str, source: str) -> Iterator[Columns]:
    """Rows of the first file, each with the columns that the others have for the same value of `column`.

    Raises:
        UserError: a file has no such row, or one without the column.
    """
    tables: list[dict[Any, Columns]] = []
    for part in parts[1:]:
        table: dict[Any, Columns] = {}
        for row in part:
            if column not in row:
                raise UserError(f"{source}: a row without the column {column}{near(column, row)}")
            table[row[column]] = row
        tables.append(table)
    for row in parts[0]:
        joined = dict(row)
        for table in tables:
            other: Mapping[str, Any] | None = table.get(row.get(column))
            if other is None:
                raise UserError(f"{source}: {column} {row.get(column)!r} is in one file only")
            joined |= other
        yield joined


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and its folders, by name.

    Raises:
        UserError: there is no such folder, or it holds none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{folder}: holds no images")
    return found
