"""How the turns of a conversation are marked: what stands between its pieces, by rule or by a chat template.

A piece is a text or an image of somebody's turn. unimm's own turns are `<bos><user>` images and text `<assistant>`
answer `<eos>`; a published checkpoint keeps its own, and where it has a chat template, that decides
(`unimm.families.templates`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from unimm.errors import UserError

TEMPLATE_FILE = "chat_template.jinja"
START, ASK, END = (
    "start",
    "ask",
    "end",
)  # before the first piece; where an answer is to begin; after the last piece
START_SEEN = (
    "start.images"  # `START`, of a conversation with images, where a template opens it in another way
)
OPENING_IMAGE = "opening.image"  # of the user's, before the mark of its turn
SYSTEM_TEXT, USER_TEXT, USER_IMAGE, ASSISTANT_TEXT = (
    "system.text",
    "user.text",
    "user.image",
    "assistant.text",
)


@dataclasses.dataclass(frozen=True)
class Join:
    """What stands between two neighbouring pieces.

    Attributes:
        words: special tokens and plain text.
        strip_left: whether white space at the end of the text before is dropped.
        strip_right: whether white space at the start of the text after is dropped.
    """

    words: str = ""
    strip_left: bool = False
    strip_right: bool = False


def join_key(left: str, right: str, same: bool) -> str:
    """Return the key, in `Turns.joins`, of two places of one turn (`same`) or of two."""
    return f"{left}{'+' if same else '|'}{right}"


@dataclasses.dataclass(frozen=True)
class Turns:
    """The words around turns; each is one of the tokenizer's special tokens or plain text.

    Attributes:
        user: what opens the user's turn.
        assistant: what closes it and asks for the answer.
        system: what is said first, if an answer in words is wanted; drawings get none.
        message: the system's message where a conversation has none and its template brings none.
        after_image: what follows each image.
        between_images: what comes before each image but the first.
        bare_drawings: whether a prompt for a drawing stands alone, without the marks of a turn.
        praise: what is added to every prompt for a drawing (Emu3's quality words).
        negative: what guidance steers away from; None: the prompt with its words blanked, as in Janus.
        template: the chat template that the turns follow; None: they follow the fields above.
        joins: what the template writes, by `join_key`: the fields of a `Join`.
        images_first: whether the template puts the images of a turn before its words.
        system_last: whether it puts the system's words before the last turn of the user (Pixtral).
        end: the special token that the template writes after an answer; empty: the tokenizer's end token.
        bos: where the tokenizer's begin token stands: "first", "after_images" that come first (Fuyu), or "never"
            (Qwen2-VL).
        images_before: whether images that a turn of the user begins with stand before what opens it (Molmo).
        places: how points and boxes stand in a text: as "words", or as "tokens", one a number (Fuyu).
    """

    user: str = "<user>"
    assistant: str = "<assistant>"
    system: str = ""
    message: str = ""
    after_image: str = ""
    between_images: str = ""
    bare_drawings: bool = False
    praise: str = ""
    negative: str | None = None
    template: str | None = None
    joins: Mapping[str, Annotated[tuple[str, bool, bool], Field(strict=False)]] | None = None
    images_first: bool = False
    system_last: bool = False
    end: str = ""
    bos: Literal["first", "after_images", "never"] = "first"
    images_before: bool = False
    places: Literal["words", "tokens"] = "words"

    @classmethod
    def deepseek(cls, user: str, assistant: str, system: str) -> Turns:
        """Janus's turns, `user: text`, blank line, `assistant:` (`janus/utils/conversation.py`)."""
        return cls(
            f"{user}: ",
            f"\n\n{assistant}:",
            f"{system}\n\n" if system else "",
            after_image="\n",
            between_images="\n",
        )

    def words(self) -> list[str]:
        """Return all that may stand around what is said."""
        fields = {**vars(self), "template": None}
        return [
            *(
                value
                for name, value in fields.items()
                if isinstance(value, str) and name not in ("bos", "places")
            ),
            *(join[0] for join in (self.joins or {}).values()),
        ]

    def without_template(self) -> Turns:
        """Return the conversation as its other fields have it."""
        return dataclasses.replace(
            self, template=None, joins=None, images_first=False, system_last=False, end=""
        )

    def join(self, left: str, right: str, same: bool = False) -> Join:
        """Return what stands between two places.

        Args:
            left: `START` or `START_SEEN`, or the place of a piece, such as `user.image`.
            right: the place of a piece, `ASK` or `END`.
            same: whether both pieces are of one turn.

        Raises:
            UserError: the chat template does not say.
        """
        left, right = (place.replace("assistant.image", ASSISTANT_TEXT) for place in (left, right))
        if same and left == ASSISTANT_TEXT:
            return Join()
        start = left == START_SEEN
        if self.joins is None:
            return Join(self._rule(START if start else left, right, same))
        found = self.joins.get(join_key(left, right, same))
        if found is None and start:
            return self.join(START, right, same)
        if found is None:
            raise UserError(f"{TEMPLATE_FILE}: the chat template writes no {right} after {left}")
        return Join(*found)

    def _rule(self, left: str, right: str, same: bool) -> str:
        """The words of a join without a template; the end token of an answer is not among them."""
        images = (USER_IMAGE, OPENING_IMAGE)
        before = self._after_system() if left == SYSTEM_TEXT else ""
        if left in images:
            before = self.after_image
        if same and (left == OPENING_IMAGE) == (right == OPENING_IMAGE):
            return before + (self.between_images if left == right and left in images else "")
        if right in (USER_TEXT, USER_IMAGE):
            return before + self.user
        if right in (ASSISTANT_TEXT, ASK):
            if left == OPENING_IMAGE:
                return before + self.user + self.assistant
            if left in (USER_TEXT, USER_IMAGE):
                return before + self.assistant
        return before

    def _after_system(self) -> str:
        """What follows a conversation's own system message: what follows the family's, or separates turns."""
        if self.system:
            return self.system[len(self.system.rstrip()) :]
        return self.assistant[: len(self.assistant) - len(self.assistant.lstrip())]
