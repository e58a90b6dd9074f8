"""Data as people have it, by random access: `open_source(path)` finds out the form and gives typed records.

Forms: a folder of images with a list (JSONL, CSV) or a file beside each; LLaVA's, ShareGPT's and other JSON; COCO's
captions; webdataset tars; Parquet; `datasets` folders. `unimm.data.sources.rows` says which rows there are, and
`unimm.processing.messages` how each becomes a `Record`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path

from unimm.data.sources.entries import RowSource
from unimm.data.sources.folder import ImageFolder
from unimm.data.sources.lines import LIST_SUFFIXES, CsvRows, JsonRows
from unimm.data.sources.reach import WAY_OUT, Reach, walk
from unimm.data.sources.rows import Reading
from unimm.data.sources.splits import choose_split, split_folder
from unimm.data.sources.tables import DatasetFolder, ParquetRows
from unimm.data.sources.tars import TarShards
from unimm.errors import UserError, UserNote
from unimm.images import SUFFIXES
from unimm.processing.messages import RECORD_KINDS, BadRecord, Blob, ImagePart, Message, Record, Source

__all__ = [
    "RECORD_KINDS",
    "BadRecord",
    "Blob",
    "Location",
    "Message",
    "ImagePart",
    "Reading",
    "Record",
    "RowSource",
    "Source",
    "expand",
    "location_name",
    "open_source",
]

Location = str | Path | Sequence[str]
"""A file, a folder or a pattern of files; or a list of files, as a shell makes of a pattern."""
LISTS = tuple(
    f"{name}{suffix}" for name in ("metadata", "data", "captions") for suffix in (".jsonl", ".json", ".csv")
)
MAX_FILES = 1_000_000  # that a range may stand for
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_WAYS_OUT = "expected images, *.jsonl, *.json, *.csv, *.tar, *.parquet or a datasets folder"


def open_source(path: Location, reading: Reading | None = None, strict: bool = True) -> Source:
    """Open data in whatever form it is.

    Args:
        path: a file, a folder, a pattern of files (`shards/*.tar`, `shards/{000..015}.tar`), or a list of files.
        reading: how to read it.
        strict: False leaves out tars and Parquet files that are broken, and names them in `Source.broken`; what else is
            left out (linked folders that lead elsewhere) is named there in any case, and if strict said as a note.

    Raises:
        UserError: nothing is there, the form is not known, or (if strict) a file is broken.
    """
    location, reading = location_name(path), reading or Reading()
    if isinstance(path, str | Path) and os.path.isdir(path):
        return _open_folder(Path(path), reading, location, strict)
    names = [str(path)] if isinstance(path, str | Path) else list(path)
    files = [file for name in names for file in ([Path(name)] if os.path.exists(name) else expand(name))]
    return _open_files(files, reading, location, strict)


def location_name(path: Location) -> str:
    """What messages call a location."""
    if isinstance(path, str | Path):
        return str(path)
    if not path:
        raise UserError("no files are named")
    return path[0] if len(path) == 1 else f"{path[0]} … {path[-1]} ({len(path)} files)"


def _open_files(files: list[Path], reading: Reading, location: str, strict: bool) -> Source:
    """Files that the user has named, all of one form."""
    suffixes = {file.suffix.lower() for file in files}
    if suffixes in ({".tar"}, {".parquet"}):
        files = choose_split(files, _common(files), reading.split, location)
        return (TarShards if suffixes == {".tar"} else ParquetRows)(files, reading, location, strict)
    if len(files) > 1:
        raise UserError(
            f"{location}: {len(files)} files; only tars and Parquet files are read several at once"
        )
    file = files[0]
    if file.suffix.lower() in LIST_SUFFIXES:
        return _open_list(file, reading, location)
    if file.name.endswith((".tar.gz", ".tgz")):
        raise UserError(f"{location}: compressed tars cannot be read by random access; unpack it with gunzip")
    raise UserError(f"{location}: of unknown form; {_WAYS_OUT}")


def _common(files: Sequence[Path]) -> Path:
    """The folder that the files share, whose own name says nothing of splits."""
    first, *rest = [file.parent for file in files]
    shared = (up for up in (first, *first.parents) if all(other.is_relative_to(up) for other in rest))
    return next(shared, first)


def _open_list(file: Path, reading: Reading, location: str) -> Source:
    rows = CsvRows if file.suffix.lower() in (".csv", ".tsv") else JsonRows
    return rows(file, reading, location)


def expand(pattern: str) -> list[Path]:
    """The files of a pattern with `*`, `?` or one `{000..015}`, sorted.

    Raises:
        UserError: there are none, or a range stands for too many; of a range, each that is missing is an error of its
            own when it is opened.
    """
    match = _RANGE.search(pattern)
    if match is not None:
        width, first, last = len(match[1]), int(match[1]), int(match[2])
        if last - first >= MAX_FILES:
            raise UserError(f"{pattern}: a range of {last - first + 1} files, more than {MAX_FILES}")
        head, tail = pattern[: match.start()], pattern[match.end() :]
        files = [Path(f"{head}{number:0{width}}{tail}") for number in range(first, last + 1)]
    else:
        try:
            files = sorted(map(Path, glob(pattern)))
        except (OSError, ValueError, re.error):
            files = []
    if not files:
        raise UserError(f"{pattern}: no such file or folder")
    return files


def _open_folder(folder: Path, reading: Reading, location: str, strict: bool) -> Source:
    """A folder, by what lies in it."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
        return DatasetFolder(folder, reading, location)
    inside = _Inside(folder, reading, location)
    for suffix in (".tar", ".parquet"):
        if files := inside.below(suffix):
            files = choose_split(files, folder, reading.split, location)
            files = [file for file in files if inside.allows(file, strict)]
            source: Source = (TarShards if suffix == ".tar" else ParquetRows)(
                files, reading, location, strict
            )
            return inside.report_left_out(source, strict)
    if (file := inside.list_file(names)) is not None:
        return inside.report_left_out(_open_list(file, reading, location), strict)
    if not any(Path(name).suffix.lower() in SUFFIXES for name in names):
        chosen = split_folder(folder, reading.split, location)
        if chosen is not None and inside.allows(chosen, strict):
            return _open_folder(chosen, replace(reading, split=None), location, strict)
    images = ImageFolder(folder, reading, location)
    if not len(images):
        refused = f"; {images.broken[0]}" if images.broken else ""
        raise UserError(f"{location}: holds no data; {_WAYS_OUT}{refused}")
    return inside.report_left_out(images, strict)


class _Inside:
    """What lies in a folder and below, and what of it leads out."""

    def __init__(self, folder: Path, reading: Reading, location: str) -> None:
        self.folder, self.reading, self.location = folder, reading, location
        self.reach = Reach(folder, reading.allow_outside)
        self.bad: list[BadRecord] = []

    def below(self, suffix: str) -> list[Path]:
        """The files of a suffix in the folder, else those below it; hidden ones are somebody's leftovers."""
        named = (path for path in self.folder.glob(f"*{suffix}") if not path.name.startswith("."))
        found = [path for path in named if not path.is_dir()]
        if found:
            return sorted(found)
        refused: list[Path] = []
        found = [path for path in walk(self.reach, refused.append) if path.suffix == suffix]
        if found:
            reason = f"a link that leads out of {self.folder}, not followed; {WAY_OUT}"
            self.bad += [BadRecord("", str(path), reason) for path in refused]
        return sorted(found)

    def allows(self, file: Path, strict: bool) -> bool:
        """Whether a file may be read; one that may not be is bad.

        Raises:
            UserError: it may not, and `strict`.
        """
        try:
            self.reach.check(file)
        except UserError as error:
            if strict:
                raise
            self.bad.append(BadRecord("", str(file), str(error).removeprefix(f"{file}: ")))
            return False
        return True

    def list_file(self, names: set[str]) -> Path | None:
        """The folder's list of records; None where it has none, or a JSON file beside each image.

        Raises:
            UserError: there are several, or it is a link that leads out.
        """
        found = [self.folder / name for name in LISTS if name in names][:1]
        if not found:
            lists = [
                path
                for path in sorted(map(Path, names))
                if path.suffix in LIST_SUFFIXES and path.name[0] != "."
            ]
            images = {Path(name).stem for name in names if Path(name).suffix.lower() in SUFFIXES}
            if lists and all(path.suffix == ".json" and path.stem in images for path in lists):
                return None
            found = [self.folder / path for path in lists]
            if len(found) > 1:
                found = choose_split(found, self.folder, self.reading.split, self.location)
        if len(found) > 1:
            shown = ", ".join(path.name for path in found[:5])
            raise UserError(f"{self.location}: several lists ({shown}); name one of them as the source")
        for file in found:
            self.reach.check(file)
        return next(iter(found), None)

    def report_left_out(self, source: Source, strict: bool) -> Source:
        """The source, which now names what was left out."""
        source.broken[:0] = self.bad
        if strict:
            for bad in source.broken:
                warnings.warn(f"{self.location}: {bad}", UserNote, stacklevel=4)
        return source
