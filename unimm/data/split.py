"""Hold part of a source out of training by a hash of its items' keys, and find what two sets of items share.

Which items are held out follows from their keys alone: it is the same in every run and process, after a resume, and
for every source that has the items, and it does not change for the others when items are added.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unimm.data.sources import BadRecord, Blob, Record, Source
from unimm.errors import UserError

Indices = NDArray[np.int64]
MAX_DIVIDED = 2_000_000  # items of a source up to which a share of them is held out
COMPARED_ITEMS = 20_000  # items trained on that are compared with those held out


def split_key(record: Record, folder: str) -> str:
    """What decides the side of an item: the file of its first image, relative to the source, else its key.

    So several captions of one image, and the image as a caption to learn and as a drawing, stay on one side.
    """
    images = record.images()
    if images and images[0].blob.path is not None and images[0].blob.size is None:
        return os.path.relpath(images[0].blob.path, folder)
    return record.key


def position(key: str) -> float:
    """A number in [0, 1) that follows from a key."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64


def hold_out(source: Source, share: float) -> tuple[Indices, Indices]:
    """Split a source.

    Args:
        source: every record of it is looked at once; its images are not read.
        share: of the items to hold out, above 0 and below 1.

    Returns:
        Indices of the records to train on, those that cannot be read among them, and of those held out: one image
        at least, however small the share.

    Raises:
        UserError: all items have one key, so there is nothing to divide.
    """
    location = Path(source.location)
    folder = str(location if location.is_dir() else location.parent)
    keys: list[str | None] = []
    for index in range(len(source)):
        try:
            keys.append(split_key(source[index], folder))
        except BadRecord:
            keys.append(None)
    return divide(keys, share, source.location)


def divide(keys: Sequence[str | None], share: float, location: str) -> tuple[Indices, Indices]:
    """Split items by their keys, as `hold_out` does; an item without a key is to be trained on.

    Raises:
        UserError: all items have one key, so there is nothing to divide; `location` is what they are called.
    """
    positions = np.array([np.inf if key is None else position(key) for key in keys])
    found = positions[np.isfinite(positions)]
    if len(np.unique(found)) < 2:
        raise UserError(f"{location}: fewer than two items, so none can be held out")
    held = positions < max(share, np.nextafter(found.min(), 1))
    if held.sum() == len(found):  # of a few items chance may hold out all
        held = positions < found.max()
    return np.flatnonzero(~held), np.flatnonzero(held)


def shared_items(trained: Iterable[Record], held: Iterable[Record]) -> list[tuple[str, str]]:
    """Pairs of keys, trained on and held out, of items with the same content.

    Two items are the same where an image of one is, byte for byte, an image of the other; or, of items without
    images, where all their texts are. Bytes are read only where their number agrees.
    """
    sizes: set[int] = set()
    keys: dict[str, str] = {}
    for record in held:
        for blob in _contents(record):
            with suppress(UserError, OSError):
                sizes.add(_size(blob))
                keys[_hash(blob)] = record.key
    pairs = []
    for record in trained:
        for blob in _contents(record):
            with suppress(UserError, OSError):
                if _size(blob) in sizes and (other := keys.get(_hash(blob))) is not None:
                    pairs.append((record.key, other))
                    break
    return pairs


def _contents(record: Record) -> list[Blob]:
    """The images of a record, or its texts as one."""
    if images := record.images():
        return [image.blob for image in images]
    texts = [part for message in record.messages for part in message.parts if isinstance(part, str)]
    return [Blob(record.key, "\0".join(texts).encode("utf-8", "surrogatepass"))]


def _hash(blob: Blob) -> str:
    return hashlib.sha256(blob.read()).hexdigest()


def _size(blob: Blob) -> int:
    """How many bytes a blob has, without reading it where it lies in a file."""
    if blob.data is not None:
        return len(blob.data)
    if blob.size is not None:
        return blob.size
    assert blob.path is not None
    return Path(blob.path).stat().st_size
