"""Files that the user names for a result: none takes the place of an input, nor of a file that is something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from unimm.errors import UserError
from unimm.files import check_target, open_regular

MAX_LINE = 2**26  # bytes of the first line of JSON lines, or of a document
_IMAGES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF")  # how files of PNG, JPEG and WebP begin


def check_output(
    path: str | os.PathLike[str],
    what: str,
    is_earlier: Callable[[BinaryIO], bool],
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Check that a file may be written: there is none, it is empty, or it is an earlier result of the same kind.

    Call it before the work is done, not after.

    Args:
        path: what is to be written.
        what: a result is, for the message.
        is_earlier: whether an open file holds such a result.
        inputs: files that the result is made from.

    Raises:
        UserError: it is an input, also by another name or link, holds something else, or is no regular file.
    """
    name = os.fspath(path)
    for one in inputs:
        if _same(path, one):
            raise UserError(
                f"{name}: is read by this command, and would be written over; give another output"
            )
    check_target(path)
    if not os.path.lexists(path):
        return
    with open_regular(path) as file:
        empty = not file.read(1)
        file.seek(0)
        if not empty and not is_earlier(file):
            raise UserError(f"{name}: holds something else than {what}; give another output, or remove it")


def is_image_file(file: BinaryIO) -> bool:
    """Whether a file begins as an image in PNG, JPEG or WebP."""
    return file.read(8).startswith(_IMAGES)


def first_line_has(*keys: str) -> Callable[[BinaryIO], bool]:
    """Whether the first line of a file is a JSON object with these keys; `a.b` is `b` in the object under `a`."""
    return lambda file: _has(file.readline(MAX_LINE), keys)


def document_has(*keys: str) -> Callable[[BinaryIO], bool]:
    """Whether a file is a JSON object with these keys, as `first_line_has` takes them."""
    return lambda file: _has(file.read(MAX_LINE), keys)


def _has(text: bytes, keys: Iterable[str]) -> bool:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return all(_find(document, key.split(".")) is not None for key in keys)


def _find(value: Any, steps: list[str]) -> Any:
    for step in steps:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _same(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two names lead to one file, there or not."""
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return Path(os.path.abspath(path)) == Path(os.path.abspath(other))
