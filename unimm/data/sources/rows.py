"""From a row (a JSON object, a Parquet row, the files of a tar sample) to a `Record`, whatever its columns are called.

A row is one of these; the first that fits is taken, and `fields` renames columns that are called otherwise:

- `messages` or `conversations`: turns, as OpenAI, TRL, LLaVA, ShareGPT and others write them;
- `texts` and `images`: turns `{"user", "assistant"}` about the images, as in the_cauldron and FineVision; or a document
  as two lists of one length, with null where the other has something;
- `input_image`, `instruction`, `output_image`: an edit;
- `question` and `answer`, or `answers` of which the most frequent is taken; `query` and `response`; `prompt` and
  `completion`; Alpaca's `instruction`, `input`, `output`; with `image` or `images`, or without;
- `image` and `text`: a pair, read as a caption or as a drawing (`pairs`); of several texts each has its turn;
- `text`.

`<image>` in a text stands for the next of the row's `image` or `images`; where no text has it, they come first.
Images of the assistant are to be drawn, all others are looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unimm.data.sources.columns import ANSWERED, ASKED, check_no_image, renamed, row_key, unknown_form
from unimm.data.sources.text import clean
from unimm.data.sources.turns import Find, Turn, read_turns, tidy, without_placeholders, write_messages
from unimm.errors import UserError
from unimm.processing.messages import ImagePart, Message, Part, Record

__all__ = ["Find", "PairDirection", "Reading", "make_record", "row_key"]

PairDirection = Literal["image_to_text", "text_to_image"]
NO_ANSWER = {"instruction": "output", "query": "response"}  # what is missed beside a column that asks
Versions = list[list[Message]]


@dataclass(frozen=True)
class Reading:
    """How a source is to be read.

    Attributes:
        pairs: what an image with a text is for.
        fields: our name of a column -> the source's; an empty one: there is none.
        images: folder that names of images are relative to; None: where the source lies.
        split: which split of a Hugging Face folder that has several.
        allow_outside: whether data may name files outside its folder.
        words: whether images in a folder must have words beside them, as what is learnt from has.
    """

    pairs: PairDirection = "image_to_text"
    fields: Mapping[str, str] = field(default_factory=dict)
    images: str | None = None
    split: str | None = None
    allow_outside: bool = False
    words: bool = True


def make_record(key: str, row: Any, find: Find, reading: Reading) -> Record:
    """Build the record of a row.

    Args:
        key: the record's key.
        row: the row's columns.
        find: turns what a column says of an image (a name, bytes) into a `Blob`.
        reading: how to read it.

    Raises:
        UserError: no form fits, or a column is not what it should be; the message starts with the column.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"expected an object with columns, got {type(row).__name__}")
    columns = renamed(row, reading.fields)
    versions = _versions(columns, find, reading)
    if not versions:
        raise unknown_form([str(name) for name, value in row.items() if value is not None])
    first, *others = versions
    if not any(message.role == "assistant" for message in first):
        raise UserError("nobody answers, so nothing can be learnt from it")
    record = Record(key, tuple(first), tuple(map(tuple, others)))
    if not record.images():
        check_no_image(row, reading.fields)
    return record


def _versions(row: dict[str, Any], find: Find, reading: Reading) -> Versions:
    """What a row says, in one wording or several; none where no form fits."""
    if "chosen" in row and "rejected" in row:
        raise UserError("chosen and rejected: preferences, which the task dpo trains on")
    if "completion" in row and isinstance(row.get("label"), bool):
        raise UserError("completion and label: judged answers, of which the bad ones are not to be learnt")
    for name in ("messages", "conversations"):
        if name in row:
            said = [row[name], *row["others"]] if _is_encoded(row, name) else [row[name]]
            return [dialogue(row, read_turns(turns, name), find) for turns in said]
    if "texts" in row:
        return _texts(row, find, reading)
    if "output_image" in row:
        return [_edit(row, find)]
    asked = next((name for name in ASKED if name in row), None)
    answered = next((name for name in ANSWERED if name in row), None)
    if asked is not None and (answered is not None or asked not in ("prompt", "input")):
        return [_answer(row, asked, answered, find)]
    return _pair(row, row["text"], "text", find, reading) if "text" in row else []


def _is_encoded(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row comes of `unimm data encode`, which keeps a record's other wordings."""
    return name == "messages" and isinstance(row.get("others"), list) and "key" in row


def dialogue(row: Mapping[str, Any], turns: list[Turn], find: Find) -> list[Message]:
    """The messages of turns, after the row's words for the system where they have none of their own.

    Raises:
        UserError: see `write_messages`.
    """
    system = row.get("system")
    if isinstance(system, str) and system.strip() and turns[0].role != "system":
        turns = [Turn("system", system, "system"), *turns]
    return write_messages(turns, listed_images(row), find)


def _texts(row: Mapping[str, Any], find: Find, reading: Reading) -> Versions:
    """A list of turns about images, a document of two lists, or several captions of one image."""
    texts = row["texts"]
    if isinstance(texts, Mapping | str) or (
        isinstance(texts, list) and texts and isinstance(texts[0], Mapping)
    ):
        return [dialogue(row, read_turns(texts, "texts"), find)]
    if "image" in row and "images" not in row:
        return _pair(row, texts, "texts", find, reading)
    parts = list(tidy(_document(row, find), "texts"))
    return [[Message("assistant", tuple(parts))]]


def _document(row: Mapping[str, Any], find: Find) -> Iterator[Part]:
    """The parts of a document of two lists of one length."""
    texts, images = row["texts"], row.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise UserError("texts: expected a list as long as images, with null where an image stands")
    for position, (text, image) in enumerate(zip(texts, images, strict=True)):
        where = f"texts[{position}]"
        if not isinstance(text, str | None):
            raise UserError(f"{where}: expected a text, got {type(text).__name__}")
        said = text is not None and text.strip()
        if said and image is not None:
            raise UserError(f"{where}: a text where images has an image; one of the two must be null")
        if not said and image is None:
            raise UserError(f"{where}: neither a text nor an image")
        yield ImagePart(find(image), draw=True) if image is not None else str(text)


def _edit(row: Mapping[str, Any], find: Find) -> list[Message]:
    """An image, or several or none, what to do with them, and the image that comes of it."""
    name = next((name for name in ("instruction", "text") if name in row), "instruction")
    turn = Turn("user", text_of(row, name), name)
    shown = row.get("input_image")
    listed = [] if shown is None else list(shown) if isinstance(shown, list | tuple) else [shown]
    drawn = ImagePart(find(row["output_image"]), draw=True)
    return [*write_messages([turn], listed, find), Message("assistant", (drawn,))]


def _answer(row: Mapping[str, Any], asked: str, answered: str | None, find: Find) -> list[Message]:
    """A question with its answer, after what was said before."""
    if answered is None:
        raise UserError(f"{NO_ANSWER.get(asked, 'answer')}: missing")
    turns = question_turns(row, asked)
    if answered == "completion" and isinstance(row[answered], list | Mapping):
        turns += read_turns(row[answered], answered)
    else:
        turns.append(Turn("assistant", _most_frequent(row, answered), answered))
    return dialogue(row, turns, find)


def question_turns(row: Mapping[str, Any], asked: str) -> list[Turn]:
    """What was said before and what is asked in the column `asked`: words, or turns as TRL has them.

    Raises:
        UserError: a column holds something else.
    """
    turns = _history(row)
    if isinstance(row[asked], list | Mapping):
        return turns + read_turns(row[asked], asked)
    more = [text_of(row, name) for name in ("input", "context") if name != asked and row.get(name)]
    return [*turns, Turn("user", "\n\n".join([text_of(row, asked), *more]), asked)]


def _history(row: Mapping[str, Any]) -> list[Turn]:
    """Earlier questions and answers, `[[question, answer], …]`."""
    turns = []
    for position, pair in enumerate(row.get("history") or []):
        where = f"history[{position}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise UserError(f"{where}: expected a question and an answer")
        turns += [Turn("user", pair[0], where), Turn("assistant", pair[1], where)]
    return turns


def _most_frequent(row: Mapping[str, Any], name: str) -> str:
    """The answer; of several people's the one that most gave, and of those the first."""
    value = row[name]
    if isinstance(value, Mapping):  # as in SQuAD
        value = value.get("text")
    if not isinstance(value, list | tuple):
        return text_of({name: value}, name)
    answers = [one.get("answer") if isinstance(one, Mapping) else one for one in value]
    said = [text_of({name: one}, name) for one in answers if one is not None and one != ""]
    if not said:
        raise UserError(f"{name}: empty")
    return Counter(said).most_common(1)[0][0]


def _pair(row: Mapping[str, Any], value: Any, name: str, find: Find, reading: Reading) -> Versions:
    """A text, or several that say the same, alone or with the images that they describe."""
    images = [ImagePart(find(one)) for one in listed_images(row)]
    texts = list(value) if isinstance(value, list | tuple) else [value]
    if not texts:
        raise UserError(f"{name}: empty")
    versions: Versions = []
    for text in texts:
        words = without_placeholders(text_of({name: text}, name), name, len(images))
        said: Part = text_of({name: words}, name)
        if not images:
            versions.append([Message("assistant", (said,))])
        elif reading.pairs == "image_to_text":
            versions.append([Message("user", tuple(images)), Message("assistant", (said,))])
        else:
            drawn = tuple(ImagePart(image.blob, draw=True) for image in images)
            versions.append([Message("user", (said,)), Message("assistant", drawn)])
    return versions


def listed_images(row: Mapping[str, Any]) -> Sequence[Any]:
    """What a row says of its images: `images`, or `image`, which may be a list too."""
    for name in ("images", "image"):
        value = row.get(name)
        if isinstance(value, list | tuple):
            found = [one for one in value if one is not None]
            if found:
                return found
        elif value is not None:
            return [value]
    return []


def text_of(row: Mapping[str, Any], name: str) -> str:
    """The text in a column, without white space at its ends.

    Raises:
        UserError: there is none, or something else.
    """
    value = row.get(name)
    if value is None:
        raise UserError(f"{name}: missing")
    if not isinstance(value, str):
        raise UserError(f"{name}: expected a text, got {type(value).__name__}")
    if not (text := clean(value, name)):
        raise UserError(f"{name}: empty")
    return text
