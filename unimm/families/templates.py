"""Chat templates of checkpoints: found, rendered by transformers in bounds, and read as a `Turns`.

A template is a program from somewhere else. It is rendered once, when a checkpoint is read, in a process of its own
(`unimm.families.render`), for conversations of every form with placeholders in the place of words. What it writes
between two neighbouring pieces becomes the conversation's joins; so asking, drawing and training write turns as the
template does, token by token, and nothing that a user types goes through it. Where what it writes depends on more than
that, it cannot be followed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from unimm.errors import UserError
from unimm.families import render
from unimm.files import read_text
from unimm.models.configuration import UniMMConfig
from unimm.models.turns import (
    ASK,
    ASSISTANT_TEXT,
    END,
    START,
    START_SEEN,
    SYSTEM_TEXT,
    TEMPLATE_FILE,
    USER_IMAGE,
    USER_TEXT,
    Join,
    Turns,
    join_key,
)
from unimm.processing.processor import PROCESSOR_FILE

if TYPE_CHECKING:
    from unimm.families.source import Checkpoint

PLACEHOLDER = "<image>"  # of an image, where the tokenizer has no token for it
MOST = 2**20  # bytes of a template's file
PATIENCE = 120  # seconds for a machine that is busy; a template itself has `render.SECONDS` of processor time
ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Conversations that are rendered: the turns of system, user and assistant, `i` an image and `t` a text of each. The
# first ones every template has to take; the others only make sense to some.
TEXTS = ("u:t", "u:t a:t", "u:t a:t u:t", "u:t a:t u:t a:t u:t a:t")
IMAGES = ("u:it", "u:iit", "u:iiit", "u:it a:t", "u:it a:t u:t a:t u:t", "u:iit a:t u:it a:t u:iit")
OTHERS = (
    "s:t u:t", "s:t u:t a:t u:t", "u:tt", "a:t u:t", "a:t u:t a:t u:t a:t", "u:t u:t a:t", "u:t a:t a:t u:t",
)  # fmt: skip
OTHER_IMAGES = (
    "s:t u:it", "s:t u:iit a:t u:it", "u:i", "u:ii", "u:i a:t", "u:i a:t u:i a:t u:t", "u:ti", "u:tit", "u:tti",
    "u:itit", "u:ti a:t u:it", "a:t u:it", "u:i u:t a:t", "u:i u:i a:t", "u:t u:i", "u:it u:it",
)  # fmt: skip
PAD = (" \n", "\n ")  # white space after and before a text, to see which is kept


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template and the file that it is from."""

    text: str
    where: str


# --- finding ------------------------------------------------------------------------------------------------


def processor_template(checkpoint: Checkpoint) -> Template | None:
    """Return the template of a checkpoint's processor, from the file that transformers' processors prefer.

    Raises:
        UserError: a file's template is no text, or there are several and none is the default.
    """
    for name in (PROCESSOR_FILE, "chat_template.json"):
        if found := _of_document(checkpoint, name):
            return found
    path = checkpoint.folder / TEMPLATE_FILE
    return Template(read_text(path, MOST), str(path)) if path.exists() else None


def tokenizer_template(checkpoint: Checkpoint) -> Template | None:
    """Return the template in a checkpoint's `tokenizer_config.json`; raises as `processor_template`."""
    return _of_document(checkpoint, "tokenizer_config.json")


def _of_document(checkpoint: Checkpoint, name: str) -> Template | None:
    """The template that a JSON file has, by itself or as the default of several."""
    given = checkpoint.json(name).get("chat_template")
    where = f"{checkpoint.folder / name}: chat_template"
    if given is None or given == {} or given == []:
        return None
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        given = {str(entry.get("name")): entry.get("template") for entry in given}
    if isinstance(given, dict):
        if "default" not in given:
            names = ", ".join(map(str, given))
            raise UserError(f"{where}: expected a template called default, found {names[:200]}")
        given = given["default"]
    if not isinstance(given, str):
        raise UserError(f"{where}: expected a text, or texts by name, got {type(given).__name__}")
    return Template(given, where)


def saved_conversation(checkpoint: Checkpoint, config: UniMMConfig) -> dict[str, Any] | None:
    """Return the conversation of a folder of unimm's own layout: its configuration's, or that of a template put there.

    Raises:
        UserError: as `follow`.
    """
    template = processor_template(checkpoint) or tokenizer_template(checkpoint)
    base = Turns(**(config.conversation or {}))
    if template is None or template.text == base.template:
        return config.conversation
    text_tokenizer = checkpoint.text_tokenizer
    placeholder = str(text_tokenizer.convert_ids_to_tokens(int(config.layout["feature"])) or PLACEHOLDER)
    looks = config.encoder is not None
    return vars(follow(template, base, text_tokenizer, placeholder, looks))


# --- following ----------------------------------------------------------------------------------------------


def follow(
    template: Template,
    base: Turns,
    text_tokenizer: PreTrainedTokenizerBase,
    placeholder: str,
    looks: bool = True,
) -> Turns:
    """Return a conversation that writes turns as a template does.

    Args:
        template: what to follow.
        base: the family's conversation, for what a template does not say.
        text_tokenizer: the checkpoint's, whose special tokens a template may name.
        placeholder: what a template writes for an image.
        looks: whether the model looks at images, so that the template has to place them.

    Raises:
        UserError: the template fails, takes too much time or memory, or cannot be followed.
    """
    names = {
        name: value for name, value in text_tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    try:
        turn = _followed(template.text, base.without_template(), tuple(names.items()), placeholder, looks)
    except UserError as error:
        raise UserError(f"{template.where}: {error}") from None
    return turn if turn.end in text_tokenizer.get_added_vocab() else dataclasses.replace(turn, end="")


@functools.lru_cache(64)
def _followed(
    text: str, base: Turns, names: tuple[tuple[str, str], ...], placeholder: str, looks: bool
) -> Turns:
    known = dict(names)
    try:
        reading = _Reading(placeholder, None).read(text, known, looks)
    except _NoListsError:
        reading = _Reading(placeholder, base).read(text, known, looks)
    joins = reading.joins
    _ask_for_answers(joins)
    begins = _begin_once(joins, known.get("bos_token"))
    later = joins[join_key(ASSISTANT_TEXT, USER_TEXT, False)].words
    user, own = _user_mark(joins[join_key(START, USER_TEXT, False)].words, later, known)
    if base.message and not own:
        _add_system(joins, base.message)
    special = "|".join(re.escape(token) for token in sorted(known.values(), key=len, reverse=True)) or "(?!)"
    closing = re.match(rf"\s*({special}|<\|[^<>|\s]+\|>)", joins[join_key(ASSISTANT_TEXT, END, False)].words)
    return dataclasses.replace(
        base,
        bos="first" if begins and base.bos == "never" else base.bos,
        user=user,
        assistant=joins[join_key(USER_TEXT, ASK, False)].words,
        template=text,
        joins={key: dataclasses.astuple(join) for key, join in joins.items()},
        images_first=reading.images_first,
        system_last=reading.system_last,
        end=closing[1] if closing else "",
    )


def _ask_for_answers(joins: dict[str, Join]) -> None:
    """Where a template writes nothing to ask for an answer, take what it writes between question and answer."""
    for place in (USER_TEXT, USER_IMAGE):
        asks, ends, answers = (
            joins.get(join_key(place, right, False)) for right in (ASK, END, ASSISTANT_TEXT)
        )
        if asks is None or answers is None or (ends is not None and asks.words != ends.words):
            continue
        if asks.words.strip() and not answers.words.startswith(asks.words):
            continue  # it always asks, whether told to or not
        if not answers.words.strip() and place == USER_TEXT:
            raise UserError("writes nothing between a question and its answer")
        joins[join_key(place, ASK, False)] = Join(answers.words.rstrip(), answers.strip_left)


def _begin_once(joins: dict[str, Join], bos: str | None) -> bool:
    """Leave out the token that the stream begins with, however often a template opens with it; whether it does."""
    begins = False
    for key, join in joins.items():
        words = join.words
        while bos and key.startswith((f"{START}|", f"{START_SEEN}|")) and words.startswith(bos):
            words, begins = words.removeprefix(bos), True
        joins[key] = dataclasses.replace(join, words=words)
    return begins


def _user_mark(first: str, later: str, names: Mapping[str, str]) -> tuple[str, bool]:
    """What opens every turn of the user, and whether the first has words of the system's before it."""
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first[::-1], later[::-1], strict=False))
    common = "".join(character for character, _ in equal)[::-1]
    before = first.removesuffix(common)
    for token in names.values():
        before = before.replace(token, "")
    return common.lstrip(), any(character.isalnum() for character in before)


def _add_system(joins: dict[str, Join], message: str) -> None:
    """Let conversations without a system's message begin with this one, if the template writes any."""
    opening = joins.get(join_key(START, SYSTEM_TEXT, False))
    for place in (USER_TEXT, USER_IMAGE):
        closing = joins.get(join_key(SYSTEM_TEXT, place, False))
        if opening is not None and closing is not None:
            key = join_key(START, place, False)
            joins[key] = Join(opening.words + message + closing.words, False, closing.strip_right)


# --- reading ------------------------------------------------------------------------------------------------


class _NoListsError(Exception):
    """A template wants each message's content as one text, not as a list of parts."""


class _Reading:
    """Reads off rendered conversations what a template writes between pieces.

    Args:
        placeholder: what stands for an image.
        base: None where a message's content is a list of parts; else it is a text, and this conversation's fields say
            how images stand in it.
    """

    def __init__(self, placeholder: str, base: Turns | None) -> None:
        self.placeholder, self.base = placeholder, base
        self.joins: dict[str, Join] = {}
        self.images_first = self.system_last = False
        self.seen: dict[str, str] = {}  # words of each join without white space around texts

    def read(self, text: str, names: Mapping[str, str], looks: bool) -> _Reading:
        """Render every form and learn from it; raises as `follow`."""
        forms = [*TEXTS, *(IMAGES if looks else ()), *OTHERS, *(OTHER_IMAGES if looks else ())]
        needed = set(TEXTS + IMAGES)
        # some take lists from users, and of the system a text alone
        ways = {form: (False, True) if form[0] == "s" and self.base is None else (False,) for form in forms}
        asked = [(form, asks, told) for form in forms for told in ways[form] for asks in (True, False)]
        requests = [
            {"messages": self._messages(form, padded, told), "asks": asks and form.split(" ")[-1][0] == "u"}
            for form, asks, told in asked
            for padded in (False, True)
        ]
        results = iter(_render(text, requests, names))
        found = {key: (next(results), next(results)) for key in asked}
        for (form, *_), (plain, _) in found.items():
            if form in needed and "text" not in plain:
                self._fail(form, plain["error"])
            if form in TEXTS and self.base is None and _is_list(plain["text"]):
                raise _NoListsError
        whole = [key for key, texts in found.items() if self._is_whole(key, texts)]
        rendered = [
            (form, asks, *found[form, asks, told])
            for form, asks, told in whole
            if not told or (form, asks, False) not in whole
        ]
        self.images_first = self._reorders([(form, plain["text"]) for form, _, plain, _ in rendered])
        for form, asks, plain, _ in rendered:
            self._learn(form, asks, plain["text"])
        for form, asks, _, padded in rendered:
            self._learn_spaces(form, asks, padded["text"])
        self._merge_starts()
        return self

    def _is_whole(self, key: tuple[str, bool, bool], texts: tuple[dict[str, str], dict[str, str]]) -> bool:
        """Whether a conversation was rendered; with the system's words as a text, also that all of it is there."""
        if not all("text" in text for text in texts) or _is_list(texts[0]["text"]):
            return False
        try:
            return not key[2] or bool(self._pieces(key[0], texts[0]["text"]))
        except UserError:
            return False

    def _fail(self, form: str, reason: str) -> None:
        """Stop at a conversation that cannot be rendered; at the first, other contents may do."""
        if self.base is None and form in TEXTS and reason.startswith(("TypeError", "UndefinedError")):
            raise _NoListsError
        raise UserError(f"cannot write a conversation ({reason})")

    def _messages(self, form: str, padded: bool, told: bool) -> list[dict[str, Any]]:
        """A conversation of a form, with a placeholder for each text; `told`: the system's is no list."""
        messages = []
        for number, (role, kinds) in enumerate(_turns(form)):
            texts = [_text(number, place) for place in range(len(kinds))]
            if padded:
                texts = [f"{PAD[1]}{text}{PAD[0]}" for text in texts]
            content: Any = [
                {"type": "image"} if kind == "i" else {"type": "text", "text": text}
                for kind, text in zip(kinds, texts, strict=True)
            ]
            if self.base is not None:
                content = self._one_text(kinds, texts)
            elif told and role == "s":
                content = texts[0]
            messages.append({"role": ROLES[role], "content": content})
        return messages

    def _one_text(self, kinds: str, texts: list[str]) -> str:
        """The content of a message as one text, images where the family has them."""
        assert self.base is not None
        written, left = "", ""
        for kind, text in zip(kinds, texts, strict=True):
            place = USER_IMAGE if kind == "i" else USER_TEXT
            written += self.base.join(left, place, same=True).words if left else ""
            written += self.placeholder if kind == "i" else text
            left = place
        return written

    def _pieces(self, form: str, text: str) -> tuple[list[tuple[int, str, str]], list[str]]:
        """The pieces of a rendered conversation as (turn, role and kind, name), and the words around them."""
        found = re.split(f"({re.escape(self.placeholder)}|qz[0-9]+x[0-9]+zq)", text)
        names, around = found[1::2], found[::2]
        turns = _turns(form)
        wanted = sorted(
            _text(n, p) for n, (_, kinds) in enumerate(turns) for p, k in enumerate(kinds) if k == "t"
        )
        images = sum(kinds.count("i") for _, kinds in turns)
        if sorted(name for name in names if name != self.placeholder) != wanted:
            raise UserError("leaves out, repeats or changes what is said in a conversation")
        if names.count(self.placeholder) != images:
            wrote = f"{names.count(self.placeholder)} of {images} images as {self.placeholder}"
            raise UserError(f"cannot be followed, it writes {wrote}")
        return self._placed(names, turns), around

    def _placed(self, names: list[str], turns: list[tuple[str, str]]) -> list[tuple[int, str, str]]:
        """Give each piece its turn; images belong where the form has them, in their order."""
        images = iter([number for number, (_, kinds) in enumerate(turns) for kind in kinds if kind == "i"])
        placed = []
        for name in names:
            number = next(images) if name == self.placeholder else int(name[2:].split("x")[0])
            kind = "image" if name == self.placeholder else "text"
            placed.append((number, f"{ROLES[turns[number][0]]}.{kind}", name))
        return placed

    def _reorders(self, rendered: list[tuple[str, str]]) -> bool:
        """Whether images come before words that they came after in their turn; other orders are refused."""
        found = {
            form: [(number, place) for number, place, _ in self._pieces(form, text)[0]]
            for form, text in rendered
        }
        self.system_last = any(
            pieces in self._orders(form, True) and pieces not in self._orders(form, False)
            for form, pieces in found.items()
        )
        moved = set()
        for form, pieces in found.items():
            given, first = self._orders(form, self.system_last)
            if pieces not in (given, first):
                moved = {True, False}
            elif given != first:
                moved.add(pieces == first)
        if len(moved) > 1:
            raise UserError("puts images where they cannot be followed, neither in place nor first")
        return True in moved

    @staticmethod
    def _orders(form: str, system_last: bool) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """The pieces of a form in their order, and with the images of each turn first.

        Args:
            form: one of those that are rendered.
            system_last: whether the system's words stand before the last turn of the user, not before the first.
        """
        turns = list(enumerate(_turns(form)))
        users = [number for number, (role, _) in turns if role == "u"]
        if system_last and turns[0][1][0] == "s" and users:
            system = turns.pop(0)
            turns.insert(users[-1] - 1, system)
        given = [
            (number, f"{ROLES[role]}.{'image' if kind == 'i' else 'text'}")
            for number, (role, kinds) in turns
            for kind in kinds
        ]
        order = [number for number, _ in turns]
        return given, sorted(given, key=lambda piece: (order.index(piece[0]), piece[1].endswith("text")))

    def _learn(self, form: str, asks: bool, text: str) -> None:
        """Note the words between the pieces of a conversation."""
        for key, words in self._between(form, asks, text):
            if self.seen.setdefault(key, words) != words:
                left, right = re.split(r"[+|]", key)
                both = f"{self.seen[key][:60]!r} and {words[:60]!r}"
                raise UserError(f"cannot be followed, between {left} and {right} it writes {both}")
            self.joins.setdefault(key, Join(words))

    def _merge_starts(self) -> None:
        """Let conversations with images open as others do, but where the template opens them in another way."""
        for key in [key for key in self.joins if key.startswith(f"{START_SEEN}|")]:
            plain = f"{START}|{key.partition('|')[2]}"
            if self.joins.setdefault(plain, self.joins[key]) == self.joins[key]:
                del self.joins[key]

    def _learn_spaces(self, form: str, asks: bool, text: str) -> None:
        """Note which white space around texts a template drops."""
        for key, words in self._between(form, asks, text):
            left, right = (place.endswith("text") for place in re.split(r"[+|]", key))
            fits = [
                Join(self.seen[key], *dropped)
                for dropped in itertools.product(
                    *((False, True) if text else (False,) for text in (left, right))
                )
                if words == _padded(self.seen[key], left and not dropped[0], right and not dropped[1])
            ]
            if not fits:
                between = " and ".join(re.split(r"[+|]", key))
                raise UserError(f"cannot be followed, it changes the white space between {between}")
            self.joins[key] = fits[0]

    def _between(self, form: str, asks: bool, text: str) -> list[tuple[str, str]]:
        """Each key of a conversation with the words there."""
        pieces, around = self._pieces(form, text)
        ask = asks and form.split(" ")[-1][0] == "u"
        start = START_SEEN if any("i" in kinds for _, kinds in _turns(form)) else START
        places = [(-1, start), *((number, place) for number, place, _ in pieces), (-2, ASK if ask else END)]
        keys = [
            join_key(left, right, number == other)
            for (number, left), (other, right) in itertools.pairwise(places)
        ]
        return list(zip(keys, around, strict=True))


def _turns(form: str) -> list[tuple[str, str]]:
    """Role and kinds of pieces of each turn of a form."""
    return [(turn[0], turn[2:]) for turn in form.split(" ")]


def _is_list(text: str) -> bool:
    """Whether a template wrote a list of parts as Python does, since it takes texts alone."""
    return "{'type': " in text


def _padded(words: str, after: bool, before: bool) -> str:
    """The words of a join with the white space that is kept around them."""
    return (PAD[0] if after else "") + words + (PAD[1] if before else "")


def _text(turn: int, place: int) -> str:
    """What stands for a text; a template that changes words changes it too."""
    return f"qz{turn}x{place}zq"


def _render(text: str, requests: list[dict[str, Any]], names: Mapping[str, str]) -> list[dict[str, str]]:
    """Render conversations in a process of its own."""
    document = {"template": text, "conversations": requests, "names": dict(names)}
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", render.__file__],
            input=json.dumps(document),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE,
            env={**os.environ, **quiet},
        )
    except subprocess.TimeoutExpired:
        raise UserError("takes too long to write a few short turns") from None
    if done.returncode < 0:
        raise UserError(
            f"takes more than {render.SECONDS} seconds, or too much memory, for a few short turns"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
        raise UserError(f"cannot be rendered ({reason})")
    results: list[dict[str, str]] = json.loads(done.stdout)
    return results
