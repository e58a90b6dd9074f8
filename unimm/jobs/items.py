"""What a job asks of one row of a source: the images of a caption, a question or conversation, a prompt to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from unimm.data.sources import BadRecord, RowSource, Source, open_source
from unimm.data.sources.columns import ASKED, renamed
from unimm.data.sources.entries import RowEntry
from unimm.data.sources.folder import ImageFolder
from unimm.data.sources.rows import Reading, dialogue, listed_images, make_record, question_turns, text_of
from unimm.data.sources.turns import Find, Turn, read_turns, write_messages
from unimm.errors import UserError
from unimm.jobs.recipe import AnyJob, AskRecipe, CaptionRecipe
from unimm.processing.messages import ImagePart, Message
from unimm.processing.processor import CAPTION_REQUESTS

TURN_COLUMNS = ("messages", "conversations")


@dataclass(frozen=True)
class JobItem:
    """One item of a job.

    Attributes:
        key: names it in its source.
        messages: what the model is given; the last is the user's.
    """

    key: str
    messages: tuple[Message, ...]

    @property
    def images(self) -> list[ImagePart]:
        """The images that are looked at, in their order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, ImagePart)]

    @property
    def words(self) -> str:
        """What the user says last: the request, the question or the prompt."""
        return spoken(self.messages[-1])


def spoken(message: Message) -> str:
    """The words of a message, without its images."""
    return "\n".join(part for part in message.parts if isinstance(part, str))


class JobItems:
    """The items of a job's source, by random access.

    Args:
        recipe: of the job.

    Attributes:
        source: what they are read from.

    Raises:
        UserError: nothing is there, its form is not known, or it is empty.
    """

    def __init__(self, recipe: AnyJob) -> None:
        self.recipe, self.reading = recipe, recipe.source.reading()
        self.source: Source = open_source(recipe.source.path, self.reading, strict=False)
        if not len(self.source):
            raise next(iter(self.source.broken), UserError(f"{self.source.location}: has no records"))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> JobItem:
        """The item at `index`.

        Raises:
            BadRecord: it cannot be used.
        """
        assert isinstance(self.source, RowSource | ImageFolder)
        entry = self.source.entry(index)
        try:
            return JobItem(entry.key, tuple(self._messages(entry)))
        except UserError as error:
            raise BadRecord(entry.key, entry.file, str(error).removeprefix(f"{entry.file}: ")) from None

    def _messages(self, entry: RowEntry) -> Sequence[Message]:
        if not isinstance(entry.row, Mapping):
            raise UserError(f"expected an object with columns, got {type(entry.row).__name__}")
        columns = renamed(entry.row, self.reading.fields)
        if isinstance(self.recipe, CaptionRecipe):
            return _showing(columns, entry, self.reading, self.recipe.options.request or CAPTION_REQUESTS[0])
        if not isinstance(self.recipe, AskRecipe):
            return [_prompt(columns, entry.find)]
        if self.recipe.options.question is not None:
            return _showing(columns, entry, self.reading, self.recipe.options.question)
        return _question(columns, entry.find)


class _Missing(NamedTuple):
    """What to say where a row has nothing to ask or to draw."""

    column: str
    hint: str

    def error(self, columns: Mapping[str, Any]) -> UserError:
        shown = ", ".join(str(name)[:40] for name in list(columns)[:8]) or "none"
        return UserError(f"{self.column}: missing (columns: {shown}); {self.hint}")


_IMAGE = _Missing("image", "fields names a column that is called otherwise")
_QUESTION = _Missing("question", "give options.question, or name the column in fields")
_PROMPT = _Missing("prompt", "a text, a prompt or a caption is drawn; fields names another column")


def _showing(columns: dict[str, Any], entry: RowEntry, reading: Reading, words: str) -> Sequence[Message]:
    """The row's images, and the same words for every row."""
    images = [ImagePart(entry.find(one)) for one in listed_images(columns)]
    if not images and any(name in columns for name in TURN_COLUMNS):
        record = make_record(entry.key, entry.row, entry.find, reading)
        images = [ImagePart(image.blob) for image in record.images()]
    if not images:
        raise _IMAGE.error(columns)
    return [Message("user", (*images, words.strip()))]


def _question(columns: dict[str, Any], find: Find) -> Sequence[Message]:
    """A conversation up to the user's last turn, or a question with what was said before."""
    turns: list[Turn] = []
    for name in TURN_COLUMNS:
        if name in columns:
            turns = read_turns(columns[name], name)
            break
    else:
        asked = next((name for name in ASKED if name in columns), None)
        if asked is None:
            raise _QUESTION.error(columns)
        turns = question_turns(columns, asked)
    return _asked(dialogue(columns, turns, find))


def _asked(messages: Sequence[Message]) -> Sequence[Message]:
    """Messages up to the user's last."""
    last = max((place for place, one in enumerate(messages) if one.role == "user"), default=None)
    if last is None:
        raise UserError("messages: there is no turn of the user to answer")
    found = messages[: last + 1]
    if any(isinstance(part, ImagePart) and part.draw for message in found for part in message.parts):
        raise UserError(
            "messages: an image is drawn before the last turn of the user; only words are answered"
        )
    return found


def _prompt(columns: dict[str, Any], find: Find) -> Message:
    """What is to be drawn, after the images that it goes with."""
    turns = next((name for name in TURN_COLUMNS if name in columns), None)
    if turns is not None:
        messages = _asked(dialogue(columns, read_turns(columns[turns], turns), find))
        if len(messages) > 1:
            raise UserError(
                f"{turns}: {len(messages)} turns before the drawing; a prompt is one of the user's"
            )
        return messages[0]
    name = next(
        (one for one in ("instruction", "text", "query", "question", "input") if one in columns), None
    )
    if name is None:
        raise _PROMPT.error(columns)
    value = columns[name]
    if isinstance(value, list | tuple) and value:  # several captions that say the same
        columns = {**columns, name: value[0]}
    shown = columns.get("input_image")
    listed = [] if shown is None else list(shown) if isinstance(shown, list | tuple) else [shown]
    return write_messages([Turn("user", text_of(columns, name), name)], listed, find)[0]
