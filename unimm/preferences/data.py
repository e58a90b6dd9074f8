"""Preferences on disk: rows of a prompt and two answers, `chosen` and `rejected`, checked before anything is trained.

A prompt is words, or turns of words and images that end in the user's; an answer is a text, an image file, or the
codes that were sampled (kept because tokenising a drawing again gives other codes):

    {"prompt": "a red apple", "chosen": {"codes": [[3, 1], [0, 2]]}, "rejected": {"image": "b.png"}}
    {"prompt": [{"role": "user", "content": [{"image": "a.png"}, {"text": "what is this?"}]}],
     "chosen": "an apple", "rejected": "a pear", "scores": [0.9, 0.2], "source": "vote"}

They lie wherever other data does (`unimm.data.sources`): JSON lines, JSON, tars, Parquet, `datasets` folders. What
other forms there are says `unimm.preferences.forms`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from PIL import Image
from pydantic import Field, PrivateAttr, model_validator

from unimm.data.sources import (
    BadRecord,
    Blob,
    ImagePart,
    Location,
    Message,
    Reading,
    RowSource,
    location_name,
    open_source,
)
from unimm.data.sources.text import decode_text
from unimm.errors import UserError, UserNote
from unimm.files import atomic_write, open_regular
from unimm.images import read_image
from unimm.preferences.forms import read_form
from unimm.processing.messages import Role
from unimm.sections import NotNegative, Section, show, validate

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = ("text", "image")
ANYWHERE = Reading(allow_outside=True)
NAMED = 10  # wrong preferences that are named; all are counted
Finite = Annotated[float, Field(allow_inf_nan=False)]
CodeRows = Annotated[list[Annotated[list[NotNegative], Field(min_length=1)]], Field(min_length=1)]


class PromptPart(Section):
    """A part of a prompt: words or an image file."""

    type: Literal["text", "image"] | None = None
    """Says which of the two it is, as chat formats do; not needed."""
    text: str | None = None
    image: str | None = None

    @model_validator(mode="after")
    def _one(self) -> PromptPart:
        if (self.text is None) == (self.image is None):
            raise ValueError("expected either text or image")
        return self


class PromptMessage(Section):
    """A turn of the prompt."""

    role: Role = "user"
    content: Annotated[list[PromptPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _words(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("content"), str):
            return {**data, "content": [{"text": data["content"]}]}
        return data

    @property
    def words(self) -> list[str]:
        """Its texts."""
        return [part.text for part in self.content if part.text is not None]

    @property
    def images(self) -> list[str]:
        """What it calls its images."""
        return [part.image for part in self.content if part.image is not None]


class Response(Section):
    """A text, an image file, or rows of image codes."""

    text: str | None = None
    image: str | None = None
    codes: CodeRows | None = None

    @model_validator(mode="before")
    @classmethod
    def _words(cls, data: Any) -> Any:
        return {"text": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one(self) -> Response:
        given = [name for name in ("text", "image", "codes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of text, image, codes, got {', '.join(given) or 'none'}")
        if self.text is not None and not self.text.strip():
            raise ValueError("the text is empty")
        if self.codes is not None and len({len(row) for row in self.codes}) > 1:
            raise ValueError("the rows of codes are of different lengths")
        return self

    def same(self, other: Response) -> bool:
        """Whether two answers say or show the same."""
        if self.text is not None and other.text is not None:
            return self.text.strip() == other.text.strip()
        return self == other

    @property
    def modality(self) -> Modality:
        """Text or image."""
        return "image" if self.text is None else "text"


class Preference(Section):
    """A prompt and two answers of one kind, of which one is better."""

    prompt: Annotated[list[PromptMessage], Field(min_length=1)]
    chosen: Response
    rejected: Response
    margin: Annotated[Finite, Field(ge=0)] | None = None
    """How much better, in the units of whoever judged."""
    scores: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None = None
    """What the better and the worse answer were given."""
    source: str | dict[str, Any] | None = None
    """Where the judgement is from."""

    _where: str = PrivateAttr(default="preference")
    _files: dict[str, Blob] = PrivateAttr(default_factory=dict)

    @property
    def where(self) -> str:
        """File and line that it was read from, for messages."""
        return self._where

    @property
    def modality(self) -> Modality:
        """What the answers are."""
        return self.chosen.modality

    @property
    def words(self) -> str:
        """The prompt's words."""
        texts = (text for message in self.prompt for text in message.words)
        return " ".join(text.strip() for text in texts).strip()

    @property
    def images(self) -> list[str]:
        """What the prompt calls its images."""
        return [image for message in self.prompt for image in message.images]

    def names(self) -> list[str]:
        """What the prompt and the answers call their images."""
        named = (self.chosen.image, self.rejected.image)
        return [*self.images, *(image for image in named if image is not None)]

    def files(self) -> list[Blob]:
        """Every image that the prompt and the answers name."""
        return [self._files[name] for name in self.names()]

    def read_image(self, name: str) -> Image.Image:
        """An image by its name.

        Raises:
            UserError: it cannot be read; naming the line.
        """
        blob = self._files[name]
        try:
            return read_image(blob.read(), blob.name)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None

    def key(self) -> tuple[str, ...]:
        """What distinguishes prompts: the words, and where the images lie or what they are."""
        blobs = (self._files[name] for name in self.images)
        return (self.words, *(blob.name if blob.data is None else _digest(blob.data) for blob in blobs))

    def turns(self) -> list[Message]:
        """The prompt as messages of a record."""

        def part(one: PromptPart) -> str | ImagePart:
            return one.text if one.text is not None else ImagePart(self._files[str(one.image)])

        return [Message(message.role, tuple(map(part, message.content))) for message in self.prompt]

    def read_images(self) -> list[Image.Image]:
        """The prompt's images."""
        return [self.read_image(name) for name in self.images]


def find_problem(preference: Preference) -> str | None:
    """What is wrong between the parts of a preference, each of which is right."""
    chosen, rejected = preference.chosen, preference.rejected
    *before, last = preference.prompt
    if last.role != "user":
        return f"prompt: ends in a turn of the {last.role}; the user's comes before the answers"
    if chosen.modality != rejected.modality:
        return f"chosen is {_kind(chosen)} and rejected {_kind(rejected)}; give two of a kind"
    if preference.modality == "image" and preference.images:
        return "prompt: a drawing is asked for in words only; leave the image out"
    if preference.modality == "image" and before:
        return "prompt: a drawing is asked for in one turn; leave the others out"
    return None if preference.words else "prompt: has no words"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _kind(answer: Response) -> str:
    return "a text" if answer.modality == "text" else "an image"


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Read JSON lines: `file:line` for messages, and the value; blank lines are passed over.

    Raises:
        UserError: the file is missing or a line is no JSON object.
    """
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    try:
        with open_regular(path) as file:
            content = file.read()
    except (OSError, UserError) as error:
        raise UserError(f"{path}: not readable as text ({str(error).removeprefix(f'{path}: ')})") from None
    yield from parse_lines(path, content)


def parse_lines(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """As `read_lines`, of what a file holds."""
    try:
        text = decode_text(content)
    except UserError as error:
        raise UserError(f"{path}: not readable as text ({error})") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object, got {show(value)}")
        yield where, value


class Found(NamedTuple):
    """What a location holds: good preferences, and where those stand whose answers are equal."""

    preferences: list[Preference]
    equal: list[str]


def read_preferences(location: Location, reading: Reading = ANYWHERE) -> list[Preference]:
    """Read and check preferences; pairs of equal answers are left out, with a note that counts them.

    Args:
        location: a file, a folder or a pattern, as `open_source` takes them.
        reading: how to read it; by default images may lie anywhere, which recipes and commands forbid unless told.

    Raises:
        UserError: one line naming file, line (or sample) and field of what is wrong, of the first ten that are: a wrong
            type, answers of different modality, a score that is no number, a missing image; or there are none.
    """
    found = find_preferences(location, reading)
    if found.equal:
        pairs = len(found.preferences) + len(found.equal)
        line = f"{len(found.equal)} of {pairs} pairs left out: chosen and rejected are equal"
        warnings.warn(f"{location_name(location)}: {line} (first: {found.equal[0]})", UserNote, stacklevel=2)
    return found.preferences


def find_preferences(location: Location, reading: Reading = ANYWHERE) -> Found:
    """As `read_preferences`, which says what this only counts; its errors are those."""
    source = open_source(location, reading)
    if not isinstance(source, RowSource):
        raise UserError(f"{source.location}: images, but no preferences")
    found = Found([], [])
    problems: list[str] = []
    for index in range(len(source)):
        where = None
        try:
            where = source.place(index)
            preference = _read(source, index, where)
        except BadRecord as error:
            problems.append(str(error) if where is None else f"{where}: {error.reason}")
        except UserError as error:
            problems.append(f"{where}: {error}")
        else:
            if preference.chosen.same(preference.rejected):
                found.equal.append(where)
            else:
                found.preferences.append(preference)
    refuse_preferences(source.location, problems, len(source))
    if found.equal and not found.preferences:
        raise UserError(
            f"{source.location}: chosen and rejected are equal in each pair; there is nothing to prefer"
        )
    if not found.preferences:
        raise UserError(f"{source.location}: empty; it should hold a preference a line")
    return found


def refuse_preferences(location: str, problems: Sequence[str], total: int) -> None:
    """Refuse preferences of which some are wrong, naming the first ten.

    Raises:
        UserError: there are problems.
    """
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        named = "; ".join(problems[:NAMED])
        raise UserError(f"{location}: {len(problems)} of {total} preferences are wrong: {named}{more}")


def _read(source: RowSource, index: int, where: str) -> Preference:
    """The preference at a place.

    Raises:
        UserError: there is none; `BadRecord` where the row cannot be read.
    """
    entry = source.entry(index)
    value, files = read_form(entry.row, entry.find, source.reading.fields)
    try:
        preference = validate(Preference, value, where)
    except UserError as error:
        raise UserError(str(error).removeprefix(f"{where}: ")) from None
    if (problem := find_problem(preference)) is not None:
        raise UserError(problem)
    preference._where, preference._files = where, files
    return preference


def check_response_codes(
    codes: list[list[int]], vocabulary: int, grid: tuple[int, int] | None, where: str
) -> None:
    """Check the codes of an answer against a model.

    Args:
        codes: rows of codes.
        vocabulary: how many codes there are.
        grid: rows and columns of a drawing; None where any size is drawn.
        where: file, line and field, for the message.

    Raises:
        UserError: a code that the model does not have, or another count than it draws.
    """
    rows, columns = len(codes), len(codes[0])
    if grid is not None and (rows, columns) != grid:
        raise UserError(f"{where}: {rows} x {columns} codes; this model draws {grid[0]} x {grid[1]}")
    highest = max(max(row) for row in codes)
    if highest >= vocabulary:
        raise UserError(f"{where}: code {highest}; this model's codes are 0 to {vocabulary - 1}")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write JSON lines, whole or not at all; return how many."""
    count = 0
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count
