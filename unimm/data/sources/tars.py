"""webdataset tars by random access, through an offset index that is built beside each (`shard.tar.index`).

A sample is the run of members whose names agree up to the first dot of the base name; what follows is the member's
extension (webdataset's convention). Pictures are known by it (`jpg`, `0.png`), words are `txt`, everything else
comes from `json`, in any form that `unimm.data.sources.rows` takes. The index is a safetensors file and is made anew
when the tar's size or time differs; where the folder may not be written it is made in memory. Of many tars, one more
file (`tars.index`) says how many samples each has, so that a process that opens them need not open every index.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unimm.data.sources.lines import find_file
from unimm.data.sources.record import CODES_SUFFIX, FEATURES_SUFFIX, BadRecord, Blob, Record, Source
from unimm.data.sources.rows import Reading, make_record, row_key
from unimm.errors import UserError
from unimm.images import atomic_write

INDEX_SUFFIX = ".index"
INDEX_FORMAT = "1"
PLAN_FILE = "codes.json"  # beside tars that `unimm data encode` wrote
BLOCK = 512  # bytes; a tar is made of these
OPEN_INDEXES = 256  # held in memory at once
COUNTS_FILE = "tars.index"  # beside many tars: how many samples each has
MANY = 64  # tars; for fewer it is not worth a file
WORDS = ("txt", "text", "caption")
_PICTURE = re.compile(r"^(?:.*\.)?(?:jpe?g|png|webp|gif|bmp|tiff?)$")


class TarIndex(NamedTuple):
    """Where everything lies in one tar of N samples and M members.

    Attributes:
        starts: int64 [N + 1], the first member of each sample.
        offsets, sizes: int64 [M], of each member's bytes.
        extensions: int64 [M], numbers of `names`.
        names: the extensions.
        keys: uint8 [bytes], the samples' keys one after the other, each ended by a line end.
        key_ends: int64 [N + 1], where they end.
    """

    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    extensions: NDArray[np.int64]
    names: list[str]
    keys: NDArray[np.uint8]
    key_ends: NDArray[np.int64]

    def key(self, sample: int) -> str:
        """The key of a sample."""
        first, last = self.key_ends[sample : sample + 2].tolist()
        return self.keys[first:last].tobytes().decode("utf-8", "surrogateescape").rstrip("\n")


def split_name(name: str) -> tuple[str, str]:
    """A member's name as key and extension: `a/b.0.JPG` is `a/b` and `0.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def scan_tar(path: Path) -> TarIndex:
    """Read the headers of a tar.

    Raises:
        UserError: it is no plain tar, or damaged or cut short; the message names it.
    """
    members: list[tuple[str, str, int, int]] = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    members.append((*split_name(member.name), member.offset_data, member.size))
            # tarfile takes a damaged header for the end; the true end is a block of zeros.
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):
                raise UserError(f"{path}: damaged or cut short at byte {tar.offset}")
    except tarfile.TarError as error:
        packed = path.open("rb").read(2) == b"\x1f\x8b"
        hint = "compressed, and cannot be read by random access; unpack it with gunzip" if packed else error
        raise UserError(f"{path}: {hint if packed else f'not a whole tar ({error})'}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return _index_members(members)


def _index_members(members: Sequence[tuple[str, str, int, int]]) -> TarIndex:
    """Group members (key, extension, offset, size) into samples; hidden files and names without a key are left out."""
    kept = [m for m in members if m[0] and not m[0].rpartition("/")[2].startswith((".", "__"))]
    starts = [i for i, member in enumerate(kept) if i == 0 or member[0] != kept[i - 1][0]]
    names = sorted({member[1] for member in kept})
    number = {name: i for i, name in enumerate(names)}
    keys = [f"{kept[i][0]}\n".encode("utf-8", "surrogateescape") for i in starts]
    return TarIndex(
        np.array([*starts, len(kept)], np.int64),
        np.array([member[2] for member in kept], np.int64),
        np.array([member[3] for member in kept], np.int64),
        np.array([number[member[1]] for member in kept], np.int64),
        names,
        np.frombuffer(b"".join(keys), np.uint8),
        np.cumsum([0, *map(len, keys)]).astype(np.int64),
    )


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


def count_samples(path: Path) -> int:
    """How many samples a tar has, from its index, which is built if it is missing or out of date."""
    stamp = _stamp(*_state(path))
    with suppress(OSError, SafetensorError), safe_open(index_file(path), framework="np") as stored:
        found = stored.metadata() or {}
        if {name: found.get(name) for name in stamp} == stamp:
            return int(found["samples"])
    return len(_build(path, stamp).starts) - 1


class TarCounts:
    """How many samples each of many tars has, kept in one file beside them.

    Args:
        file: where it is kept; a missing or damaged one is made again by `save`.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.folder = file, f"{file.parent}{os.sep}"  # names below it are kept without it
        self.known: dict[str, tuple[int, int, int]] = {}
        self.changed = False
        with suppress(OSError, SafetensorError), safe_open(file, framework="np") as stored:
            if (stored.metadata() or {}).get("format") == INDEX_FORMAT:
                names = json.loads(stored.get_tensor("names").tobytes())
                rows = stored.get_tensor("rows").tolist()
                self.known = {name: tuple(row) for name, row in zip(names, rows, strict=True)}

    def count(self, path: Path) -> tuple[int, int, int]:
        """A tar's samples, size and time.

        Raises:
            UserError: the tar is broken.
        """
        size, time = _state(path)
        name = os.fspath(path).removeprefix(self.folder)
        found = self.known.get(name)
        if found is None or found[1:] != (size, time):
            found = self.known[name] = (count_samples(path), size, time)
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


def _build(path: Path, stamp: dict[str, str]) -> TarIndex:
    """Scan a tar and write its index, if its folder may be written."""
    index = scan_tar(path)
    metadata = {**stamp, "samples": str(len(index.starts) - 1), "names": json.dumps(index.names)}
    arrays = {name: value for name, value in index._asdict().items() if name != "names"}
    with suppress(UserError, OSError), atomic_write(index_file(path)) as temporary:
        save_file(arrays, temporary, metadata)
    return index


@functools.lru_cache(maxsize=OPEN_INDEXES)
def _load(path: Path, size: int, time: int) -> TarIndex:
    """The index of a tar of this size and time."""
    stamp = _stamp(size, time)
    with suppress(OSError, SafetensorError), safe_open(index_file(path), framework="np") as stored:
        found = stored.metadata() or {}
        if {name: found.get(name) for name in stamp} == stamp:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return TarIndex(names=json.loads(found["names"]), **arrays)
    return _build(path, stamp)


class TarShards(Source):
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
        super().__init__(location)
        self.reading = reading
        self.paths: list[Path] = []
        kept: list[tuple[int, int, int]] = []
        counts = TarCounts(paths[0].parent / COUNTS_FILE) if paths else None
        for path in paths:
            assert counts is not None
            try:
                kept.append(counts.count(path))
            except UserError as error:
                if strict:
                    raise
                self.broken.append(BadRecord("", str(path), str(error).removeprefix(f"{path}: ")))
                continue
            self.paths.append(path)
        if counts is not None:
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

    def __getitem__(self, index: int) -> Record:
        path, key, members = self.members(index)
        try:
            row = sample_row(members)
            return make_record(
                row_key(row, key), row, lambda value: find_member(members, value), self.reading
            )
        except UserError as error:
            raise BadRecord(key, str(path), str(error).removeprefix(f"{path}: ")) from None

    def members(self, index: int) -> tuple[Path, str, dict[str, Blob]]:
        """The tar, the key and the members by extension of the sample at `index`."""
        index = self.check_index(index)
        shard, sample = self.locate(index)
        path = self.paths[shard]
        tar = _load(path, *self.states[shard].tolist())
        key = tar.key(sample)
        members: dict[str, Blob] = {}
        for m in range(*tar.starts[sample : sample + 2].tolist()):
            extension = tar.names[tar.extensions[m]]
            name = f"{path}: {key}.{extension}"
            members[extension] = Blob(
                name, path=str(path), offset=int(tar.offsets[m]), size=int(tar.sizes[m])
            )
        return path, key, members

    def files(self) -> Sequence[Path]:
        """The tars."""
        return self.paths


def read_marks(path: Path) -> tuple[str | None, str | None]:
    """Which image tokenizer and which encoder pre-encoded tars are of; None for tars of pictures."""
    if not path.is_file():
        return None, None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return str(plan["tokenizer"]), plan.get("encoder")
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{path}: damaged; write the folder again with `unimm data encode`") from None


def sample_row(members: dict[str, Blob]) -> dict[str, Any]:
    """The members of one sample as a row: what its JSON says, its words as `text`, its pictures as `image(s)`."""
    row: dict[str, Any] = {}
    if "json" in members:
        try:
            said = json.loads(members["json"].read())
        except (ValueError, RecursionError) as error:
            raise UserError(f"json: not JSON ({error})") from None
        row = dict(said) if isinstance(said, dict) else {"messages": said}
    for extension in WORDS:
        if extension in members:
            try:
                row["text"] = members[extension].read().decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{extension}: not a text in UTF-8") from None
            break
    pictures = [members[extension] for extension in sorted(members, key=_natural) if is_picture(extension)]
    named = [row[name] for name in ("images", "image") if name in row]
    if pictures and not (named and _all_members(named[0], members)):
        row.pop("images", None)
        row["image" if len(pictures) == 1 else "images"] = pictures[0] if len(pictures) == 1 else pictures
    return row


def is_picture(extension: str) -> bool:
    """Whether a member of this extension is a picture, or the image codes or the features of one."""
    stored = f".{extension}".endswith((CODES_SUFFIX, FEATURES_SUFFIX))
    return stored or _PICTURE.match(extension) is not None


def _natural(extension: str) -> list[tuple[int, str]]:
    """A sort key by which `2.jpg` comes before `10.jpg`."""
    return [(int(digits or 0), rest) for digits, rest in re.findall(r"(\d+)|(\D+)", extension)]


def _all_members(named: Any, members: dict[str, Blob]) -> bool:
    """Whether the JSON's words for its pictures are members of this sample (else they are of some other place)."""
    listed = named if isinstance(named, list) else [named]
    return all(isinstance(value, str | None) and (value is None or value in members) for value in listed)


def find_member(members: dict[str, Blob], value: Any) -> Blob:
    """The blob of what a sample's JSON says of a picture: the name of a member, or what `find_file` takes.

    Raises:
        UserError: there is no such member.
    """
    if isinstance(value, str):
        if value.lower() in members:
            return members[value.lower()]
        raise UserError(f"image: {value}: no such member of the sample (it has {', '.join(members)})")
    return find_file(Path(), value)
