"""What lies where in a tar, by its headers alone, and which members make a sample together.

Members of one name are a sample, wherever they stand in the tar. As in webdataset a name ends at the first dot of the
file's (`0001.0.jpg` is `0.jpg` of `0001`), unless the words of a sample say that it goes on: with `img.v1.txt` beside
it, `img.v1.jpg` is `jpg` of `img.v1`.
"""

from __future__ import annotations

import errno
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from unimm.errors import UserError
from unimm.files import open_regular
from unimm.images import SUFFIXES
from unimm.processing.messages import CODES_SUFFIX, FEATURES_SUFFIX

BLOCK = 512  # bytes; a tar is made of these
MAX_HEADER = 1 << 20  # bytes of a long name or of attributes, of which an honest one has a few hundred
NO_FILE = -1  # size of a member that is a link, a device or the like
TEXT_EXTENSIONS = ("txt", "text", "caption")
_ENDING = re.compile(rf"({'|'.join(map(re.escape, (CODES_SUFFIX, FEATURES_SUFFIX, *SUFFIXES)))})$")
_LONG = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}


class TarIndex(NamedTuple):
    """Where everything lies in one tar of N samples and M members.

    Attributes:
        starts: int64 [N + 1], the first member of each sample.
        offsets, sizes: int64 [M], of each member's bytes; a size of `NO_FILE` is of no regular file.
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

    def fits(self, size: int) -> bool:
        """Whether it can be the index of a tar of so many bytes: its arrays agree, and nothing lies outside."""
        arrays = [self.starts, self.offsets, self.sizes, self.extensions, self.key_ends]
        if any(array.dtype != np.int64 or array.ndim != 1 for array in arrays):
            return False
        members, (offsets, sizes) = len(self.offsets), (self.offsets, self.sizes)
        numbers = self.extensions
        return (
            self.keys.dtype == np.uint8
            and self.keys.ndim == 1
            and len(sizes) == len(numbers) == members
            and len(self.starts) == len(self.key_ends)
            and _climbs(self.starts, members)
            and _climbs(self.key_ends, len(self.keys))
            and isinstance(self.names, list)
            and all(isinstance(name, str) for name in self.names)
            and bool(((numbers >= 0) & (numbers < len(self.names))).all())
            and bool(((offsets >= 0) & (offsets <= size) & (sizes >= NO_FILE)).all())
            and bool((sizes <= size - offsets).all())
        )


def _climbs(ends: NDArray[np.int64], last: int) -> bool:
    """Whether places begin at 0, never fall, and end at `last`."""
    return (
        len(ends) > 0 and int(ends[0]) == 0 and int(ends[-1]) == last and bool((ends[1:] >= ends[:-1]).all())
    )


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


class _Header(tarfile.TarInfo):
    """A header that may not ask for more memory than an honest one needs."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in _LONG and self.size > MAX_HEADER):
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member


def scan_tar(path: Path) -> TarIndex:
    """Read the headers of a tar.

    Raises:
        UserError: it is no plain tar, or damaged or cut short; the message names it.
    """
    with open_regular(path) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if packed:
            raise UserError(f"{path}: compressed, and cannot be read by random access; unpack it with gunzip")
        try:
            members = []
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                members = list(_members(tar))
                # tarfile takes a damaged header for the end; the true end is a block of zeros.
                file.seek(tar.offset)
                if file.read(BLOCK) != bytes(BLOCK):
                    raise UserError(f"{path}: damaged or cut short at byte {tar.offset}")
        except UserError:
            raise
        except OSError as error:
            beyond = error.errno == errno.EINVAL  # a size that leads behind all places that a file can have
            what = "not a whole tar" if beyond else "cannot be read"
            raise UserError(f"{path}: {what} ({error.strerror or error})") from None
        except (
            Exception
        ) as error:  # tarfile lets through what its parsing raises: of numbers, texts, recursion
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{path}: not a whole tar ({reason})") from None
    return index_members(members)


def _members(tar: tarfile.TarFile) -> Iterator[Member]:
    """The members that are no folders; a hard link is the file that it repeats."""
    files: dict[str, Member] = {}
    for header in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        if header.size < 0 or tar.offset <= header.offset:
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        if header.isdir():
            continue
        member = Member(header.name, header.offset_data, NO_FILE)
        if header.isfile() and not header.issparse():
            member = Member(header.name, header.offset_data, header.size)
        elif header.islnk() and header.linkname in files:
            member = files[header.linkname]._replace(name=header.name)
        files[header.name] = member
        yield member


def index_members(members: Sequence[Member]) -> TarIndex:
    """Group members into samples, in the order of their first; hidden files and names without a key are left out."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        key = split_name(member.name)[0]
        base = key.rpartition("/")[2]
        if base and not base.startswith((".", "__")):
            groups.setdefault(key, []).append(member)
    samples = [sample for key, group in groups.items() for sample in _samples(key, group)]
    kept = [(extension, member) for _, found in samples for extension, member in found]
    names = sorted({extension for extension, _ in kept})
    number = {name: i for i, name in enumerate(names)}
    keys = [f"{key}\n".encode("utf-8", "surrogateescape") for key, _ in samples]
    return TarIndex(
        np.cumsum([0, *(len(found) for _, found in samples)]).astype(np.int64),
        np.array([member.offset for _, member in kept], np.int64),
        np.array([member.size for _, member in kept], np.int64),
        np.array([number[extension] for extension, _ in kept], np.int64),
        names,
        np.frombuffer(b"".join(keys), np.uint8),
        np.cumsum([0, *map(len, keys)]).astype(np.int64),
    )


def split_name(name: str) -> tuple[str, str]:
    """A member's name as key and extension, parted at the first dot: `a/b.0.JPG` is `a/b` and `0.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _samples(key: str, group: list[Member]) -> Iterator[tuple[str, list[tuple[str, Member]]]]:
    """The samples among members whose names agree up to the first dot."""
    plain = [(member.name[len(key) + 1 :].lower(), member) for member in group]
    words = [extension for extension, _ in plain if has_words(extension)]
    if not any("." in extension for extension in words) and (words or len(group) == 1):
        yield key, plain
        return
    found: dict[str, list[tuple[str, Member]]] = {}
    stems = {_stem(member.name) for extension, member in plain if has_words(extension)}
    stems = stems or {_stem(member.name) for member in group}  # without words each image is one
    for member in group:
        whole = [stem for stem in stems if member.name.startswith(f"{stem}.")]
        stem = max(whole, key=len, default=None)
        if stem is None:
            yield key, plain
            return
        found.setdefault(stem, []).append((member.name[len(stem) + 1 :].lower(), member))
    shown = [any(is_image_member(extension) for extension, _ in sample) for sample in found.values()]
    if any(shown) and not all(shown):
        yield key, plain
    else:
        yield from found.items()


def _stem(name: str) -> str:
    """A member's name without its extension, of which `.codes.npy` is one."""
    ending = _ENDING.search(name.lower())
    return name[: ending.start()] if ending else name.rpartition(".")[0]


def has_words(extension: str) -> bool:
    """Whether a member of this extension holds a sample's words, or all that is said of it."""
    return extension.rpartition(".")[2] in (*TEXT_EXTENSIONS, "json")


def is_image_member(extension: str) -> bool:
    """Whether a member of this extension is an image, or the image codes or the features of one."""
    return _ENDING.search(f".{extension}") is not None
