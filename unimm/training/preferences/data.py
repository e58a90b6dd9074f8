"""Preferences on disk: one JSON object a line, `prompt`, `chosen` and `rejected`, checked before anything is trained.

A prompt is a user's turn of words and images, or just words; an answer is a text, an image file, or the codes that
were sampled (kept because tokenising a drawing again gives other codes):

    {"prompt": "a red apple", "chosen": {"codes": [[3, 1], [0, 2]]}, "rejected": {"image": "b.png"}}
    {"prompt": [{"role": "user", "content": [{"image": "a.png"}, {"text": "what is this?"}]}],
     "chosen": "an apple", "rejected": "a pear", "scores": [0.9, 0.2], "source": "vote"}

Paths are relative to the file that names them. Or the same objects are the `json` members of webdataset tars, in which
images are named by the extensions of the sample's other members (`chosen.png`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from unimm.data.sources import Blob, Reading, expand
from unimm.data.sources.tars import TarShards, find_member
from unimm.errors import UserError
from unimm.images import atomic_write, read_image
from unimm.sections import NotNegative, Section, show, validate

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = ("text", "image")
Finite = Annotated[float, Field(allow_inf_nan=False)]
Codes = Annotated[list[Annotated[list[NotNegative], Field(min_length=1)]], Field(min_length=1)]


class Part(Section):
    """A part of a prompt: words or an image file."""

    type: Literal["text", "image"] | None = None
    """Says which of the two it is, as chat formats do; not needed."""
    text: str | None = None
    image: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Part:
        if (self.text is None) == (self.image is None):
            raise ValueError("expected either text or image")
        return self


class Message(Section):
    """The user's turn."""

    role: Literal["user"] = "user"
    content: Annotated[list[Part], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _words(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("content"), str):
            return {**data, "content": [{"text": data["content"]}]}
        return data


def _turn(data: Any) -> Any:
    return [{"content": data}] if isinstance(data, str) else data


Prompt = Annotated[list[Message], Field(min_length=1, max_length=1), BeforeValidator(_turn)]
"""What is answered: a user's turn, or just words."""


class Answer(Section):
    """A text, an image file, or rows of image codes."""

    text: str | None = None
    image: str | None = None
    codes: Codes | None = None

    @model_validator(mode="before")
    @classmethod
    def _words(cls, data: Any) -> Any:
        return {"text": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one(self) -> Answer:
        given = [name for name in ("text", "image", "codes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of text, image, codes, got {', '.join(given) or 'none'}")
        if self.text is not None and not self.text.strip():
            raise ValueError("the text is empty")
        if self.codes is not None and len({len(row) for row in self.codes}) > 1:
            raise ValueError("the rows of codes are of different lengths")
        return self

    @property
    def modality(self) -> Modality:
        """Text or image."""
        return "image" if self.text is None else "text"


class Preference(Section):
    """A prompt and two answers of one kind, of which one is better."""

    prompt: Prompt
    chosen: Answer
    rejected: Answer
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
        parts = (part.text for message in self.prompt for part in message.content)
        return " ".join(text.strip() for text in parts if text is not None).strip()

    @property
    def images(self) -> list[str]:
        """The prompt's image files."""
        parts = (part.image for message in self.prompt for part in message.content)
        return [image for image in parts if image is not None]

    def names(self) -> list[str]:
        """What the prompt and the answers call their images."""
        named = (self.chosen.image, self.rejected.image)
        return [*self.images, *(image for image in named if image is not None)]

    def files(self) -> list[Blob]:
        """Every image that the prompt and the answers name."""
        return [self._files[name] for name in self.names()]

    def picture(self, name: str) -> Image.Image:
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
        """What tells prompts apart: the words, and where the images lie."""
        return (self.words, *(self._files[name].name for name in self.images))

    def pictures(self) -> list[Image.Image]:
        """The prompt's images."""
        return [self.picture(name) for name in self.images]


def find_problem(preference: Preference) -> str | None:
    """What is wrong between the parts of a preference, each of which is right."""
    chosen, rejected = preference.chosen, preference.rejected
    if chosen.modality != rejected.modality:
        return f"chosen is {_kind(chosen)} and rejected {_kind(rejected)}; give two of a kind"
    if chosen == rejected:
        return "chosen and rejected are equal; there is nothing to prefer"
    if preference.modality == "image" and preference.images:
        return "prompt: a drawing is asked for in words only; leave the image out"
    return None if preference.words else "prompt: has no words"


def _kind(answer: Answer) -> str:
    return "a text" if answer.modality == "text" else "an image"


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Read JSON lines: `file:line` for messages, and the value; blank lines are passed over.

    Raises:
        UserError: the file is missing or a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text ({error})") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object, got {show(value)}")
        yield where, value


Row = tuple[str, Any, Callable[[str], Blob]]
"""Where a preference is from, what it says, and what finds its images."""


def shards_of(location: str | Path) -> list[Path] | None:
    """The tars of a location, which is one, a folder of them or a pattern; None for any other file.

    Raises:
        UserError: it is a folder without tars, or a pattern of nothing.
    """
    path = Path(location)
    if path.is_dir():
        if not (tars := sorted(path.glob("*.tar"))):
            raise UserError(f"{path}: a folder without tars; give a file of JSON lines, or tars")
        return tars
    return ([path] if path.exists() else expand(str(location))) if path.suffix == ".tar" else None


def _rows(location: str | Path) -> Iterator[Row]:
    """The objects of a file of JSON lines, or of tars."""
    tars = shards_of(location)
    if tars is None:
        path = Path(location)
        for where, value in read_lines(path):
            yield where, value, lambda name: _beside(path.parent, name)
        return
    source = TarShards(tars, Reading(), str(location))
    for index in range(len(source)):
        tar, key, members = source.members(index)
        where = f"{tar}: {key}"
        if "json" not in members:
            raise UserError(f"{where}: has no member .json (it has {', '.join(members)})")
        try:
            value = json.loads(members["json"].read())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}.json: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}.json: expected a JSON object, got {show(value)}")
        yield where, value, lambda name, members=members: find_member(members, name)  # type: ignore[misc]


def _beside(folder: Path, name: str) -> Blob:
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: no such image")
    return Blob(str(path), path=str(path))


def read_preferences(location: str | Path) -> list[Preference]:
    """Read and check preferences.

    Args:
        location: a file of JSON lines; a tar, a folder of tars or a pattern of them.

    Raises:
        UserError: one line naming file, line (or sample) and field: bad JSON, a wrong type, sides that are equal or of
            different modality, a score that is no number, a missing image, or no preference at all.
    """
    found = []
    for where, value, find in _rows(location):
        preference = validate(Preference, value, where)
        if (problem := find_problem(preference)) is not None:
            raise UserError(f"{where}: {problem}")
        try:
            preference._files = {name: find(name) for name in preference.names()}
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        preference._where = where
        found.append(preference)
    if not found:
        raise UserError(f"{location}: empty; it should hold a preference a line")
    return found


def check_codes(codes: list[list[int]], vocabulary: int, grid: tuple[int, int] | None, where: str) -> None:
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
