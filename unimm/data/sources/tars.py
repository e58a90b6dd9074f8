"""webdataset tars, read by random access: the place of every member is kept in an index beside each tar.

A sample is the members of one name (`unimm.data.sources.tar_scan`): images are known by their extension (`jpg`,
`0.png`), words are `txt`, everything else comes from `json`, in any form that `unimm.data.sources.rows` takes. The
index is a safetensors file, which is checked, never trusted: it is made anew when the tar's size or time differs or
when it cannot be right; where the folder may not be written it is made in memory. Of many tars, one more file
(`tars.index`) says how many samples each has, so that a process that opens them need not open every index.
"""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unimm.data.sources.entries import RowEntry, RowSource
from unimm.data.sources.images import find_file, inline_bytes
from unimm.data.sources.reach import Reach
from unimm.data.sources.rows import Reading, row_key
from unimm.data.sources.tar_scan import BLOCK, NO_FILE, TEXT_EXTENSIONS, TarIndex, is_image_member, scan_tar
from unimm.data.sources.text import clip, decode_text, parse_strict_json
from unimm.errors import UserError
from unimm.files import atomic_write, read_json, sweep
from unimm.processing.messages import BadRecord, Blob, digest

INDEX_SUFFIX = ".index"
INDEX_FORMAT = "2"
PLAN_FILE = "codes.json"  # beside tars that `unimm data encode` wrote
OPEN_INDEXES = 256  # held in memory at once
COUNTS_FILE = "tars.index"  # beside many tars: how many samples each has
MANY = 64  # tars; for fewer it is not worth a file
INDEX_ROOM = 1 << 20  # bytes that an index may be larger than its tar
_WRONG = (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError)


def index_file(path: Path) -> Path:
    """Where the index of a tar is kept."""
    return path.with_name(path.name + INDEX_SUFFIX)


def _state(path: Path) -> tuple[int, int]:
    """A tar's size in bytes and its time in nanoseconds."""
    try:
        state = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return state.st_size, state.st_mtime_ns


def _stamp(size: int, time: int) -> dict[str, str]:
    """What must agree for an index to be a tar's."""
    return {"format": INDEX_FORMAT, "size": str(size), "time": str(time)}


@contextmanager
def _opened(file: Path, size: int) -> Iterator[tuple[Any, Mapping[str, str]]]:
    """A safetensors file of ours and its notes; anything else (a link, a pipe, a giant) is an `OSError`."""
    state = os.lstat(file)
    if not stat.S_ISREG(state.st_mode) or state.st_size > size:
        raise OSError(f"{file}: no index")
    with safe_open(file, framework="np") as stored:
        yield stored, stored.metadata() or {}


def count_samples(path: Path, keep: bool = True) -> int:
    """How many samples a tar has, from its index, which is built (and kept) if it is missing, out of date or wrong."""
    size, time = _state(path)
    stamp = _stamp(size, time)
    with suppress(*_WRONG), _opened(index_file(path), size + INDEX_ROOM) as (stored, notes):
        samples = int(notes["samples"])
        places = {name: tuple(stored.get_slice(name).get_shape()) for name in ("starts", "key_ends")}
        honest = places == dict.fromkeys(places, (samples + 1,)) and 0 <= samples <= size // BLOCK
        if honest and {name: notes.get(name) for name in stamp} == stamp:
            return samples
    return len(_build(path, stamp, keep).starts) - 1


class TarCounts:
    """How many samples each of many tars has, kept in one file beside them.

    Args:
        file: where it is kept; a missing or damaged one is made again by `save`.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.folder = file, f"{file.parent}{os.sep}"  # names below it are kept without it
        self.known: dict[str, tuple[int, int, int]] = {}
        self.changed = False
        with suppress(*_WRONG), _opened(file, INDEX_ROOM << 10) as (stored, notes):
            if notes.get("format") == INDEX_FORMAT:
                self.known = _read_counts(stored)

    def count(self, path: Path, keep: bool = True) -> tuple[int, int, int]:
        """A tar's samples, size and time; `keep` writes the index of a tar that has none.

        Raises:
            UserError: the tar is broken.
        """
        size, time = _state(path)
        name = os.fspath(path).removeprefix(self.folder)
        found = self.known.get(name)
        if found is None or found[1:] != (size, time) or not 0 <= found[0] <= size // BLOCK:
            found = self.known[name] = (count_samples(path, keep), size, time)
            self.changed = True
        return found

    def save(self) -> None:
        """Write what is new, if there is much to keep and the folder may be written."""
        if not self.changed or len(self.known) < MANY:
            return
        names = np.frombuffer(json.dumps([*self.known]).encode(), np.uint8)
        rows = np.array([*self.known.values()], np.int64)
        arrays: dict[str, NDArray[Any]] = {"names": names, "rows": rows}
        with suppress(UserError, OSError), atomic_write(self.file) as temporary:
            save_file(arrays, temporary, {"format": INDEX_FORMAT})


def _read_counts(stored: Any) -> dict[str, tuple[int, int, int]]:
    """Name -> samples, size and time.

    Raises:
        ValueError: the names are no texts, or not as many as the rows.
    """
    names = json.loads(stored.get_tensor("names").tobytes())
    rows: NDArray[Any] = stored.get_tensor("rows")
    if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != 3:
        raise ValueError("rows")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names")
    return {name: tuple(row) for name, row in zip(names, rows.tolist(), strict=True)}


def _build(path: Path, stamp: dict[str, str], keep: bool) -> TarIndex:
    """Scan a tar and write its index, if that is to be kept and its folder may be written."""
    index = scan_tar(path)
    if not keep:
        return index
    metadata = {**stamp, "samples": str(len(index.starts) - 1), "names": json.dumps(index.names)}
    arrays = {name: value for name, value in index._asdict().items() if name != "names"}
    with suppress(UserError, OSError), atomic_write(index_file(path)) as temporary:
        save_file(arrays, temporary, metadata)
    return index


@functools.lru_cache(maxsize=OPEN_INDEXES)
def _load(path: Path, size: int, time: int, keep: bool) -> TarIndex:
    """The index of a tar of this size and time, built (and kept) if there is none."""
    stamp = _stamp(size, time)
    with suppress(*_WRONG), _opened(index_file(path), size + INDEX_ROOM) as (stored, notes):
        if {name: notes.get(name) for name in stamp} == stamp:
            arrays = {name: stored.get_tensor(name) for name in TarIndex._fields if name != "names"}
            index = TarIndex(names=json.loads(notes["names"]), **arrays)
            if index.fits(size):
                return index
    return _build(path, stamp, keep)


class TarShards(RowSource):
    """The samples of one or many tars.

    Args:
        paths: the tars, in the order of their records.
        reading: how to read the samples.
        location: what the user called them.
        strict: whether a broken tar is an error; else it is left out and named in `broken`.

    Raises:
        UserError: a tar is broken, or the pre-encoded tars' plan is.
    """

    form = "webdataset"

    def __init__(self, paths: Sequence[Path], reading: Reading, location: str, strict: bool = True) -> None:
        super().__init__(reading, location)
        self.paths: list[Path] = []
        kept: list[tuple[int, int, int]] = []
        counts = TarCounts(paths[0].parent / COUNTS_FILE) if paths else None
        keeps = _keepers(paths, Path(location) if os.path.isdir(location) else _shared_folder(paths))
        self._keeps: list[bool] = []  # of each tar, whether its index is written
        for path in paths:
            assert counts is not None
            try:
                kept.append(counts.count(path, path.parent in keeps))
            except UserError as error:
                if strict:
                    raise
                self.broken.append(BadRecord("", str(path), str(error).removeprefix(f"{path}: ")))
                continue
            self.paths.append(path)
            self._keeps.append(path.parent in keeps)
        if counts is not None and paths[0].parent in keeps:
            counts.save()
        numbers = np.array(kept, np.int64).reshape(-1, 3)
        self.ends = np.cumsum(numbers[:, 0])
        self.states = numbers[:, 1:]  # size and time of each tar, int64 [N, 2]
        self.mark, self.encoder = read_marks(paths[0].parent / PLAN_FILE) if paths else (None, None)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """Which tar holds the record at `index`, and which of its samples it is."""
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - (int(self.ends[shard - 1]) if shard else 0)

    def place(self, index: int) -> str:
        """The tar, and the name of the sample."""
        path, key, _ = self.members(index)
        return f"{path}: {key}"

    def entry(self, index: int) -> RowEntry:
        """The sample at `index` as a row; see `RowSource.entry`."""
        path, key, members = self.members(index)
        try:
            row = sample_row(members)
        except UserError as error:
            raise BadRecord(key, str(path), str(error).removeprefix(f"{path}: ")) from None
        return RowEntry(row_key(row, key), str(path), row, functools.partial(find_member, members))

    def members(self, index: int) -> tuple[Path, str, dict[str, Blob]]:
        """The tar, the key and the members by extension of the sample at `index`.

        Raises:
            BadRecord: a member is no file, or stands twice, or the tar has other samples than were counted.
        """
        index = self.check_index(index)
        shard, sample = self.locate(index)
        path = self.paths[shard]
        tar = _load(path, *self.states[shard].tolist(), self._keeps[shard])
        first = int(self.ends[shard - 1]) if shard else 0
        if len(tar.starts) - 1 != int(self.ends[shard]) - first:
            reason = f"has other samples than {COUNTS_FILE} says; remove that file"
            raise BadRecord(f"sample {sample}", str(path), reason)
        key = clip(tar.key(sample), 200)
        members: dict[str, Blob] = {}
        for m in range(*tar.starts[sample : sample + 2].tolist()):
            extension = tar.names[tar.extensions[m]]
            offset, size = int(tar.offsets[m]), int(tar.sizes[m])
            if extension in members:
                raise BadRecord(key, str(path), f"{clip(extension)}: stands twice under this name")
            if size == NO_FILE:
                raise BadRecord(key, str(path), f"{clip(extension)}: a link or a device, not a file")
            name = f"{path}: {key}.{clip(extension)}"
            members[extension] = Blob(name, path=str(path), offset=offset, size=size)
        return path, key, members

    def files(self) -> Sequence[Path]:
        """The tars."""
        return self.paths

    def signature(self) -> str:
        """A digest of the tars as they were when they were opened; no tar is looked at again."""
        states = zip(self.paths, self.states.tolist(), strict=True)
        return digest(f"{path} {size} {time}" for path, (size, time) in states)


def _keepers(paths: Sequence[Path], root: Path) -> set[Path]:
    """The folders of tars into which indexes are written: not those to which a link in the data leads, elsewhere."""
    reach = Reach(root)
    keepers = {folder for folder in {path.parent for path in paths} if reach.holds(folder / COUNTS_FILE)}
    for folder in keepers:
        sweep(folder)
    return keepers


def _shared_folder(paths: Sequence[Path]) -> Path:
    """The folder that tars share."""
    return Path(os.path.commonpath([os.path.abspath(path.parent) for path in paths] or ["."]))


def read_marks(path: Path) -> tuple[str | None, str | None]:
    """Which image tokenizer and which encoder pre-encoded tars are of; None for tars of images."""
    if not path.is_file():
        return None, None
    try:
        plan = read_json(path)
        tokenizer, encoder = plan["tokenizer"], plan.get("encoder")
    except (UserError, KeyError):
        raise UserError(f"{path}: damaged; write the folder again with `unimm data encode`") from None
    return str(tokenizer), None if encoder is None else str(encoder)


def sample_row(members: dict[str, Blob]) -> dict[str, Any]:
    """The members of one sample as a row: what its JSON says, its words as `text`, its images as `image(s)`."""
    row: dict[str, Any] = {}
    if (name := _only(members, ("json",))) is not None:
        try:
            said = parse_strict_json(members[name].read())
        except UserError as error:
            raise UserError(f"{name}: {str(error).removeprefix(f'{members[name].name}: ')}") from None
        row = dict(said) if isinstance(said, dict) else {"messages": said}
    if (name := _only(members, TEXT_EXTENSIONS)) is not None:
        try:
            row["text"] = decode_text(members[name].read())
        except UserError as error:
            raise UserError(f"{name}: {str(error).removeprefix(f'{members[name].name}: ')}") from None
    images = [members[extension] for extension in sorted(members, key=_natural) if is_image_member(extension)]
    if images:
        _place_images(row, images, members)
    return row


def _place_images(row: dict[str, Any], images: Sequence[Blob], members: Mapping[str, Blob]) -> None:
    """Put a sample's images where its row names images; names that are no members are of some other place."""
    name = next((name for name in ("images", "image") if name in row), None)
    named = [] if name is None else row[name] if isinstance(row[name], list) else [row[name]]
    if named and all(value is None or (isinstance(value, str) and value in members) for value in named):
        return
    if name == "images" and sum(value is not None for value in named) == len(images):
        left = iter(images)  # a document has null where a text stands
        row["images"] = [None if value is None else next(left) for value in named]
        return
    row.pop("images", None)
    row["image" if len(images) == 1 else "images"] = images[0] if len(images) == 1 else list(images)


def _only(members: Mapping[str, Blob], kinds: Sequence[str]) -> str | None:
    """The one member of some kinds: the one of no other name, where there are several.

    Raises:
        UserError: there are several, all of other names.
    """
    found = [extension for extension in members if extension.rpartition(".")[2] in kinds]
    plain = [extension for kind in kinds for extension in found if extension == kind]
    if len(found) > 1 and not plain:
        raise UserError(f"{', '.join(map(clip, found))}: which of them counts? name one .{kinds[0]}")
    return next(iter(plain or found), None)


def _natural(extension: str) -> list[tuple[int, str, str]]:
    """A sort key by which `2.jpg` comes before `10.jpg`: of numbers the one of fewer digits is the smaller."""
    found = ((digits.lstrip("0"), rest) for digits, rest in re.findall(r"(\d+)|(\D+)", extension))
    return [(len(digits), digits, rest) for digits, rest in found]


def find_member(members: dict[str, Blob], value: Any) -> Blob:
    """The blob of what a sample's JSON says of an image: the name of a member, or what `find_file` takes.

    Raises:
        UserError: there is no such member.
    """
    if isinstance(value, Mapping) and not value.get("bytes"):
        value = next((value[name] for name in ("path", "url", "image") if value.get(name)), value)
    if isinstance(value, str):
        if value.lower() in members:
            return members[value.lower()]
        if (data := inline_bytes(value)) is not None:
            return Blob("an image of this row", data)
        raise UserError(f"image: {clip(value)}: no such member of the sample (it has {', '.join(members)})")
    return find_file(Path(), value)
