"""Folders of a model, written whole or not at all, whenever the process is killed and the disk fills up."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from unimm.errors import UserError
from unimm.files import (
    NEIGHBOUR,
    check_folder,
    finish,
    neighbour,
    sync,
    sync_name,
    system_error,
    system_reason,
)

_WEIGHTS = (
    "model*.safetensors",
    "consolidated*.safetensors",
    "consolidated*.pth",
    "pytorch_model*.bin",
    "*.safetensors.index.json",
    "*.bin.index.json",
)
_BESIDE_CONFIG = (
    "config.json", "params.json", "tekken.json", "generation_config.json", "processor_config.json",
    "*preprocessor_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "kept.safetensors",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_CONFIGS = (
    "config.json",
    "params.json",
    "adapter_config.json",
)  # a folder holds a model once it has one of these
_MODEL_CONFIGS = ("config.json", "params.json")  # of these a model

_NO_SWAP = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}  # a file system or libc without renameat2's exchange
_FIXED = {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES}  # a folder that cannot be renamed
_AT_CWD, _EXCHANGE = -100, 2  # of renameat2


def write_folder(folder: Path, write: Callable[[Path], None], keep_others: bool = True) -> None:
    """Fill a new folder through `write` and put it in the place of `folder`, in one step.

    Whenever the process is killed, `folder` is the old one or the new one, whole. With `keep_others`, what the old
    one holds beside a model (notes, a readme, other models' folders) is linked into the new one; the old weights,
    configuration and files of the tokenizer and the processor go. A folder that cannot be replaced, because work
    goes on in it, another disk is mounted there or its parent is not ours, is filled in place, its configuration
    last, and only if it holds no model.

    Args:
        folder: what to write; folders above it are made.
        write: is given the path of the new folder, which is empty.
        keep_others: whether files of others stay; else the new folder has what was written and nothing else.

    Raises:
        UserError: the folder cannot be written, is a link or a file, has a folder where a file is to be or the
            other way round, or holds a model and cannot be replaced.
    """
    target = folder if folder.name not in ("", "..") else Path(os.path.realpath(folder))
    try:
        check_folder(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        fixed = _fixed(target)
        if fixed is not None:
            _expect_no_model(target, fixed)
        with neighbour(target / target.name if fixed == _INSIDE else target) as place:
            new = place / "new"
            new.mkdir()
            try:
                write(new)
            except UserError as error:
                raise UserError(str(error).replace(str(new), str(folder))) from None
            finish(new, place)
            if keep_others:
                _check_room(new, target)
            if fixed is None:
                _replace(new, target, keep_others)
            else:
                _move_in(new, target)
        sync_name(target)
    except UserError:
        raise
    except Exception as error:
        if system_error(error) is None and not isinstance(error, OSError | SafetensorError):
            raise
        reason = system_reason(error)
        raise UserError(f"{folder}: cannot be written ({reason}); what was there is unchanged") from None


_INSIDE = "is a mounted disk, or lies where you may not write"


def _fixed(target: Path) -> str | None:
    """Why an existing folder cannot be replaced by another, or None."""
    if not target.exists():
        return None
    if os.path.ismount(target) or not os.access(target.parent, os.W_OK):
        return _INSIDE
    with suppress(FileNotFoundError):  # the folder that we are in was removed
        if Path.cwd().is_relative_to(os.path.realpath(target)):
            return "is the folder that you are in"
    return None


def _expect_no_model(target: Path, why: str) -> None:
    """Refuse to write into a folder as it stands where a kill could mix two models."""
    if _holds_model(target):
        raise UserError(
            f"{target}: {why} and holds a model, which cannot be replaced whole; give another folder"
        )


def _check_room(new: Path, old: Path) -> None:
    """Refuse files where folders are, and folders where files or links are."""
    for entry in new.iterdir():
        there = old / entry.name
        if not os.path.lexists(there):
            continue
        folder = there.is_dir() and not there.is_symlink()
        if folder != entry.is_dir():
            raise UserError(f"{there}: {'a folder' if folder else 'a file'} is in the way; move it elsewhere")
        if folder:
            _check_room(entry, there)


def _replace(new: Path, target: Path, keep_others: bool) -> None:
    """Put a new folder in an old one's place; the old one is then where the new one was, or beside it."""
    if not target.exists():
        os.rename(new, target)
        return
    if keep_others:
        _carry(target, new, ours=True)
    shutil.copymode(target, new)
    sync(new)
    try:
        _exchange(new, target)
    except OSError as error:
        if error.errno in _FIXED:
            _expect_no_model(target, f"cannot be renamed ({error.strerror})")
            _move_in(new, target)
            return
        if error.errno not in _NO_SWAP:
            raise
        aside = new.parent / "old"
        aside.mkdir()
        os.rename(target, aside / target.name)
        os.rename(new, target)  # killed before: `recover` puts the old one back


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders in one step (Linux)."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(_AT_CWD, os.fsencode(new), _AT_CWD, os.fsencode(old), _EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _carry(old: Path, new: Path, ours: bool) -> None:
    """Bring what is not a model's from an old folder into the new one: files as hard links, links as they are.

    Args:
        old: the folder to replace.
        new: what replaces it.
        ours: whether a model's files in `old` are to go.
    """
    stale = _stale(old, new) if ours else set()
    for entry in old.iterdir():
        place = new / entry.name
        if entry.name.endswith(NEIGHBOUR):  # left by a killed write
            continue
        if entry.is_dir() and not entry.is_symlink():
            written = place.exists()
            place.mkdir(exist_ok=True)
            _carry(entry, place, ours and written)
            shutil.copymode(entry, place)
        elif os.path.lexists(place) or entry.name in stale:
            continue
        else:
            try:
                os.link(entry, place, follow_symlinks=False)
            except OSError:  # a file system without hard links, or a file of someone else's
                shutil.copy2(entry, place, follow_symlinks=False)


def _stale(old: Path, new: Path) -> set[str]:
    """Names of the files in an old folder that go with the model, or the adapter, that a new one replaces.

    An adapter replaces an adapter and leaves a model beside it alone; weights go even without a configuration.
    """
    patterns: list[str] = []
    if any((new / name).exists() for name in _MODEL_CONFIGS):
        patterns += [*_WEIGHTS, *_ADAPTER]
        if any((old / name).exists() for name in _MODEL_CONFIGS):
            patterns += _BESIDE_CONFIG
        if any((old / f"source.{name}").exists() for name in _MODEL_CONFIGS):
            patterns.append("source.*")  # a converted model: each belongs to it
    elif (new / "adapter_config.json").exists():
        patterns += _ADAPTER
    names = [entry.name for entry in old.iterdir() if entry.is_symlink() or not entry.is_dir()]
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


def _holds_model(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in _CONFIGS)


def _move_in(new: Path, target: Path) -> None:
    """Move what is in a new folder into a folder that holds no model, the configuration last."""
    for name in _stale(target, new):
        if not (new / name).exists():
            (target / name).unlink()
    for entry in sorted(new.iterdir(), key=lambda entry: entry.name in _CONFIGS):
        if entry.is_dir() and (target / entry.name).is_dir():
            _move_in(entry, target / entry.name)
        else:
            os.rename(entry, target / entry.name)
    sync(target)
