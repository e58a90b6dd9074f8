"""Data as people have it, by random access: `open_source(path)` finds out the form and gives typed records.

Forms: a folder of pictures with a list (JSONL) or a text file beside each; LLaVA's and ShareGPT's JSON; webdataset
tars; Parquet; `datasets` folders. `unimm.data.sources.record` says how each becomes a `Record`.
"""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

from unimm.data.sources.folder import PictureFolder
from unimm.data.sources.lines import JsonRows
from unimm.data.sources.record import RECORD_KINDS, BadRecord, Blob, Message, Picture, Record, Source
from unimm.data.sources.rows import Reading
from unimm.data.sources.tables import DatasetFolder, ParquetRows
from unimm.data.sources.tars import TarShards
from unimm.errors import UserError

__all__ = [
    "RECORD_KINDS",
    "BadRecord",
    "Blob",
    "Message",
    "Picture",
    "Reading",
    "Record",
    "Source",
    "expand",
    "open_source",
]

LISTS = ("metadata.jsonl", "metadata.json", "data.jsonl", "data.json", "captions.jsonl")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_WAYS_OUT = "expected pictures, *.jsonl, *.json, *.tar, *.parquet or a datasets folder"


def open_source(path: str | Path, reading: Reading | None = None, strict: bool = True) -> Source:
    """Open data in whatever form it is.

    Args:
        path: a file, a folder, or a pattern of files (`shards/*.tar`, `shards/{000..015}.tar`).
        reading: how to read it.
        strict: False leaves out tars and Parquet files that are broken, and names them in `Source.broken`.

    Raises:
        UserError: nothing is there, the form is not known, or (if strict) a file is broken.
    """
    location, reading = str(path), reading or Reading()
    given = Path(path)
    if given.is_dir():
        return _open_folder(given, reading, location, strict)
    files = [given] if given.exists() else expand(location)
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".tar"}:
        return TarShards(files, reading, location, strict)
    if suffixes == {".parquet"}:
        return ParquetRows(files, reading, location, strict)
    if suffixes <= {".json", ".jsonl"} and len(files) == 1:
        return JsonRows(files[0], reading, location)
    if len(suffixes) > 1 or len(files) > 1:
        raise UserError(
            f"{location}: {len(files)} files; only tars and Parquet files are read several at once"
        )
    if given.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"{location}: compressed tars cannot be read by random access; unpack it with gunzip")
    raise UserError(f"{location}: of no known form; {_WAYS_OUT}")


def expand(pattern: str) -> list[Path]:
    """The files of a pattern with `*`, `?` or one `{000..015}`, sorted.

    Raises:
        UserError: there are none; of a range, each that is missing is an error of its own when it is opened.
    """
    match = _RANGE.search(pattern)
    if match is not None:
        width = len(match[1])
        numbers = range(int(match[1]), int(match[2]) + 1)
        head, tail = pattern[: match.start()], pattern[match.end() :]
        files = [Path(f"{head}{number:0{width}}{tail}") for number in numbers]
    else:
        files = sorted(map(Path, glob(pattern)))
    if not files:
        raise UserError(f"{pattern}: no such file or folder")
    return files


def _below(folder: Path, suffix: str) -> list[Path]:
    """The files of a suffix in a folder, else those below it; hidden ones are somebody's leftovers."""
    for found in (folder.glob(f"*{suffix}"), folder.rglob(f"*{suffix}")):
        if files := sorted(path for path in found if not path.name.startswith(".")):
            return files
    return []


def _open_folder(folder: Path, reading: Reading, location: str, strict: bool) -> Source:
    """A folder, by what lies in it."""
    names = {path.name for path in folder.iterdir()}
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        return DatasetFolder(folder, reading, location)
    if tars := _below(folder, ".tar"):
        return TarShards(tars, reading, location, strict)
    if tables := _below(folder, ".parquet"):
        return ParquetRows(tables, reading, location, strict)
    lists = [folder / name for name in LISTS if name in names]
    lists = lists or sorted(
        p for p in folder.iterdir() if p.suffix in (".jsonl", ".json") and p.name[0] != "."
    )
    if len(lists) > 1 and lists[0].name not in LISTS:
        found = ", ".join(path.name for path in lists[:5])
        raise UserError(f"{location}: several lists ({found}); name one of them as the source")
    if lists:
        return JsonRows(lists[0], reading, location)
    source = PictureFolder(folder, reading, location)
    if not len(source):
        raise UserError(f"{location}: holds no data; {_WAYS_OUT}")
    return source
