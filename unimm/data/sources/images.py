"""What a column says of an image, as a `Blob`: a file's name, bytes, base64 or a data URL; and what looks like one."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unimm.data.sources.reach import Reach
from unimm.data.sources.text import clip
from unimm.errors import UserError
from unimm.images import SUFFIXES, decode_data_url
from unimm.processing.messages import Blob

UNNAMED = "an image of this row"
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}")
_MAGIC = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftyp", re.DOTALL)
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,7}$")


def find_file(folder: Path, value: Any, allow_outside: bool = False) -> Blob:
    """The blob of what a column says: a file name, bytes, base64, a data URL, or `{"bytes": …, "path": …}`.

    Args:
        folder: what names of files are relative to, and stay in.
        value: what the column holds.
        allow_outside: whether names may lead out of the folder.

    Raises:
        UserError: it says something else, or names a file outside the folder.
    """
    if isinstance(value, Blob):
        return value
    if isinstance(value, Mapping):
        return _of_mapping(folder, value, allow_outside)
    if isinstance(value, bytes | bytearray | memoryview):
        return Blob(UNNAMED, bytes(value))
    if not isinstance(value, str) or not value.strip():
        kind = "an empty text" if value == "" else type(value).__name__
        raise UserError(f"image: expected the name of a file, got {kind}")
    if (data := inline_bytes(value)) is not None:
        return Blob(UNNAMED, data)
    if value.startswith(("http://", "https://")):
        raise UserError(f"image: {clip(value, 100)} is not on this machine; download it first")
    if len(value) > 4096:
        raise UserError(f"image: {clip(value)}: neither base64 of an image nor the name of a file")
    try:
        path = str(Reach(folder, allow_outside).path(value.removeprefix("file://")))
    except UserError as error:
        raise UserError(f"image: {error}") from None
    return Blob(path, path=path)


def _of_mapping(folder: Path, value: Mapping[str, Any], allow_outside: bool) -> Blob:
    """The blob of Hugging Face's `{"bytes", "path"}`, or of `{"url"}` as chat formats have it."""
    data = value.get("bytes")
    if data:
        name = clip(value.get("path") or UNNAMED, 200)
        if isinstance(data, bytes):
            return Blob(name, data)
        decoded = inline_bytes(data) if isinstance(data, str) else None
        if decoded is None:
            raise UserError(f"image.bytes: expected bytes or base64 of an image, got {clip(data)}")
        return Blob(name, decoded)
    for key in ("path", "url", "image", "base64"):
        if isinstance(value.get(key), str) and value[key]:
            return find_file(folder, value[key], allow_outside)
    raise UserError(f"image: neither bytes nor path in it (keys: {clip(', '.join(map(str, value)))})")


def inline_bytes(value: str) -> bytes | None:
    """The bytes that a data URL or base64 of an image holds; None where the text is neither.

    Raises:
        UserError: it is a data URL, but a broken one.
    """
    if value.startswith("data:"):
        return decode_data_url(value, f"image: {clip(value.partition(',')[0])}")
    return _base64_image(value)


def _base64_image(value: str) -> bytes | None:
    """The bytes of base64 of an image; None of any other text."""
    text = value.strip()
    data = _decode(text) if _BASE64.fullmatch(text) else None
    return data if data is not None and _MAGIC.match(data) else None


def _decode(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def looks_like_image(value: Any) -> bool:
    """Whether a column's value is an image or a list of them, by its type, its first bytes or its name."""
    if isinstance(value, list | tuple):
        return bool(value) and all(looks_like_image(one) for one in value if one is not None)
    if isinstance(value, Blob):
        return True
    if isinstance(value, Mapping):
        return bool(value.get("bytes")) or looks_like_image(value.get("path"))
    if isinstance(value, bytes):
        return _MAGIC.match(value) is not None
    if not isinstance(value, str) or "\n" in value.strip():
        return False
    if value.startswith("data:image/"):
        return True
    if _base64_image(value) is not None:
        return True
    name = value.split("?")[0] if value.startswith(("http://", "https://")) else value
    return name.lower().endswith(SUFFIXES) and len(name) < 1000


def may_name_image(value: Any) -> bool:
    """Whether a value under a name such as `path` may be an image: all but files of another suffix."""
    if isinstance(value, str) and not looks_like_image(value):
        return _SUFFIX.search(value) is None and "\n" not in value and len(value) < 1000
    return looks_like_image(value)
