"""The one structure that every source gives: a `Record`, a keyed list of messages made of texts and images.

How each form of data maps onto it (`user` and `assistant` are the roles of its messages):

- text: one assistant message with the text; all of it is labelled.
- caption: user [image], assistant [text]; the request for a caption is put in when it is used.
- conversation: user [images and text in any order], assistant [text], as many turns as there are.
- text to image: user [text], assistant [image to draw].
- image and text to image: user [images, text], assistant [image to draw].
- interleaved: messages in which the assistant mixes text and images to draw; a document is one such message.

Images stay encoded bytes, where they lie, until they are asked for.
"""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unimm.errors import UserError
from unimm.files import open_regular
from unimm.images import image_header, read_image

Role = Literal["system", "user", "assistant"]
RecordKind = Literal["text", "image_to_text", "text_to_image", "image_text_to_image", "interleaved"]
RECORD_KINDS: tuple[RecordKind, ...] = (
    "text",
    "image_to_text",
    "text_to_image",
    "image_text_to_image",
    "interleaved",
)
CODES_SUFFIX = ".codes.npy"  # of a member that holds an image as image codes
FEATURES_SUFFIX = ".features.npy"  # of one that holds an image as features of a frozen encoder


class BadRecord(UserError):
    """A record that cannot be used: `key` names it, `file` holds it, `reason` says what is wrong."""

    def __init__(self, key: str, file: str, reason: str) -> None:
        super().__init__(f"{file}: {key}: {reason}" if key else f"{file}: {reason}")
        self.key, self.file, self.reason = key, file, reason

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str, str]]:
        return BadRecord, (self.key, self.file, self.reason)


@dataclass(frozen=True)
class Blob:
    """Bytes, or where they lie: `size` of them at `offset` of the file `path`, or all of it.

    `name` is what messages call them; its suffix says what they are.
    """

    name: str
    data: bytes | None = field(default=None, repr=False)
    path: str | None = None
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes.

        Raises:
            UserError: the file is missing, may not be read, or is shorter than it was.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            with open_regular(self.path) as handle:
                handle.seek(self.offset)
                data = handle.read() if self.size is None else handle.read(self.size)
        except UserError as error:
            reason = str(error).removeprefix(f"{self.path}: ").replace("not found", "no such file")
            raise UserError(f"{self.name}: {reason}") from None
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror})") from None
        if self.size is not None and len(data) < self.size:
            raise UserError(f"{self.name}: cut short ({len(data)} of {self.size} bytes)")
        return data


@dataclass(frozen=True)
class ImagePart:
    """An image to look at, or one to `draw`.

    Instead of pixels the first may be stored as features of an understanding encoder, the second as image codes.
    """

    blob: Blob
    draw: bool = False

    @property
    def encoded(self) -> bool:
        """Whether image codes are stored, not pixels."""
        return self.blob.name.endswith(CODES_SUFFIX)

    @property
    def featured(self) -> bool:
        """Whether features are stored, not pixels."""
        return self.blob.name.endswith(FEATURES_SUFFIX)

    def image(self) -> Image.Image:
        """Decode to upright RGB (`unimm.images.read_image`).

        Raises:
            UserError: the bytes are missing or no image.
        """
        if self.encoded:
            raise UserError(f"{self.blob.name}: holds image codes, which can be drawn but not looked at")
        if self.featured:
            raise UserError(f"{self.blob.name}: holds features of an encoder, from which no image comes back")
        return read_image(self.blob.read(), self.blob.name)

    def header(self) -> tuple[str, tuple[int, int]]:
        """The image's format, as PIL names it ("JPEG"), and its width and height when upright.

        Raises:
            UserError: the bytes are missing or no image.
        """
        return image_header(self.blob.read(), self.blob.name)

    def codes(self) -> NDArray[np.int64]:
        """The stored image codes [h, w].

        Raises:
            UserError: they are damaged.
        """
        assert self.encoded
        codes = self._array("image codes")
        if codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise UserError(f"{self.blob.name}: image codes of shape {list(codes.shape)}, expected [h, w]")
        return np.asarray(codes, np.int64)

    def features(self) -> NDArray[np.float32]:
        """The stored features [tokens, width].

        Raises:
            UserError: they are damaged.
        """
        assert self.featured
        features = self._array("features")
        if features.ndim != 2 or features.dtype.kind != "f":
            shape = list(features.shape)
            raise UserError(f"{self.blob.name}: features of shape {shape}, expected [tokens, width]")
        return np.asarray(features, np.float32)

    def _array(self, what: str) -> NDArray[Any]:
        """What is stored in place of pixels; `what` names it where it is damaged."""
        try:
            stored: NDArray[Any] = np.load(io.BytesIO(self.blob.read()), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            raise UserError(f"{self.blob.name}: damaged {what}") from None
        return stored


SHOWN, DRAWN = ImagePart(Blob("image")), ImagePart(Blob("image"), draw=True)
"""Stand in a message for an image that comes apart from it, to look at or to draw."""
Part: TypeAlias = "str | ImagePart"


@dataclass(frozen=True)
class Message:
    """What one side says: texts and images in their order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Record:
    """One item of a source, under a key by which it is found again; see the module's docstring.

    Attributes:
        key: names it within its source.
        messages: what is said and shown.
        others: the same in other words, as where an image has several captions; their images are the same.

    Raises:
        UserError: a turn holds what its role cannot say.
    """

    key: str
    messages: tuple[Message, ...]
    others: tuple[tuple[Message, ...], ...] = ()

    def __post_init__(self) -> None:
        for messages in (self.messages, *self.others):
            _check_messages(messages)

    @property
    def versions(self) -> int:
        """In how many wordings it comes."""
        return 1 + len(self.others)

    def version(self, number: int) -> Record:
        """The record in one of its wordings, counted round and round."""
        number %= self.versions
        return Record(self.key, (self.messages, *self.others)[number]) if self.others else self

    @property
    def kind(self) -> RecordKind:
        """What it teaches, by its labelled parts."""
        if not self.images(draw=True):
            return "image_to_text" if self.images(draw=False) else "text"
        said = [part for m in self.messages if m.role == "assistant" for part in m.parts]
        if any(isinstance(part, str) for part in said):
            return "interleaved"
        return "image_text_to_image" if self.images(draw=False) else "text_to_image"

    def images(self, draw: bool | None = None) -> list[ImagePart]:
        """All images, or those to draw, or those to look at, in the order of the messages."""
        found = [part for message in self.messages for part in message.parts if isinstance(part, ImagePart)]
        return [image for image in found if draw is None or image.draw == draw]


def _check_messages(messages: Sequence[Message]) -> None:
    """Refuse what no row can hold: images on a side that does not show or draw them, a late system turn."""
    for position, message in enumerate(messages):
        if message.role == "system" and position:
            raise UserError(f"messages[{position}]: a system turn may only come first")
        for part in message.parts:
            if not isinstance(part, ImagePart):
                continue
            if message.role == "system":
                raise UserError(f"messages[{position}]: an image in the system turn; only the user shows any")
            if part.draw != (message.role == "assistant"):
                wrong = "to be drawn" if part.draw else "to be looked at"
                raise UserError(
                    f"messages[{position}]: an image {wrong} in a turn of the {message.role}; "
                    "the user's are looked at, the assistant's are drawn"
                )


class Source(ABC):
    """Random access to the records of one place.

    Attributes:
        location: the path as it was given, for messages.
        broken: files that cannot be read at all, if the source was opened to be checked.
        mark: which image tokenizer the stored codes are of; None where there are none.
        encoder: which understanding encoder the stored features are of; None where there are none.
    """

    form = "source"

    def __init__(self, location: str) -> None:
        self.location = location
        self.broken: list[BadRecord] = []
        self.mark: str | None = None
        self.encoder: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """The record at `index`.

        Raises:
            BadRecord: what is there cannot be used.
            IndexError: there is none.
        """

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files that list the records."""

    def signature(self) -> str:
        """A digest that changes when those files do."""
        return digest(map(file_state, self.files()))

    def check_index(self, index: int) -> int:
        """The index, counted from the end if negative; IndexError beyond the ends."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return index % len(self)


def digest(words: Iterable[str]) -> str:
    """Sixteen hex digits of a hash over words."""
    total = hashlib.sha256()
    for word in words:
        total.update(word.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()[:16]


def file_state(path: Path) -> str:
    """A file's name, size and time; that it is missing where it is."""
    try:
        state = path.stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {state.st_size} {state.st_mtime_ns}"
