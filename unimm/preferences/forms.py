"""From a row in anybody's form to a prompt and two answers, named as a `Preference` names them.

`chosen` and `rejected` are texts, images, objects of ours (`{"text"}`, `{"image"}`, `{"codes"}`), a turn of the
assistant, or turns that end in one. The prompt is the first of these that a row has:

- the turns that both answers begin with (UltraFeedback);
- `conversations` or `messages`: turns (LLaMA-Factory, ms-swift, whose `rejected_response` is the worse answer);
- `prompt` (ours, TRL's), `question` (RLAIF-V), `instruction` with `input` (Alpaca) and the like: words or turns.

Images and `<image>` are as in other data (`unimm.data.sources.rows`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from unimm.data.sources import Blob, ImagePart, Message, Record
from unimm.data.sources.columns import ASKED, KNOWN, renamed
from unimm.data.sources.images import looks_like_image
from unimm.data.sources.rows import Find, dialogue, question_turns
from unimm.data.sources.turns import SAID, Turn, read_turns, write_messages
from unimm.documents import shown_key
from unimm.errors import UserError
from unimm.sections import show

SIDES = ("chosen", "rejected")
OURS = ("prompt", *SIDES, "margin")
OTHER_NAMES = {"rejected": ("rejected_response", "rejected_messages")}
NAMED_BY_US = {"text", "image", "codes"}
LONGEST_NAME = 200


def is_form(row: Any) -> bool:
    """Whether a row is meant as a preference, though it may lack something."""
    names = {*SIDES, *(name for others in OTHER_NAMES.values() for name in others)}
    return isinstance(row, Mapping) and any(row.get(name) is not None for name in names)


def read_form(row: Any, find: Find, fields: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Blob]]:
    """A row as the fields of a `Preference`, and the images that they name.

    Args:
        row: its columns.
        find: makes a `Blob` of what a column says of an image.
        fields: our name of a column -> the row's.

    Raises:
        UserError: the line names the column that is missing or holds something else.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"expected a JSON object, got {show(row)}")
    columns = renamed(row, fields)
    _check_spelling(columns)
    for ours, others in OTHER_NAMES.items():
        found = next((name for name in others if name in columns), None)
        if ours not in columns and found is not None:
            columns[ours] = columns[found]
    images = _Images(find)
    whole = "chosen" not in columns and {"messages", "rejected"} <= columns.keys()
    prompt = _split_messages(columns) if whole else None
    for side in SIDES:
        if side not in columns:
            raise UserError(f"{side}: missing")
    sides = [_turns(columns[side], side) for side in SIDES]
    answers = [
        _answer(columns[side] if turns is None else turns[-1], side, images)
        for side, turns in zip(SIDES, sides, strict=True)
    ]
    if any(isinstance(answer, Mapping) and "text" not in answer for answer in answers):
        _drop_members(columns)
    turns = prompt or _prompt(columns, _shared([turns[:-1] if turns else [] for turns in sides]))
    value: dict[str, Any] = {
        name: columns[name] for name in ("margin", "scores", "source") if name in columns
    }
    asked = Record("prompt", tuple(dialogue(columns, turns, images.find)))  # checks who says what
    value["prompt"] = [images.message(message) for message in asked.messages]
    return {**value, **dict(zip(SIDES, answers, strict=True))}, images.files


class _Images:
    """The images of a row by name: the data's own, or a number where it gives none."""

    def __init__(self, find: Find) -> None:
        self._find = find
        self.files: dict[str, Blob] = {}
        self.names: dict[Blob, str] = {}

    def find(self, value: Any) -> Blob:
        """The blob of what a column says of an image.

        Raises:
            UserError: it says something else, or there is no such file.
        """
        blob = self._find(value)
        if blob.path is not None and blob.size is None and not os.path.isfile(blob.path):
            raise UserError(f"{blob.path}: no such image")
        if blob not in self.names:
            said = isinstance(value, str) and blob.data is None and len(value) <= LONGEST_NAME
            name = value if said else f"image {len(self.files) + 1}"
            self.names[blob] = name
            self.files[name] = blob
        return blob

    def name(self, value: Any) -> str:
        """The name of what a column says of an image."""
        return self.names[self.find(value)]

    def message(self, message: Message) -> dict[str, Any]:
        """A message as a `Preference` has it."""
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if not isinstance(part, ImagePart):
                content.append({"text": part})
            elif part.draw:
                raise UserError("prompt: a drawing among earlier answers; only words are looked back at")
            else:
                content.append({"image": self.names[part.blob]})
        return {"role": message.role, "content": content}


def _check_spelling(columns: Mapping[str, Any]) -> None:
    """Refuse a name that is one of ours but for a slip; columns of other names are passed over."""
    for name in columns:
        close = difflib.get_close_matches(name, OURS, n=1, cutoff=0.85)
        if close and name not in OURS and name not in KNOWN:
            raise UserError(f'{shown_key(name)}: unknown key; did you mean "{close[0]}"?')


def _split_messages(columns: dict[str, Any]) -> list[Turn]:
    """The turns of `messages` before the last, which is the better answer (ms-swift)."""
    *before, last = read_turns(columns["messages"], "messages")
    columns["chosen"] = last.content
    return before


def _turns(value: Any, side: str) -> list[Turn] | None:
    """An answer's turns, the last of which is the answer; None where it is no turn.

    Raises:
        UserError: the last is not the assistant's.
    """
    if isinstance(value, Mapping):
        if not any({*keys} <= value.keys() for keys in SAID):
            return None
        value = [value]
    if not isinstance(value, list):
        return None
    turns = read_turns(value, side)
    if turns[-1].role != "assistant":
        raise UserError(f"{turns[-1].where}: the last turn of an answer is the assistant's")
    return turns


def _answer(value: Any, side: str, images: _Images) -> Any:
    """An answer as a `Preference` has it; what is none is left to be refused there."""
    if isinstance(value, Turn):
        if isinstance(value.content, str):
            return {"text": value.content}
        (message,) = write_messages([value], [], images.find)
        match message.parts:
            case (str(words),):
                return {"text": words}
            case (ImagePart(blob),):
                return {"image": images.names[blob]}
        raise UserError(f"{side}: several parts; give words or one drawing")
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, Mapping):
        given = {name: one for name, one in value.items() if one is not None}
        if given and given.keys() <= NAMED_BY_US:
            return {"image": images.name(given["image"])} if given.keys() == {"image"} else given
    if looks_like_image(value):
        return {"image": images.name(value)}
    return value


def _drop_members(columns: dict[str, Any]) -> None:
    """Forget images that a tar put into the row: its answers name them."""
    for name in ("image", "images"):
        value = columns.get(name)
        if all(isinstance(one, Blob) for one in (value if isinstance(value, list) else [value])):
            columns.pop(name, None)


def _shared(begun: Sequence[Sequence[Turn]]) -> list[Turn]:
    """The turns that both answers begin with.

    Raises:
        UserError: they begin with different ones.
    """
    one, other = ([turn[:2] for turn in turns] for turns in begun)
    if one and other and one != other:
        raise UserError("chosen and rejected: the turns before the answers differ; give one prompt")
    return list(begun[0] or begun[1])


def _prompt(columns: Mapping[str, Any], shared: list[Turn]) -> list[Turn]:
    """The turns of the prompt; `shared` are those that the answers begin with.

    Raises:
        UserError: there are none.
    """
    if shared:
        return shared
    for name in ("conversations", "messages"):
        if name in columns:
            return read_turns(columns[name], name)
    asked = next((name for name in ("prompt", *ASKED) if name in columns), None)
    if asked is None:
        raise UserError("prompt: missing")
    value = columns[asked]
    turns = value if isinstance(value, list) else [value]
    if all(isinstance(turn, Mapping) and "content" in turn for turn in turns):
        turns = [{"role": "user", **turn} for turn in turns]  # ours need not say whose turn it is
        return question_turns({**columns, asked: turns}, asked)
    return question_turns(columns, asked)
