"""The one writer of conversations: messages, with their images, become a `Row` of tokens and labels.

Questions, prompts for drawings, training records, scenes, preference pairs and the questions of scorers are all written
here, so that a model is trained on the very tokens that it will be asked with. The words around turns are those of the
model (`unimm.models.turns.Turns`), images stand where the messages have them, as `ImageLayout` writes them. The
assistant's texts, the end of each of its turns and its codes are labelled; where it mixes words and images, the token
that opens an image is labelled too, so that the model learns when to draw.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unimm.errors import UserError
from unimm.models.layout import IGNORED, Grid, ImageGrid, ImageLayout, LayoutPart, shorter
from unimm.models.turns import (
    ASK,
    ASSISTANT_TEXT,
    END,
    OPENING_IMAGE,
    START,
    START_SEEN,
    SYSTEM_TEXT,
    USER_IMAGE,
    USER_TEXT,
    Join,
    Turns,
)
from unimm.processing.messages import SHOWN, ImagePart, Message
from unimm.processing.places import split_places
from unimm.processing.rows import Row

ImageSlot: TypeAlias = "ImageGrid | Tensor"
"""What is known of an image when it is written: the grid of one to understand, the codes [h, w] of one to generate."""


class Conversation:
    """Writes the conversations of one model.

    Args:
        turns: what stands around what is said.
        tokenizer: any fast tokenizer with a begin and an end token.
        layout: how images sit among the tokens.
        context: most tokens of the stream.
    """

    def __init__(
        self, turns: Turns, tokenizer: PreTrainedTokenizerBase, layout: ImageLayout, context: int
    ) -> None:
        self.turns, self.tokenizer, self.layout, self.context = turns, tokenizer, layout, context
        self.pad, self.bos, self.eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id

    # --- messages to rows -----------------------------------------------------------------------------------

    def write(self, messages: Sequence[Message], images: Sequence[ImageSlot] = (), learn: bool = True) -> Row:
        """Write a conversation.

        Where it ends in the user's turn, the row ends where an answer in words begins.

        Args:
            messages: the turns.
            images: for each image of the messages, in their order: the (rows, columns) of one to understand, the
                codes [h, w] of one to generate.
            learn: whether what the assistant says and draws is labelled.
        """
        if _is_drawing(messages):
            row = self._drawing(messages, images)
        else:
            row = self._turns(messages, images)
        row.whole = len(row.ids)
        if not learn:
            row.labels = [IGNORED] * len(row.ids)
        return row

    def ask(self, messages: Sequence[Message], images: Sequence[ImageSlot] = ()) -> list[int]:
        """Return the tokens of a conversation up to where an answer in words begins.

        Raises:
            UserError: they leave no room in the context for an answer.
        """
        ids = self.write(messages, images, learn=False).ids
        if len(ids) >= self.context:
            way = shorter(len(ids), self._said(messages), self.context, bool(images))
            what = f"question: {len(ids)} tokens with its images"
            raise UserError(f"{what}, the context holds {self.context}; {way}")
        return ids

    def ask_to_draw(self, prompt: str, grid: Grid, images: Sequence[ImageGrid] = ()) -> list[int]:
        """Return the tokens of a prompt for a drawing, up to its first code.

        Args:
            prompt: the user's words.
            grid: (rows, columns) of the drawing's codes.
            images: (rows, columns) of each image that comes before the words.

        Raises:
            UserError: the prompt is empty, or leaves too little room in the context.
        """
        if not prompt.strip():
            raise UserError("prompt: empty; say what to draw")
        return self._prompt(Message("user", (*[SHOWN] * len(images), prompt)), images, grid)

    def _prompt(
        self, message: Message, images: Sequence[ImageGrid], grid: Grid, praise: str | None = None
    ) -> list[int]:
        """A prompt for a drawing, if the context has room for that."""
        ids = self.ids(*self._drawing_prompt(message, images, grid, praise))
        steps = len(self.layout.drawing_steps(*grid))
        if len(ids) + steps > self.context:
            room, what = max(self.context - steps, 0), " with its images" if images else ""
            way = shorter(len(ids), self._said([message]), room, bool(images))
            raise UserError(f"prompt: {len(ids)} tokens{what}, a drawing leaves room for {room}; {way}")
        return ids

    def unconditional(self, prompt_ids: Sequence[int], grid: Grid) -> list[int]:
        """Return what guidance steers away from, and what a prompt is replaced by where it is dropped in training.

        Args:
            prompt_ids: from `ask_to_draw`.
            grid: (rows, columns) of the drawing's codes.

        Returns:
            The model's negative prompt for this grid, or else the prompt with all but its ends made pad (Janus).
        """
        if self.turns.negative is not None:
            return self._prompt(Message("user", (self.turns.negative,)), (), grid, praise="")
        return [prompt_ids[0], *[self.pad] * (len(prompt_ids) - 2), prompt_ids[-1]]

    def drop_prompt(self, row: Row, grid: Grid) -> Row:
        """Return the row of a prompt and its drawing with what guidance steers away from in the prompt's place."""
        start = next(i for i, label in enumerate(row.labels) if label != IGNORED)
        prompt = self.unconditional(row.ids[:start], grid)
        labels = [IGNORED] * len(prompt) + row.labels[start:]
        return Row([*prompt, *row.ids[start:]], labels, drawn=row.drawn, whole=row.whole)

    def begin(self, where: str) -> list[int]:
        """Return the begin token, if it stands there (see `Turns.bos`)."""
        return [self.bos] if self.turns.bos == where else []

    # --- the two forms --------------------------------------------------------------------------------------

    def _drawing(self, messages: Sequence[Message], images: Sequence[ImageSlot]) -> Row:
        """One prompt and its drawing."""
        prompt, codes = messages[0], images[-1]
        assert isinstance(codes, Tensor)
        grids = [_grid(image) for image in images[:-1]]
        row = Row(seen=len(grids), drawn=1)
        size = (int(codes.shape[0]), int(codes.shape[1]))
        row.add(self.ids(*self._drawing_prompt(prompt, grids, size)))
        row.add(*self.layout.drawing(codes))
        return row

    def _drawing_prompt(
        self, message: Message, images: Sequence[ImageGrid], grid: Grid, praise: str | None = None
    ) -> list[LayoutPart]:
        """A prompt in parts, up to the drawing's first code; `praise`: what is added, None: the model's own."""
        turns, left = self.turns, START_SEEN if images else START
        parts: list[LayoutPart] = [self.begin("first")]
        grids = iter(images)
        image_place = OPENING_IMAGE if turns.images_before else USER_IMAGE
        for place, part in _drawing_pieces(message, turns.praise if praise is None else praise, image_place):
            parts.append(self.begin("after_images") if isinstance(part, str) else [])
            first = left in (START, START_SEEN)
            if not turns.bare_drawings or not first:
                parts += self.special(turns.join(left, place, same=not first).words)
            parts += [part] if isinstance(part, str) else self.layout.understanding(*next(grids))
            left = place
        if not turns.bare_drawings:
            parts += self.special(turns.join(left, ASK).words)
        return [*parts, *self.layout.opening(*grid)]

    def _turns(self, messages: Sequence[Message], images: Sequence[ImageSlot]) -> Row:
        """Any other conversation, turn by turn."""
        asked = any(message.role == "user" for message in messages)
        said = [part for m in messages if m.role == "assistant" for part in m.parts]
        speaks = messages[-1].role == "user" or any(isinstance(part, str) for part in said)
        turns = self.turns if asked else Turns(user="", assistant="")
        pieces = _pieces(messages, turns)
        instructed = any(piece.place == SYSTEM_TEXT for piece in pieces)
        writer = _Writer(self, turns, images, len({type(part) for part in said}) > 1)
        if asked and speaks and not (instructed and turns.template is None):
            writer.pending += self.special(turns.system)
        return writer.write(pieces, asks=messages[-1].role == "user")

    def _answer_opening(self, left: str) -> tuple[str, str]:
        """What stands between a piece and an answer in words: what is unlabelled, and what the answer begins with.

        Args:
            left: the place of the piece before, such as `user.text`.
        """
        turns = self.turns
        words = turns.join(left, ASSISTANT_TEXT).words
        if turns.joins is None:
            last = (self.special(turns.assistant) or [""])[-1]
            # After "Assistant:" the answer begins with a space; after a special token or a line end it does not.
            return words, " " if isinstance(last, str) and last and not last[-1].isspace() else ""
        asked = turns.join(left, ASK).words if left in (USER_TEXT, USER_IMAGE) else words
        return (asked, words[len(asked) :]) if words.startswith(asked) else (words, "")

    def answer_opening(self) -> str:
        """Return the words between a question and its answer, those that the answer begins with included."""
        return "".join(self._answer_opening(USER_TEXT))

    def _said(self, messages: Sequence[Message]) -> int:
        """Tokens of what is said, without what stands around it."""
        texts = (part.strip() for message in messages for part in message.parts if isinstance(part, str))
        return sum(len(self.text_ids(text)) for text in texts)

    # --- words to tokens ------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of plain text; what looks like a special token is spelled out.

        Raises:
            UserError: it holds half of a surrogate pair, which is no character, or a place beyond the vocabulary.
        """
        if self.turns.places == "words":
            return self._word_ids(text)
        pieces = split_places(text)
        return [
            token
            for piece in pieces
            for token in (self._word_ids(piece) if isinstance(piece, str) else self._place_ids(piece))
        ]

    def _place_ids(self, tokens: list[str]) -> list[int]:
        known = self.tokenizer.get_vocab()
        for token in tokens:
            if token not in known:
                raise UserError(f"place {','.join(tokens[1:-1])}: the model has no token for {token}")
        return [known[token] for token in tokens]

    def _word_ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"text: {text[error.start]!r} is half a character; give text in Unicode"
            ) from None
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def ids(self, *parts: LayoutPart) -> list[int]:
        """Return the tokens of a text given in parts: words, and tokens as they are.

        Neighbouring words are tokenised together, as they would be if the text were typed whole.
        """
        tokens: list[int] = []
        words = ""
        for part in parts:
            if isinstance(part, str):
                words += part
                continue
            if not part:  # which is no border between words
                continue
            tokens += [*self._plain(words), *part]
            words = ""
        return tokens + self._plain(words)

    def _plain(self, words: str) -> list[int]:
        return self.text_ids(words) if words else []

    def special(self, words: str) -> list[LayoutPart]:
        """Return the words around turns in parts, the special tokens in them as tokens."""
        known = self.tokenizer.get_added_vocab()
        longest_first = sorted(known, key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", words) if known else [words]
        return [[known[piece]] if piece in known else piece for piece in pieces if piece]


@dataclass(frozen=True)
class _Piece:
    """A text or an image of a conversation.

    Attributes:
        turn: number of its message.
        place: whose it is and what, such as `user.image`.
        part: itself.
    """

    turn: int
    place: str
    part: str | ImagePart

    @property
    def labelled(self) -> bool:
        """Whether it is of an answer."""
        return self.place.startswith("assistant")


class _Writer:
    """Writes the pieces of one conversation into a row.

    Args:
        conversation: whose grammar and tokenizer are used.
        turns: what stands between the pieces.
        images: see `Conversation.write`.
        mixed: whether answers have words and images, so that the model learns when to draw.
    """

    def __init__(
        self, conversation: Conversation, turns: Turns, images: Sequence[ImageSlot], mixed: bool
    ) -> None:
        self.conversation, self.turns, self.mixed = conversation, turns, mixed
        self.images = iter(images)
        self.row = Row()
        # unlabelled, before the next that is labelled
        self.pending: list[LayoutPart] = [conversation.begin("first")]
        self.stops = False  # whether the answer before ends where nothing in the row says so

    def write(self, pieces: Sequence[_Piece], asks: bool) -> Row:
        """Write all; `asks`: up to where an answer in words begins. Gives the row."""
        seen = any(isinstance(piece.part, ImagePart) and not piece.labelled for piece in pieces)
        left, before, begun = START_SEEN if seen else START, -2, False
        last = ASK if asks else END
        for number, piece in enumerate(pieces):
            after = pieces[number + 1] if number + 1 < len(pieces) else None
            join = self.turns.join(left, piece.place, piece.turn == before)
            following = self.turns.join(
                piece.place, after.place if after else last, after is not None and after.turn == piece.turn
            )
            part = piece.part
            if (isinstance(part, str) or piece.labelled) and not begun:
                self.pending.append(self.conversation.begin("after_images"))
                begun = True
            if isinstance(part, str):
                part = part.lstrip() if join.strip_right else part
                part = part.rstrip() if following.strip_left else part
            if piece.labelled:  # the opening of the turn is unlabelled, what it says and its end are labelled
                self._labelled(part, self._opening(left, join) if piece.turn != before else "")
                if after is None or after.turn != piece.turn:
                    self._close(following.words, isinstance(part, str) or self.mixed, after is None)
            else:
                # after an answer, what follows was taken when it was closed
                self.pending += [] if left.startswith("assistant") else self.conversation.special(join.words)
                self._unlabelled(part)
            left, before = piece.place, piece.turn
        if asks:
            self.pending += self.conversation.special(self.turns.join(left, ASK).words)
        if self.pending and pieces:
            self._flush()
        return self.row

    def _unlabelled(self, part: str | ImagePart) -> None:
        """Take an unlabelled piece."""
        if isinstance(part, str):
            self.pending.append(part)
            return
        self.pending += self.conversation.layout.understanding(*_grid(next(self.images)))
        self.row.seen += 1

    def _opening(self, left: str, join: Join) -> str:
        """Take what stands before an answer; gives what the answer begins with."""
        unlabelled, lead = join.words, ""
        if self.turns is self.conversation.turns:
            unlabelled, lead = self.conversation._answer_opening(left)
        self.pending += [] if left.startswith("assistant") else self.conversation.special(unlabelled)
        return lead

    def _labelled(self, part: str | ImagePart, lead: str) -> None:
        """Write a labelled piece."""
        conversation, row = self.conversation, self.row
        if isinstance(part, str):
            self._flush()
            self._label(conversation.ids(*conversation.special(lead), part))
            return
        codes = next(self.images)
        assert isinstance(codes, Tensor)
        opening = conversation.layout.opening(*_grid(codes))
        if self.mixed:
            self._flush()
            self._label(conversation.ids(*opening))
        else:
            self.pending += opening
            self._flush()
        row.add(*conversation.layout.drawing(codes))
        row.drawn += 1
        self.pending = [conversation.layout.closing()]

    def _label(self, tokens: list[int]) -> None:
        self.row.add(tokens, tokens)

    def _close(self, words: str, learn: bool, last: bool) -> None:
        """End an answer: by the token that the template writes after it, else by the tokenizer's own.

        Where a template continues without any, the row does so too, and the end token is only the label there.
        """
        conversation, templated = self.conversation, self.turns.template is not None
        write = self._label if learn else self.row.add
        self._flush()
        ends = [token for token in (self.turns.end, conversation.tokenizer.eos_token) if token]
        found = re.search("|".join(map(re.escape, ends)), words) if templated else None
        if found is not None:
            write(conversation.ids(*conversation.special(words[: found.end()])))
            words = words[found.end() :]
        elif last or not templated:
            write([conversation.eos])
            words = "" if last else words
        else:
            self.stops = learn
        self.pending = conversation.special(words)

    def _flush(self) -> None:
        """Write what is pending."""
        tokens = self.conversation.ids(*self.pending)
        start = len(self.row.labels)
        self.row.add(tokens)
        if self.stops and tokens:
            self.row.labels[start] = self.conversation.eos
        self.pending, self.stops = [], False


def _pieces(messages: Sequence[Message], turns: Turns) -> list[_Piece]:
    """What is said: the system's words, then each turn, or as the template of the turns has it."""
    pieces: list[_Piece] = []
    for number, message in enumerate(messages):
        if message.role == "system":
            words = " ".join(part for part in message.parts if isinstance(part, str))
            pieces.append(_Piece(-1, SYSTEM_TEXT, words))
            continue
        parts: list[str | ImagePart] = list(message.parts)
        if turns.images_first and message.role == "user":
            parts.sort(key=lambda part: isinstance(part, str))
        opens = turns.images_before and message.role == "user"
        for part in parts:
            kind = "text" if isinstance(part, str) else "image"
            opens = opens and kind == "image"
            pieces.append(_Piece(number, OPENING_IMAGE if opens else f"{message.role}.{kind}", part))
    asked = max((number for number, message in enumerate(messages) if message.role == "user"), default=-1)
    if turns.system_last and asked >= 0 and pieces[0].place == SYSTEM_TEXT:
        system = pieces.pop(0)
        pieces.insert(next(i for i, piece in enumerate(pieces) if piece.turn == asked), system)
    return pieces


def _drawing_pieces(message: Message, praise: str, image_place: str) -> list[tuple[str, str | ImagePart]]:
    """The images of a prompt for a drawing, then its words: where each stands, and itself."""
    words = " ".join(part.strip() for part in message.parts if isinstance(part, str)).strip()
    images = [part for part in message.parts if isinstance(part, ImagePart)]
    return [*((image_place, image) for image in images), (USER_TEXT, words + praise)]


def _is_drawing(messages: Sequence[Message]) -> bool:
    """Whether messages are one prompt, with words in it, and one drawing."""
    roles = [message.role for message in messages]
    return (
        roles == ["user", "assistant"]
        and [isinstance(part, ImagePart) for part in messages[1].parts] == [True]
        and any(isinstance(part, str) for part in messages[0].parts)
    )


def _grid(image: ImageSlot) -> ImageGrid:
    """Rows and columns of an image, and the times of a video."""
    if isinstance(image, Tensor):
        return int(image.shape[0]), int(image.shape[1])
    return image
