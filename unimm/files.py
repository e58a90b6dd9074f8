"""Files, read with one-line errors and written whole or not at all.

Nothing here writes through a link, or over what is no regular file. A file (or folder, `unimm.folders`) is made in a
hidden neighbour (`.NAME.0.unimm-writing`) that its process holds locked, and then takes its place in one step; the
neighbours of killed processes, which hold no lock any more, are removed by the next write.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from unimm.documents import MAX_BYTES, parse_json
from unimm.errors import UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_RUST = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers name a system error
POINTER = "a git-lfs pointer, not the file itself; run `git lfs pull` in its folder"
_POINTER_BYTES = 1024  # the most that one takes
NEIGHBOUR = ".unimm-writing"
_SLOTS = 8  # how many neighbours of one target are looked for; more exist only if as many write at once
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

# --- reading ------------------------------------------------------------------------------------------------


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading bytes; links are followed, and nothing blocks.

    Raises:
        UserError: there is no such file, it may not be read, it is a folder, a pipe, a device or a socket, or
            stands for a file of git-lfs that was not fetched.
    """
    try:
        _expect_regular(path, os.stat(path).st_mode)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            _expect_regular(path, status.st_mode)  # it may have been changed since
            if status.st_size <= _POINTER_BYTES and is_pointer(os.pread(handle, _POINTER_BYTES, 0)):
                raise UserError(f"{path}: {POINTER}")
        except BaseException:
            os.close(handle)
            raise
        return os.fdopen(handle, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{os.fspath(path)!r}: not a name that a file can have") from None


def _expect_regular(path: str | os.PathLike[str], mode: int) -> None:
    """Refuse what is no regular file."""
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; expected a regular file")


def is_pointer(data: bytes) -> bool:
    """Whether a file begins as what git-lfs leaves in place of a large one."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")


def read_text(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> str:
    """Read a text file of UTF-8, with or without a byte-order mark.

    Raises:
        UserError: there is no such regular file, it is no text, or of more than `limit` bytes.
    """
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > limit:
        raise UserError(f"{path}: larger than {limit:,} bytes, which no such file is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or holds something else, or more than any such file (`unimm.documents`).
    """
    document = parse_json(read_text(path), str(path))
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}; expected an object")
    return document


def read_optional(path: Path) -> dict[str, Any]:
    """Read a JSON object, an empty one if there is no such file."""
    return read_json(path) if path.exists() else {}


# --- writing a file -----------------------------------------------------------------------------------------


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object as people read it. Raises as `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all.

    Yields the path of a fresh, empty file with the same suffix, in a hidden folder beside `path`. When the block
    ends well it is flushed to disk and takes the place of `path`, with the mode that the umask gives; on any error
    it is removed and an old `path` stays as it was.

    Raises:
        UserError: `path` is a link or no regular file, its folder is missing or may not be written, or the disk
            is full.
    """
    target = Path(path)
    check_target(target)
    with ExitStack() as stack:
        try:
            place = stack.enter_context(neighbour(target))
            temporary = place / f".new{target.suffix}"
            temporary.touch()
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            yield temporary
            finish(temporary, place)
            os.replace(temporary, target)
        except Exception as error:
            if system_error(error) in _NO_ROOM:
                reason = system_reason(error)
                raise UserError(f"{path}: cannot be written ({reason}); nothing was changed") from None
            raise
    sync_name(target)


def check_target(path: str | os.PathLike[str]) -> None:
    """Refuse to write over what is there unless it is a regular file.

    Raises:
        UserError: `path` is a link, a folder, a pipe, a device or a socket, or no name that a file can have.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # none, or none that can be seen: making the file says what is wrong
    except ValueError:
        raise UserError(f"{os.fspath(path)!r}: not a name that a file can have") from None
    if not stat.S_ISREG(mode):
        _refuse(path, mode)


def _refuse(path: str | os.PathLike[str], mode: int) -> NoReturn:
    hint = "; name the file it leads to" if stat.S_ISLNK(mode) else ""
    kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
    raise UserError(f"{path}: cannot be written (it is {kind}{hint})")


def open_here(path: str | os.PathLike[str], flags: int) -> int:
    """Open a regular file to write into it as it stands, through no link; gives its descriptor.

    Args:
        path: the file, which is made if `flags` have O_CREAT.
        flags: as of `os.open`, with O_WRONLY or O_RDWR.

    Raises:
        UserError: it is a link or no regular file, or it cannot be opened.
    """
    check_target(path)
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        _refuse(path, mode)
    return handle


def open_append(path: str | os.PathLike[str]) -> TextIOWrapper:
    """Open a text file to write at its end; it is made if it is missing. Raises as `open_here`."""
    return os.fdopen(open_here(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a", encoding="utf-8")


def append(path: str | os.PathLike[str], text: str) -> None:
    """Write whole lines at the end of a file, which is made if it is missing; a line that a kill cut stays alone.

    Raises:
        UserError: as `open_here`, or the disk is full; the file is as it was.
    """
    handle = open_here(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(handle).st_size
        cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        left = ("\n" * cut + text).encode()
        try:
            while left:
                left = left[os.write(handle, left) :]
        except OSError:
            os.ftruncate(handle, size)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        os.close(handle)


def make_folder(root: Path, *names: str) -> Path:
    """Make a folder in the folder that the user named, and what lies between, through no link below `root`.

    Raises:
        UserError: a link or a file is in the way, or a folder cannot be made.
    """
    path = root
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = path / name
            with suppress(FileExistsError):
                os.mkdir(path)
            check_folder(path)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: a file is in the way; name another folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror})") from None
    return path


def check_folder(path: Path) -> None:
    """Refuse to write a folder where something else is.

    Raises:
        UserError: `path` is a link, a file, a pipe, a device or a socket.
    """
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise UserError(f"{path}: is a link; name the folder it leads to")
        if not stat.S_ISDIR(mode):
            raise UserError(f"{path}: a file is in the way; name a folder")


def sync(path: Path) -> None:
    """Flush a file or a folder to disk, where the system can."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def sync_name(path: Path) -> None:
    """Flush what a new file or folder is called; it is there, and whole, also where the disk refuses that."""
    with suppress(OSError):
        sync(path.parent)


def finish(path: Path, place: Path) -> None:
    """Flush a new file, or all in a new folder, and give it the umask's mode, which some libraries ignore."""
    if path.is_dir():
        for entry in path.iterdir():
            finish(entry, place)
    else:
        os.chmod(path, os.lstat(place).st_mode & 0o666)  # the place was made under the umask
    sync(path)


def system_error(error: BaseException) -> int | None:
    """The system's number of an error of its, also where a library wrapped it; None for another error."""
    if isinstance(error, OSError):
        return error.errno
    found = _RUST.search(str(error))
    return int(found[1]) if found else None


def system_reason(error: BaseException) -> str:
    """The system's words for an error."""
    number = system_error(error)
    return str(error) if number is None else os.strerror(number)


# --- the hidden neighbours in which all is made -------------------------------------------------------------


@contextmanager
def neighbour(target: Path) -> Iterator[Path]:
    """Make an empty hidden folder beside `target`, locked by this process, and remove it at the end."""
    recover(target)
    sweep(target.parent)
    place, handle = next(filter(None, (_claim(_place(target, slot)) for slot in itertools.count())))
    try:
        yield place
    finally:
        try:
            _dismantle(place)
        finally:
            os.close(handle)


def recover(target: Path) -> None:
    """Remove what killed writes of a file or folder left beside it, and put a folder that they set aside back."""
    for slot in range(_SLOTS):
        _clear(_place(target, slot))


def settled(path: str | os.PathLike[str]) -> Path:
    """A path to read from; if nothing is there, a folder that a killed write had set aside is put back first."""
    path = Path(path)
    with suppress(ValueError):  # no name that a file can have
        if path.name and not os.path.lexists(path):
            recover(path)
    return path


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writes, of whatever file, left in a folder."""
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if entry.name.endswith(NEIGHBOUR)]:
            _clear(folder / name)


@functools.cache
def sweep(folder: Path) -> None:
    """Remove leftovers in a folder, the first time that this process writes into it: it may be a large one."""
    remove_leftovers(folder)


def _place(target: Path, slot: int) -> Path:
    """The name of a neighbour; long names are shortened to a hash."""
    name = f".{target.name}.{slot}{NEIGHBOUR}"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}.{slot}{NEIGHBOUR}"
    return target.with_name(name)


def _claim(place: Path) -> tuple[Path, int] | None:
    """Make a folder and lock it; None if another process has it. Raises OSError."""
    try:
        os.mkdir(place)
    except FileExistsError:
        return None
    handle = _lock(place, needed=False)
    return None if handle is None else (place, handle)


def _lock(place: Path, needed: bool) -> int | None:
    """Open and lock a folder; None if it is gone, is no folder, or another process has it.

    Args:
        place: the folder.
        needed: None also where the file system has no locks.
    """
    try:
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except OSError as error:
        locked = not needed and not isinstance(error, BlockingIOError)
    with suppress(OSError):
        if locked and os.path.samestat(os.fstat(handle), os.lstat(place)):
            return handle
    os.close(handle)
    return None


def _clear(place: Path) -> None:
    """Remove a neighbour if no process holds it."""
    handle = _lock(place, needed=True)
    if handle is not None:
        _dismantle(place)
        os.close(handle)


def _dismantle(place: Path) -> None:
    """Remove a neighbour; a folder that was set aside in it goes back first, unless there is a new one."""
    old = place / "old"
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(old).st_mode):  # no link, by which others' files would come here
            for aside in old.iterdir():
                if _is_of(place, aside.name) and not os.path.lexists(place.parent / aside.name):
                    try:
                        os.rename(aside, place.parent / aside.name)
                    except OSError:  # it stays for the next try
                        return
    shutil.rmtree(place, ignore_errors=True)


def _is_of(place: Path, name: str) -> bool:
    """Whether a neighbour is one of a file or folder of this name."""
    slot = place.name.removesuffix(NEIGHBOUR).rpartition(".")[2]
    return slot.isdecimal() and _place(place.with_name(name), int(slot)) == place
