"""Bytes to text and to JSON, as strictly as training needs: marks of byte order go, doubled keys are refused."""

from __future__ import annotations

import codecs
import json
from typing import Any

from unimm.errors import UserError

_MARKS = (  # longest first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BOM = "\ufeff"


def decode_text(data: bytes) -> str:
    """The text of a file's bytes: UTF-8, or what its byte-order mark says, without the mark.

    Raises:
        UserError: it is no such text.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        raise UserError("not a text in UTF-8") from None


def parse_strict_json(data: bytes) -> Any:
    """What JSON says.

    Raises:
        UserError: it is not JSON, or gives a key of an object twice.
    """
    try:
        return json.loads(decode_text(data), object_pairs_hook=_unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{clip(twice)}: given twice in one object")
    return found


def clean(text: str, where: str) -> str:
    """A text without the white space and the byte-order marks around it.

    Raises:
        UserError: it holds half of a surrogate pair, which is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character") from None
    return text.replace(BOM, "").strip()


def clip(value: object, longest: int = 60) -> str:
    """A value as it may stand in a line: printable, and not longer than a reader wants it."""
    text = value if isinstance(value, str) else repr(value)[: 2 * longest]
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: 2 * longest])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
