"""What the files of drawings are called, and how they are written: no two share a name, none takes another's."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import unicodedata
from pathlib import Path

from PIL import Image

from unimm.files import atomic_write

MAX_BYTES = 80  # of the part of a name that says the prompt; ten scripts have letters of 3 bytes


def drawing_name(prompt: str, seed: int, index: int) -> str:
    """Return the name of a drawing's file, without its suffix: the prompt's words, the seed and its number.

    Letters and digits of any script stay. Where the words alone do not say what the prompt was (capitals,
    punctuation, a long text), a hash of it follows, so that two prompts never share a name, on file systems that
    ignore capitals either.
    """
    text = unicodedata.normalize("NFC", prompt)
    words = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    while len(words.encode()) > MAX_BYTES:
        words = words[: len(words) * 3 // 4].rstrip("-")
    if not words or words.replace("-", " ") != text:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        words = f"{words}_{digest}" if words else digest
    return f"{words}-{seed}-{index}"


def save_drawing(image: Image.Image, folder: Path, name: str) -> Path:
    """Write a drawing as PNG beside what is there; returns its path.

    Where another file has the name, a number follows it; a file with the same bytes is left as it is, so that the
    same command again gives the same names.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    for number in itertools.count(1):
        path = folder / (f"{name}.png" if number == 1 else f"{name}-v{number}.png")
        if not os.path.lexists(path):
            with atomic_write(path) as temporary:
                temporary.write_bytes(buffer.getvalue())
            return path
        if path.is_file() and path.read_bytes() == buffer.getvalue():
            return path
    raise AssertionError("unreachable")
